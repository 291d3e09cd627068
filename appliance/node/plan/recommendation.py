"""Which catalogue model this machine would run well: an estimate from priors, said to be one. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from appliance.catalog import Catalog, DevicePrior, ModelSpec, Variant
from appliance.config import EngineSettings as EngineConfig
from appliance.engines.base import Placement
from appliance.node.calibrate.calibration import Measurement
from appliance.node.hardware.probe import Hardware
from appliance.node.plan.models import ModelCandidate
from appliance.node.plan.planner import plan_placements

_USABLE_DECODE_TOKENS_PER_SECOND: Final = 8.0
"""A little faster than people read."""
_USABLE_PREFILL_TOKENS_PER_SECOND: Final = 40.0
"""A prompt of 400 tokens within ten seconds."""
_ASSUMED_BANDWIDTH_BYTES_PER_SECOND: Final = 15_000_000_000
"""Where no prior fits: less than two channels of DDR4 give, so that the advice errs on the small side."""
_ASSUMED_OPERATIONS_PER_SECOND: Final = 30_000_000_000
"""Of one core, where no prior fits."""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One model and variant that fits and ought to be quick enough. The rates are for one sequence."""

    model: ModelSpec
    variant: Variant
    placement: Placement
    """Its path is empty: nothing has been pulled."""
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    basis: str
    """Where the rates come from."""


def recommend_model(hardware: Hardware, catalog: Catalog, measured: Measurement | None = None) -> Recommendation | None:
    """The largest chat model for a CPU engine that fits and is estimated to be quick enough; None if none is.

    What was `measured` of another model on this machine takes the place of the priors.
    """
    prior = catalog.find_cpu_prior(hardware.cpu.flags)
    prior = prior if measured is None else correct_prior(prior, measured)
    candidates = [found for found in _candidates(hardware, catalog, prior) if _is_quick(found)]
    return max(candidates, key=lambda found: (found.model.parameters, found.variant.size_bytes), default=None)


def correct_prior(prior: DevicePrior | None, measured: Measurement) -> DevicePrior | None:
    """The prior with what the figures of one model say: operations by quantisation, and a bandwidth they prove.

    A small model is held up by more than memory, so its decoding can prove a higher bandwidth, never a lower one.
    """
    if prior is None:
        return None
    operations: dict[str, int] = {}
    bandwidth = prior.memory_bandwidth_bytes_per_second
    for variant in measured.variants:
        for figure in variant.figures:
            if figure.disturbed:
                continue
            if figure.kind == "prefill":
                done = int(2 * measured.parameters * figure.tokens_per_second / figure.threads)
                operations[variant.name.upper()] = max(done, operations.get(variant.name.upper(), 0))
            elif figure.sequences == 1:
                bandwidth = max(bandwidth, int(figure.tokens_per_second * variant.size_bytes))
    return replace(
        prior,
        prefill_operations_per_second={**(prior.prefill_operations_per_second or {}), **operations},
        memory_bandwidth_bytes_per_second=bandwidth,
    )


def _candidates(hardware: Hardware, catalog: Catalog, prior: DevicePrior | None) -> Iterator[Recommendation]:
    for model in catalog.models:
        if "chat" not in model.abilities:
            continue
        for variant in model.list_variants("llamacpp"):
            placements = plan_placements(hardware, [ModelCandidate(model, variant, Path())], EngineConfig()).placements
            if placements:
                yield _estimate(model, variant, placements[0], prior)


def _estimate(model: ModelSpec, variant: Variant, placement: Placement, prior: DevicePrior | None) -> Recommendation:
    bandwidth, known, origin = _ASSUMED_BANDWIDTH_BYTES_PER_SECOND, dict[str, int](), "assumed"
    if prior is not None:
        bandwidth, origin = prior.memory_bandwidth_bytes_per_second, f"{prior.name}, {prior.basis}"
        known = dict(prior.prefill_operations_per_second or {})
    # A quantisation that was not measured counts as the slowest of those that were.
    operations = known.get(variant.quantisation) or min(known.values(), default=_ASSUMED_OPERATIONS_PER_SECOND)
    active = model.active_parameters or model.parameters
    basis = f"estimated from {bandwidth / 1e9:.0f} GB/s and {operations / 1e9:.0f} GFLOP/s a core ({origin})"
    return Recommendation(
        model=model,
        variant=variant,
        placement=placement,
        # One sequence reads all weights that compute a token, for every token.
        decode_tokens_per_second=bandwidth * model.parameters / active / variant.size_bytes,
        prefill_tokens_per_second=operations * placement.shape.threads / (2 * active),
        basis=f"{basis}; not measured here",
    )


def _is_quick(candidate: Recommendation) -> bool:
    return (
        candidate.decode_tokens_per_second >= _USABLE_DECODE_TOKENS_PER_SECOND
        and candidate.prefill_tokens_per_second >= _USABLE_PREFILL_TOKENS_PER_SECOND
    )
