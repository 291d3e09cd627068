"""What an attempt cost: hosted by price, on-site by the engine time it took. Pure; the one place that knows money."""

from typing import Final

from appliance.config import Cost
from appliance.core import EngineView, Price, Target, Usage
from appliance.pipeline.capacity import decode_rate

ASSUMED_WATTS_PER_BUSY_CORE: Final = 10.0
"""A server core under load, with its share of memory and fans; used until the operator or a meter says better."""

ASSUMED_USD_PER_KWH: Final = 0.30
"""Between what a household pays in the US and in Germany."""

_PROMPT_MARGIN: Final = 1.2
"""Our token count of a prompt may be too low; what is reserved must not be."""


def reserve_usd(price: Price, *, prompt_tokens: int, output_tokens: int) -> float:
    """The most an attempt is expected to cost: the whole output, no cached input, or all of it put into a cache."""
    prompt = round(prompt_tokens * _PROMPT_MARGIN)
    input_usd = max(price.input_usd, price.cache_write_usd or 0.0)
    return Price(input_usd, price.output_usd).cost_usd(Usage(prompt, output_tokens))


def hosted_usd(price: Price, usage: Usage, reserved_usd: float) -> float:
    """By the reported tokens; where the target reported none, what was reserved: unknown is not free."""
    return reserved_usd if usage == Usage() else price.cost_usd(usage)


def onsite_usd(target: Target, view: EngineView | None, usage: Usage, cost: Cost, cores: int) -> float | None:
    """Energy and hardware for the seconds of engine time that `usage` stands for; None where nothing tells the time.

    Each token is charged its share of the engine's rate with all sequences running together, so that the sum over
    requests is the engine's busy time.
    """
    if target.price is not None:
        return target.price.cost_usd(usage)
    if view is None or view.load is None or view.load.prefill_tokens_per_second <= 0:
        return None
    load = view.load
    together = max(1, load.running_sequences)
    fresh = max(0, usage.prompt_tokens - usage.cached_tokens)
    seconds = fresh / load.prefill_tokens_per_second
    seconds += usage.completion_tokens / decode_rate(load.decode_tokens_per_second, together)
    return seconds * usd_per_busy_second(view, cost, cores)


def usd_per_busy_second(view: EngineView, cost: Cost, cores: int) -> float:
    per_core = ASSUMED_WATTS_PER_BUSY_CORE if cost.watts_per_busy_core is None else cost.watts_per_busy_core
    watts = view.watts if view.watts is not None else per_core * cores
    per_kwh = ASSUMED_USD_PER_KWH if cost.usd_per_kwh is None else cost.usd_per_kwh
    return (watts / 1000 * per_kwh + cost.hardware_usd_per_hour) / 3600
