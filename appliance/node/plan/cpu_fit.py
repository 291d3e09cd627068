"""How a model is placed on the processor: threads, context and sequences, or a refusal in bytes. Pure."""

from bisect import bisect_left
from collections.abc import Callable
from typing import Final

from appliance.config import EngineSettings as EngineConfig
from appliance.engines.base import EngineAdapter, EngineMemory, EngineShape, Placement
from appliance.node.hardware.probe import Hardware
from appliance.node.plan.models import ModelCandidate, merge_engine_settings

_RESERVE_BYTES: Final = 300_000_000
"""For the router and its ledger; 5 % of the memory is kept where that is more."""
_MIN_CONTEXT_TOKENS: Final = 2048
"""Less than this holds no useful prompt."""
_FULL_CONTEXT_TOKENS: Final = 32_768
"""One sequence may be this long unless the operator asks for more: a CPU reads a longer prompt for minutes."""
_TYPICAL_CONTEXT_TOKENS: Final = 1024
"""What each sequence beside the longest one is given."""
_CELLS_PER_SEQUENCE: Final = 512
_SEQUENCES_PER_CORE: Final = 16
_MOST_SEQUENCES: Final = 32
"""On two cores 32 sequences generate 1.2 to 2.2 times what 8 do together."""
_ROUNDING_TOKENS: Final = 256

_MemoryOf = Callable[[int], EngineMemory]
"""Cells -> what the engine then holds."""
_FOR_GPUS: Final = frozenset({"FP8", "MXFP4", "NVFP4"})
"""Precisions of safetensors that no processor here computes with."""


