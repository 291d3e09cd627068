"""What an attempt cost: hosted by price, on-site by the engine time it took. Pure; the one place that knows money."""

from dataclasses import dataclass
from typing import Final

from appliance.config import CostSettings
from appliance.core import CostBasis, EngineStatus, Price, Target, Usage
from appliance.engines.rates import estimate_busy_seconds

ASSUMED_WATTS_PER_BUSY_CORE: Final = 10.0
"""A server core under load, with its share of memory and fans; used until the operator or a meter says better."""

ASSUMED_USD_PER_KWH: Final = 0.30
"""Between what a household pays in the US and in Germany."""

_PROMPT_MARGIN: Final = 1.2
"""Our token count of a prompt may be too low; what is reserved must not be."""


def worst_case_usd(price: Price, *, prompt_tokens: int, output_tokens: int) -> float:
    """The most an attempt is expected to cost: the whole output, no cached input, or all of it put into a cache."""
    prompt = round(prompt_tokens * _PROMPT_MARGIN)
    input_usd = max(price.input_usd, price.cache_write_usd or 0.0)
    return Price(input_usd, price.output_usd).cost_usd(Usage(prompt, output_tokens))


def hosted_cost_usd(price: Price, usage: Usage, reserved_usd: float) -> float:
    """By the reported tokens; where the target reported none, what was reserved: unknown is not free."""
    return reserved_usd if usage == Usage() else price.cost_usd(usage)


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """What an attempt came to, and how far that is known."""

    usd: float
    basis: CostBasis
    joules: float | None = None
    """Beyond what the machine takes idling; None for what is charged by a price."""
    energy_basis: CostBasis | None = None


def estimate_onsite_cost(
    target: Target, view: EngineStatus | None, usage: Usage, cost: CostSettings, cores: int
) -> CostEstimate | None:
    """Energy and hardware for the seconds of engine time that `usage` stands for; None where nothing tells the time."""
    if target.price is not None:
        return CostEstimate(target.price.cost_usd(usage), "price")
    if view is None or view.load is None:
        return None
    fresh = max(0, usage.prompt_tokens - usage.cached_tokens)
    seconds = estimate_busy_seconds(view.load, fresh, usage.completion_tokens)
    if seconds is None:
        return None
    watts, energy_basis = busy_watts(view, cost, cores)
    basis: CostBasis = "assumed" if cost.usd_per_kwh is None else energy_basis
    return CostEstimate(seconds * usd_per_busy_second(view, cost, cores), basis, seconds * watts, energy_basis)


def estimate_onsite_usd(
    target: Target, view: EngineStatus | None, usage: Usage, cost: CostSettings, cores: int
) -> float | None:
    bill = estimate_onsite_cost(target, view, usage, cost, cores)
    return None if bill is None else bill.usd


def busy_watts(view: EngineStatus, cost: CostSettings, cores: int) -> tuple[float, CostBasis]:
    """Extra power of an engine at work: metered, else as the operator says, else assumed."""
    if view.watts is not None:
        return view.watts, view.watts_basis
    if cost.watts_per_busy_core is not None:
        return cost.watts_per_busy_core * cores, "configured"
    return ASSUMED_WATTS_PER_BUSY_CORE * cores, "assumed"


def usd_per_busy_second(view: EngineStatus, cost: CostSettings, cores: int) -> float:
    watts, _ = busy_watts(view, cost, cores)
    per_kwh = ASSUMED_USD_PER_KWH if cost.usd_per_kwh is None else cost.usd_per_kwh
    return (watts / 1000 * per_kwh + cost.hardware_usd_per_hour) / 3600
