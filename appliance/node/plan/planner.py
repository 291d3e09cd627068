"""Which models run here, how, and why not the others. Pure: values in, values with reasons out.

GPUs and the processor are planned side by side: what has a variant for vLLM goes to the GPUs where there are any, what
has one for llama.cpp to the processor, and a model is placed once.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

from appliance.catalog import EngineKind
from appliance.config import EngineSettings as EngineConfig
from appliance.engines.base import EngineAdapter, Placement
from appliance.engines.encoder import Encoder
from appliance.engines.llamacpp import LlamaCpp
from appliance.engines.vllm import InstalledVllm, Vllm
from appliance.engines.vllm_flags import OLDEST
from appliance.node.hardware.gpu_devices import GpuDevice, list_usable_devices
from appliance.node.hardware.probe import Hardware
from appliance.node.plan.cpu_fit import compute_usable_bytes, place_on_cpu
from appliance.node.plan.gpu_fit import GpuClaim, GpuFit, OverheadRecords, build_gpu_placement, share_leftover_memory
from appliance.node.plan.models import ModelCandidate, Plan, Refusal

ENGINE_ADAPTERS: Final[Mapping[EngineKind, EngineAdapter]] = {
    "llamacpp": LlamaCpp(),
    "encoder": Encoder(),
    "vllm": Vllm(InstalledVllm(Path("/opt/vllm"), f"{OLDEST[0]}.{OLDEST[1]}.{OLDEST[2]}")),
}
"""What is planned for. Whether vLLM is installed, and where, shows when it is to be launched."""


def plan_placements(
    hardware: Hardware, wanted: Sequence[ModelCandidate], config: EngineConfig, records: OverheadRecords | None = None
) -> Plan:
    """Place every wanted model that fits, in the order given; each one leaves less for those after it.

    Of several variants of one model the first that fits is placed; on GPUs the first that fits well, and one that
    costs answers only where no other does. What `config` and the wishes set is kept, or refused in bytes. `records`:
    what engines were measured to hold here, instead of what is assumed of them.
    """
    devices, problems = list_usable_devices(hardware)
    groups = [list(group) for _, group in groupby(wanted, key=lambda item: item.model.name)]
    attempts = [_Attempt(hardware, config, devices, problems, records or {}, packed) for packed in (False, True)]
    for attempt in attempts if devices else attempts[:1]:
        attempt.run(groups)
    return min(attempts if devices else attempts[:1], key=lambda attempt: attempt.missing).plan()


class _Attempt:
    """One way of placing everything: GPUs filled evenly, or one after the other."""

    def __init__(
        self,
        hardware: Hardware,
        config: EngineConfig,
        devices: tuple[GpuDevice, ...],
        problems: tuple[str, ...],
        records: OverheadRecords,
        packed: bool,
    ) -> None:
        self._hardware, self._config, self._problems = hardware, config, problems
        self._devices, self._records, self._packed = devices, records, packed
        self._usable, self._usable_reason = compute_usable_bytes(hardware)
        self._ram_left = self._usable
        self._results: dict[str, Placement | GpuClaim] = {}
        self._refusals: list[Refusal] = []
        self._names: list[str] = []

    @property
    def missing(self) -> int:
        """Models that were wanted and have no place."""
        return len(self._names) - len(self._results)

    def run(self, groups: Sequence[Sequence[ModelCandidate]]) -> None:
        on_gpus = [group for group in groups if any(self._is_for_gpus(item) for item in group)]
        self._gpus = GpuFit(
            devices=self._devices,
            left={device.key: device.usable_bytes for device in self._devices},
            records=self._records,
            packed=self._packed,
            is_alone=len(on_gpus) == 1,
        )
        for group in groups:
            if group[0].model.name not in self._names:
                self._names.append(group[0].model.name)
            self._place(group)
        share_leftover_memory([one for one in self._results.values() if isinstance(one, GpuClaim)], self._gpus.left)

    def plan(self) -> Plan:
        placements = [
            build_gpu_placement(one, ENGINE_ADAPTERS["vllm"], self._config) if isinstance(one, GpuClaim) else one
            for one in self._results.values()
        ]
        usable = {device.key: device.usable_bytes for device in self._devices}
        return Plan(tuple(placements), tuple(self._refusals), self._usable, self._usable_reason, usable)

    def _is_for_gpus(self, item: ModelCandidate) -> bool:
        return bool(self._devices) and item.variant.engine == "vllm"

    def _place(self, group: Sequence[ModelCandidate]) -> None:
        for_gpus = [item for item in group if self._is_for_gpus(item)]
        claim: GpuClaim | str | None = None
        if for_gpus and group[0].model.name not in self._results:
            claim = self._gpus.claim(for_gpus)
            if isinstance(claim, GpuClaim):
                self._take(claim)
        for item in group:
            placed = self._results.get(item.model.name)
            if isinstance(placed, GpuClaim) and placed.item is item:
                continue
            if placed is not None:
                variant = placed.item.variant.name if isinstance(placed, GpuClaim) else placed.variant
                self._refuse(item, f"{item.model.name} is already placed as {variant}")
            elif item in for_gpus:
                self._refuse(item, str(claim))
            else:
                self._place_on_cpu(item)

    def _take(self, claim: GpuClaim) -> None:
        self._results[claim.item.model.name] = claim
        if claim.devices[0].unified_memory:
            self._ram_left = max(0, self._ram_left - claim.bytes_each)

    def _place_on_cpu(self, item: ModelCandidate) -> None:
        engine = ENGINE_ADAPTERS.get(item.variant.engine)
        if engine is None:
            launched = ", ".join(ENGINE_ADAPTERS)
            self._refuse(item, f"{item.variant.name} is for {item.variant.engine}; this node launches {launched}")
            return
        result = place_on_cpu(self._hardware, engine, item, self._config, self._ram_left)
        if isinstance(result, str):
            problems = "; ".join(self._problems) if engine.kind == "vllm" else ""
            self._refuse(item, f"{result}; {problems}" if problems else result)
            return
        self._results[item.model.name] = result
        self._ram_left -= result.memory.total_bytes
        for device in self._devices:
            if device.unified_memory:
                self._gpus.left[device.key] = max(0, self._gpus.left[device.key] - result.memory.total_bytes)

    def _refuse(self, item: ModelCandidate, reason: str) -> None:
        self._refusals.append(Refusal(item.model.name, item.variant.name, reason))