def compute_usable_bytes(hardware: Hardware) -> tuple[int, str]:
    """What engines may hold together, and how it comes about."""
    ram = hardware.ram
    ceiling = min(ram.total_bytes, ram.limit.limit_bytes) if ram.limit else ram.total_bytes
    reserve = max(_RESERVE_BYTES, ceiling // 20)
    return max(0, ram.usable_bytes - reserve), f"{ram.usable_reason}; {reserve:,} stay for the node itself"


def place_on_cpu(
    hardware: Hardware, engine: EngineAdapter, item: ModelCandidate, config: EngineConfig, left_bytes: int
) -> Placement | str:
    """The placement, or why there is none."""
    if engine.kind == "vllm" and item.variant.quantisation in _FOR_GPUS:
        return f"{item.variant.quantisation} is for GPUs; this machine has none that can be used"
    config = _apply_overrides(item, config)
    abilities = engine.list_abilities(item.model)
    if not abilities:
        return f"{engine.kind} does nothing of what {item.model.name} is for ({', '.join(item.model.abilities)})"
    threads, threads_reason = _threads(hardware, item, config)
    sequences, sequences_reason = _sequences(hardware, config)
    fitted = _fit_context(engine, item, config, sequences, left_bytes)
    if isinstance(fitted, str):
        return fitted
    context, context_reason = fitted
    if config.sequences is None and sequences > context // _CELLS_PER_SEQUENCE:
        sequences = max(1, context // _CELLS_PER_SEQUENCE)
        sequences_reason = f"{sequences} sequences, so that each has {_CELLS_PER_SEQUENCE} tokens of context"
    memory = engine.estimate_memory(item.model, item.variant, context_tokens=context, sequences=sequences)
    shape = EngineShape(
        threads=threads,
        context_tokens=context,
        sequences=sequences,
        sequence_context_tokens=min(context, item.model.context_tokens),
        max_queued_requests=config.max_queued_requests,
    )
    fits = f"needs {memory}; {left_bytes:,} usable"
    return Placement(
        model=item.model.name,
        variant=item.variant.name,
        engine=engine.kind,
        path=item.path,
        shape=shape,
        memory=memory,
        abilities=abilities,
        reasons=(*filter(None, (item.reason,)), fits, threads_reason, sequences_reason, context_reason),
        quality=item.model.quality if config.quality is None else config.quality,
        settings=merge_engine_settings(engine, item, config.vllm_options),
    )


def _threads(hardware: Hardware, item: ModelCandidate, config: EngineConfig) -> tuple[int, str]:
    cores = hardware.cpu.usable_cores
    if config.threads is not None:
        return config.threads, f"{config.threads} threads, as configured ({hardware.cpu.usable_reason})"
    if item.threads is not None:
        return item.threads, f"{item.threads} threads, measured to be quickest ({hardware.cpu.usable_reason})"
    return cores, f"{cores} threads: {hardware.cpu.usable_reason}"


def _sequences(hardware: Hardware, config: EngineConfig) -> tuple[int, str]:
    if config.sequences is not None:
        return config.sequences, f"{config.sequences} sequences, as configured"
    count = min(_MOST_SEQUENCES, _SEQUENCES_PER_CORE * hardware.cpu.usable_cores)
    return count, f"{count} sequences: {_SEQUENCES_PER_CORE} a core, at most {_MOST_SEQUENCES}"


def _fit_context(
    engine: EngineAdapter, item: ModelCandidate, config: EngineConfig, sequences: int, left_bytes: int
) -> tuple[int, str] | str:
    """KV cells for all sequences together and the reason, or why not even the least fits."""
    trained = item.model.context_tokens
    least = min(_MIN_CONTEXT_TOKENS, trained) if config.context_tokens is None else config.context_tokens

    def memory(cells: int) -> EngineMemory:
        return engine.estimate_memory(item.model, item.variant, context_tokens=cells, sequences=sequences)

    if memory(least).total_bytes > left_bytes:
        short = memory(least)
        remedy = _remedy(memory, least, config, left_bytes)
        return f"needs {short} with {least:,} tokens of context; {left_bytes:,} usable{remedy}"
    if config.context_tokens is not None:
        return least, f"{least:,} tokens of context, as configured"
    full = min(trained, _FULL_CONTEXT_TOKENS)
    per_sequence = min(trained, _TYPICAL_CONTEXT_TOKENS)
    wanted_tokens = full + (sequences - 1) * per_sequence
    # Half of what the weights leave: the page cache, other programs and a second model live here too.
    fixed = memory(0).total_bytes
    cells = max(least, _largest_context(memory, wanted_tokens, fixed + (left_bytes - fixed) // 2))
    if cells >= wanted_tokens:
        return cells, f"{cells:,} tokens of context: one sequence of {full:,} and {per_sequence:,} for each other"
    return cells, f"{cells:,} tokens of context in half of the memory left (the model's own is {trained:,})"


def _remedy(memory: _MemoryOf, least: int, config: EngineConfig, left_bytes: int) -> str:
    if config.context_tokens is None:
        return ": choose a smaller model or variant, or free memory"
    most = _largest_context(memory, least, left_bytes)
    return f": set engine.context_tokens to {most:,} or less" if most >= _ROUNDING_TOKENS else ": free memory"


def _largest_context(memory: _MemoryOf, wanted_tokens: int, limit_bytes: int) -> int:
    """The most cells, up to `wanted_tokens` and in whole steps of 256, that stay within `limit_bytes`; 0 if none do."""
    steps = range(1, -(-wanted_tokens // _ROUNDING_TOKENS) + 1)
    fitting = bisect_left(steps, True, key=lambda step: memory(step * _ROUNDING_TOKENS).total_bytes > limit_bytes)
    return fitting * _ROUNDING_TOKENS


def _apply_overrides(item: ModelCandidate, config: EngineConfig) -> EngineConfig:
    """`config` with what the operator set for this model alone."""
    if item.overrides is None:
        return config
    changes = {name: getattr(item.overrides, name) for name in ("context_tokens", "sequences", "quality")}
    if item.overrides.options:
        changes["vllm_options"] = item.overrides.options
    return config.model_copy(update=changes)
