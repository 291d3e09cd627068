"""What is wanted, what was decided, and why: the nouns of planning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from appliance.catalog import ModelSpec, Variant
from appliance.config import EngineModel
from appliance.engines.base import EngineAdapter, Placement
from appliance.engines.vllm import parse_settings


@dataclass(frozen=True, slots=True)
class ModelCandidate:
    """A model that ought to be served, in one variant. `path` is where its file lies, or will lie once pulled."""

    model: ModelSpec
    variant: Variant
    path: Path
    threads: int | None = None
    """What was measured to be quickest; None if nothing was."""
    reason: str = ""
    """Why this variant and no other one, where it was chosen by measurement."""
    overrides: EngineModel | None = None
    """What the operator set for this model alone."""
    demand: float = 1.0
    """How much of what several models share it ought to get, relative to the others: the sequences under way that were
    measured, for example."""


@dataclass(frozen=True, slots=True)
class Refusal:
    model: str
    variant: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    placements: tuple[Placement, ...]
    refusals: tuple[Refusal, ...]
    usable_bytes: int
    """RAM that engines may hold together, the reserve taken off."""
    usable_reason: str
    gpu_usable_bytes: Mapping[str, int] = field(default_factory=dict)
    """Memory that engines may hold together on each device, by the name that CUDA_VISIBLE_DEVICES takes."""


def merge_engine_settings(
    engine: EngineAdapter, item: ModelCandidate, options: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    """Options of the engine for this model: its family's, the catalogue's, the operator's; later ones count."""
    settings = {**dict(engine.build_model_settings(item.model)), **item.model.settings.get(engine.kind, {})}
    if engine.kind == "vllm":
        settings |= dict(parse_settings(options))
    return tuple(settings.items())
