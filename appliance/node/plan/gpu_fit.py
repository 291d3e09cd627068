"""How models are placed on GPUs: which variant on which devices, and who gets how much KV cache. Pure.

First every model gets devices on which its weights, its overheads and a useful cache fit. Then what is left of each
device is shared among the models on it. A copy is split over the fewest devices that hold it well, and a precision that
costs answers is taken only where none that does not fits well.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final

from appliance.catalog import ModelSpec
from appliance.config import EngineModel
from appliance.config import EngineSettings as EngineConfig
from appliance.engines.base import EngineAdapter, EngineMemory, EngineShape, GpuShare, Placement
from appliance.engines.vllm_memory import (
    VllmOverheads,
    can_split,
    describe_precision,
    estimate_device_memory,
    explain_refusal,
)
from appliance.node.hardware.gpu_devices import GpuDevice
from appliance.node.plan.models import ModelCandidate, merge_engine_settings

OverheadKey = tuple[str, str, str, int]
"""Model, variant, name of the device, devices a copy is split over."""
OverheadRecords = Mapping[OverheadKey, VllmOverheads]

_MIN_CONTEXT_TOKENS: Final = 2_048
_FULL_CONTEXT_TOKENS: Final = 16_384
_TYPICAL_TOKENS: Final = 1_024
_COMFORTABLE_SEQUENCES: Final = 16
"""A cache holds a model well if one long sequence and fifteen typical ones have room."""
_LONG_SEQUENCES: Final = 2
"""The longest sequence is chosen so that two of them have room at once."""
_CACHED_TOKENS: Final = 4_096
"""More cache than this for each sequence is of no use to a model that could live on less of the device."""
_LARGE_DEVICE_BYTES: Final = 70 * (1 << 30)
_HUGE_DEVICE_BYTES: Final = 160 * (1 << 30)
"""From these sizes vLLM itself takes larger steps."""
_ROUNDING_TOKENS: Final = 1_024
_SPLITS: Final = (1, 2, 4, 8)
_FEW_SEQUENCES: Final = 32
"""Where a model only just fits: each sequence wants logits and a share of the graphs."""
_COSTS_ANSWERS: Final = frozenset({"AWQ", "GPTQ", "NVFP4"})
_ROUNDS: Final = 4


@dataclass(slots=True)
class GpuClaim:
    """What one model is about to get."""

    item: ModelCandidate
    devices: tuple[GpuDevice, ...]
    tensor_parallel: int
    data_parallel: int
    base: EngineMemory
    """On each device, without KV cache."""
    sequences: int
    batch_tokens: int
    kv_bytes: int
    """On each device."""
    most_kv_bytes: int

    @property
    def bytes_each(self) -> int:
        return self.base.total_bytes + self.kv_bytes


@dataclass(frozen=True, slots=True)
class GpuFit:
    """Memory that is left on each device, by key, while models are being given devices."""

    devices: tuple[GpuDevice, ...]
    left: dict[str, int]
    records: OverheadRecords
    packed: bool
    """Fill devices up one after the other, instead of spreading over all of them."""
    is_alone: bool
    """No other model wants these devices: idle ones may carry further copies."""

    def claim(self, items: Sequence[ModelCandidate]) -> GpuClaim | str:
        """Devices for one model in the best of these variants; or why in none, of the one that came nearest."""
        shortfalls: list[tuple[int, str]] = []
        for gentle in (True, False):
            for comfortable in (True, False) if not gentle else (True,):
                for item, devices in self._options(items, gentle):
                    found = self._try(item, devices, comfortable)
                    if isinstance(found, GpuClaim):
                        return found
                    shortfalls.append(found)
        for item in items:  # a split that the operator asked for, or a precision, that no device can do
            shortfalls += [(1 << 62, reason) for reason in self._impossible(item)]
        return min(shortfalls, key=lambda pair: pair[0])[1] if shortfalls else "no GPU can be used"

    def _options(
        self, items: Sequence[ModelCandidate], gentle: bool
    ) -> Iterator[tuple[ModelCandidate, tuple[GpuDevice, ...]]]:
        """Variants with the devices for one copy: fewest devices first, then in the order of the variants."""
        for size in _SPLITS:
            for item in items:
                if gentle and item.variant.quantisation in _COSTS_ANSWERS:
                    continue
                for group in self._groups(item, size):
                    yield item, group

    def _groups(self, item: ModelCandidate, size: int) -> Iterator[tuple[GpuDevice, ...]]:
        """Devices of one kind that may hold one copy of `item` split over `size` of them, the best group first."""
        overrides = _overrides(item)
        if overrides.tensor_parallel not in (None, size) or (size > 1 and not can_split(item.model, size)):
            return
        for _, kind in groupby(sorted(self._allowed(overrides), key=_kind), key=_kind):
            same = [device for device in kind if size == 1 or not device.is_part]
            same = [
                one for one in same if explain_refusal(item.variant, one.compute_capability, overrides.kv_dtype) is None
            ]
            same.sort(key=lambda device: self.left[device.key], reverse=not self.packed)
            if self.packed:  # the fullest that still may hold it: tried one after the other
                yield from (tuple(same[start : start + size]) for start in range(len(same) - size + 1))
            elif len(same) >= size:
                yield tuple(same[:size])

    def _allowed(self, overrides: EngineModel) -> list[GpuDevice]:
        return [device for device in self.devices if overrides.gpus is None or device.index in overrides.gpus]

    def _try(
        self, item: ModelCandidate, devices: tuple[GpuDevice, ...], comfortable: bool
    ) -> GpuClaim | tuple[int, str]:
        """A claim on these devices; or by how much it does not fit and how to say so."""
        overrides, size, smallest = _overrides(item), len(devices), min(one.total_bytes for one in devices)
        batch, sequences = _step(smallest, overrides, comfortable)
        measured = self.records.get((item.model.name, item.variant.name, devices[0].name, size))
        base = estimate_device_memory(
            item.model,
            item.variant,
            tensor_parallel=size,
            batch_tokens=batch,
            sequences=sequences,
            measured=measured,
        )
        cache = _Cache(item.model, overrides.kv_dtype, size, batch)
        least = overrides.context_tokens or min(_MIN_CONTEXT_TOKENS, item.model.context_tokens)
        kv = cache.comfortable(overrides.context_tokens) if comfortable else cache.bytes(least)
        limit = min(self.left[one.key] for one in devices)
        if overrides.gpu_memory_share is not None:
            limit = min(limit, int(smallest * overrides.gpu_memory_share))
        if base.total_bytes + kv > limit:
            needed = replace(base, kv_bytes=cache.bytes(least))
            where = f"each of {size} devices" if size > 1 else "one device"
            names = f"{devices[0].name}: {limit:,} usable"
            reason = f"needs {needed} on {where} with {least:,} tokens of context; {names}: {_REMEDY}"
            return needed.total_bytes - limit, reason
        copies = self._copies(item, devices, base.total_bytes + kv)
        if overrides.data_parallel is not None and len(copies) < overrides.data_parallel * size:
            can = f"{len(copies)} of the devices it may use can do it"
            return 1, f"{overrides.data_parallel} copies on {size} devices each were asked for; {can}"
        most = min(limit - base.total_bytes, max(kv, cache.useful(sequences)))
        claim = GpuClaim(item, copies, size, len(copies) // size, base, sequences, batch, kv, most)
        for device in copies:
            self.left[device.key] -= claim.bytes_each
        return claim

    def _copies(self, item: ModelCandidate, devices: tuple[GpuDevice, ...], needed: int) -> tuple[GpuDevice, ...]:
        """`devices`, and those of further copies: as many as were asked for, or all that no other model wants."""
        overrides, size = _overrides(item), len(devices)
        wanted = overrides.data_parallel or (len(self.devices) if self.is_alone else 1)
        if devices[0].is_part:
            return devices  # a part is given to one process alone
        same = [
            one
            for one in self._allowed(overrides)
            if one not in devices and _kind(one) == _kind(devices[0]) and self.left[one.key] >= needed
        ]
        copies = min(wanted, 1 + len(same) // size)
        return (*devices, *same[: (copies - 1) * size])

    def _impossible(self, item: ModelCandidate) -> Iterator[str]:
        overrides = _overrides(item)
        allowed = self._allowed(overrides)
        if not allowed:
            yield f"no GPU has one of the indices {', '.join(map(str, overrides.gpus or ()))}"
        for device in allowed:
            reason = explain_refusal(item.variant, device.compute_capability, overrides.kv_dtype)
            if reason is not None:
                yield reason
        size = overrides.tensor_parallel
        if size is not None and not can_split(item.model, size):
            heads = f"{item.model.heads} heads and {item.model.kv_heads} KV heads"
            yield f"{item.model.name} cannot be split over {size} devices: it has {heads}"
        elif size is not None:
            yield f"{size} devices of one kind were asked for; {len(allowed)} can be used"


@dataclass(frozen=True, slots=True)
class _Cache:
    """The KV cache of one model on each device of a copy."""

    model: ModelSpec
    kv_dtype: str
    tensor_parallel: int
    batch_tokens: int

    def bytes(self, context_tokens: int) -> int:
        """Of one sequence."""
        return self.model.kv_bytes(
            context_tokens,
            1 if self.kv_dtype == "fp8" else 2,
            tensor_parallel=self.tensor_parallel,
            in_flight_tokens=self.batch_tokens,
        )

    def comfortable(self, context_tokens: int | None) -> int:
        trained = self.model.context_tokens
        long = context_tokens or min(trained, _FULL_CONTEXT_TOKENS)
        return self.bytes(long) + (_COMFORTABLE_SEQUENCES - 1) * self.bytes(min(long, _TYPICAL_TOKENS))

    def useful(self, sequences: int) -> int:
        """More would probably lie idle."""
        trained = self.model.context_tokens
        return max(sequences * self.bytes(min(trained, _CACHED_TOKENS)), 4 * self.bytes(trained))

    def longest(self, kv_bytes: int) -> int:
        """Tokens of the longest sequence of which two have room at once, or one where that is little."""
        trained = self.model.context_tokens
        steps = range(1, -(-trained // _ROUNDING_TOKENS) + 1)
        for together in (_LONG_SEQUENCES, 1):

            def is_too_long(step: int, together: int = together) -> bool:
                return together * self.bytes(min(trained, step * _ROUNDING_TOKENS)) > kv_bytes

            longest = bisect_left(steps, True, key=is_too_long) * _ROUNDING_TOKENS
            if longest >= min(trained, _MIN_CONTEXT_TOKENS):
                break
        return min(trained, max(longest, 256))


def share_leftover_memory(claims: Sequence[GpuClaim], left: dict[str, int]) -> None:
    """Give what is left of each device to those on it, by their demand, as far as they can use it.

    A copy gets on all its devices what the fullest of them can give.
    """
    for _ in range(_ROUNDS):
        hungry = [claim for claim in claims if claim.kv_bytes < claim.most_kv_bytes]
        offers = []
        for claim in hungry:
            parts = []
            for device in claim.devices:
                rivals = sum(max(other.item.demand, 0.01) for other in hungry if device in other.devices)
                parts.append(int(left[device.key] * max(claim.item.demand, 0.01) / rivals))
            offers.append(min(claim.most_kv_bytes - claim.kv_bytes, *parts))
        for claim, offer in zip(hungry, offers, strict=True):
            claim.kv_bytes += offer
            for device in claim.devices:
                left[device.key] -= offer


def build_gpu_placement(claim: GpuClaim, engine: EngineAdapter, config: EngineConfig) -> Placement:
    """The claim as a placement, with the reasons for its figures."""
    item, overrides, size = claim.item, _overrides(claim.item), claim.tensor_parallel
    cache = _Cache(item.model, overrides.kv_dtype, size, claim.batch_tokens)
    longest = overrides.context_tokens or cache.longest(claim.kv_bytes)
    fit = max(1, claim.kv_bytes // cache.bytes(min(longest, _TYPICAL_TOKENS)))
    # A power of two: another number would make the engine compile anew whenever a little memory is missing.
    sequences = overrides.sequences or min(claim.sequences, 1 << (fit.bit_length() - 1))
    memory = replace(claim.base, kv_bytes=claim.kv_bytes)
    tokens = int(claim.kv_bytes / cache.bytes(longest) * longest)
    return Placement(
        model=item.model.name,
        variant=item.variant.name,
        engine=engine.kind,
        path=item.path,
        shape=EngineShape(
            threads=1,
            context_tokens=tokens,
            sequences=sequences,
            sequence_context_tokens=longest,
            max_queued_requests=config.max_queued_requests,
        ),
        memory=memory,
        abilities=engine.list_abilities(item.model),
        reasons=_explain_placement(claim, memory, f"{sequences} sequences, {longest:,} tokens of context, {tokens:,}"),
        quality=item.model.quality if overrides.quality is None else overrides.quality,
        gpu=_build_gpu_share(claim, memory, overrides.kv_dtype),
        settings=merge_engine_settings(engine, item, (*config.vllm_options, *overrides.options)),
    )


def _build_gpu_share(claim: GpuClaim, memory: EngineMemory, kv_dtype: str) -> GpuShare:
    total = min(device.total_bytes for device in claim.devices)
    return GpuShare(
        devices=tuple(device.key for device in claim.devices),
        memory_utilization=-(-memory.total_bytes * 10_000 // total) / 10_000,
        kv_cache_bytes=claim.kv_bytes,
        max_batched_tokens=claim.batch_tokens,
        tensor_parallel=claim.tensor_parallel,
        data_parallel=claim.data_parallel,
        kv_dtype=kv_dtype,
        unified_memory=claim.devices[0].unified_memory,
    )


def _explain_placement(claim: GpuClaim, memory: EngineMemory, shape: str) -> tuple[str, ...]:
    first, size = claim.devices[0], claim.tensor_parallel
    total = min(device.total_bytes for device in claim.devices)
    names = ", ".join(str(device.index) for device in claim.devices)
    layout = f"{claim.data_parallel} copies, each " if claim.data_parallel > 1 else ""
    layout += f"split over {size} devices" if size > 1 else "on one device"
    reasons = (
        claim.item.reason,
        f"needs {memory} on each device; {first.name} has {total:,}",
        f"GPU {names}: {layout}",
        f"{shape} tokens of KV cache",
        describe_precision(claim.item.variant, first.compute_capability),
    )
    return tuple(filter(None, reasons))


_REMEDY: Final = "choose a smaller model or variant, more devices, or free memory"


def _overrides(item: ModelCandidate) -> EngineModel:
    return item.overrides or EngineModel(name=item.model.name)


def _kind(device: GpuDevice) -> tuple[str, int, bool]:
    return device.name, device.total_bytes, device.is_part


def _step(total_bytes: int, overrides: EngineModel, comfortable: bool) -> tuple[int, int]:
    """Tokens of the largest step and sequences at most, for a device of this size; few where memory is short."""
    if total_bytes >= _HUGE_DEVICE_BYTES:
        batch, sequences = 16_384, 512
    elif total_bytes >= _LARGE_DEVICE_BYTES:
        batch, sequences = 8_192, 512
    else:
        batch, sequences = 2_048, 256
    return batch, overrides.sequences or (sequences if comfortable else _FEW_SEQUENCES)
