"""Which catalogue model this machine would run well: an estimate from priors, said to be one. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from appliance.catalog import Catalog, DevicePrior, ModelSpec, Variant
from appliance.config import Engine as EngineConfig
from appliance.engines.base import Placement
from appliance.node.planner import Wanted, plan
from appliance.node.probe import Hardware

_USABLE_DECODE_TOKENS_PER_SECOND: Final = 8.0
"""A little faster than people read."""
_USABLE_PREFILL_TOKENS_PER_SECOND: Final = 40.0
"""A prompt of 400 tokens within ten seconds."""
_ASSUMED_BANDWIDTH_BYTES_PER_SECOND: Final = 15_000_000_000
"""Where no prior fits: less than two channels of DDR4 give, so that the advice errs on the small side."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model and variant that fits and ought to be quick enough. The rates are for one sequence."""

    model: ModelSpec
    variant: Variant
    placement: Placement
    """Its path is empty: nothing has been pulled."""
    decode_tokens_per_second: float
    prefill_tokens_per_second: float | None
    """None where the prior does not know this quantisation."""
    basis: str
    """Where the rates come from."""


def best_candidate(hardware: Hardware, catalog: Catalog) -> Candidate | None:
    """The largest chat model for a CPU engine that fits and is estimated to be quick enough; None where none is."""
    candidates = [found for found in _candidates(hardware, catalog) if _is_quick(found)]
    return max(candidates, key=lambda found: (found.model.parameters, found.variant.size_bytes), default=None)


def _candidates(hardware: Hardware, catalog: Catalog) -> Iterator[Candidate]:
    prior = catalog.cpu_prior(hardware.cpu.flags)
    for model in catalog.models:
        if "chat" not in model.abilities:
            continue
        for variant in model.for_engine("llamacpp"):
            placements = plan(hardware, [Wanted(model, variant, Path())], EngineConfig()).placements
            if placements:
                yield _estimate(model, variant, placements[0], prior)


def _estimate(model: ModelSpec, variant: Variant, placement: Placement, prior: DevicePrior | None) -> Candidate:
    if prior is None:
        bandwidth = _ASSUMED_BANDWIDTH_BYTES_PER_SECOND
        basis = f"estimated from an assumed memory bandwidth of {bandwidth / 1e9:.0f} GB/s"
        operations = None
    else:
        bandwidth = prior.memory_bandwidth_bytes_per_second
        basis = f"estimated from {bandwidth / 1e9:.0f} GB/s of memory bandwidth ({prior.name}, {prior.basis})"
        operations = (prior.prefill_operations_per_second or {}).get(variant.quantisation)
    prefill = None if operations is None else operations * placement.shape.threads / (2 * model.parameters)
    # One sequence reads all weights for every token.
    return Candidate(model, variant, placement, bandwidth / variant.size_bytes, prefill, f"{basis}; not measured here")


def _is_quick(candidate: Candidate) -> bool:
    prefill = candidate.prefill_tokens_per_second
    reads_quickly = prefill is None or prefill >= _USABLE_PREFILL_TOKENS_PER_SECOND
    return reads_quickly and candidate.decode_tokens_per_second >= _USABLE_DECODE_TOKENS_PER_SECOND
