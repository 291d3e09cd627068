"""How long an engine works at something, by the rates it has measured of itself. Pure."""

from collections.abc import Mapping
from typing import Final

from appliance.core import EngineLoad

_PRIOR_DECODE: Final = 10.0
"""Tokens/s before an engine has measured itself: a slow machine, so that nothing is promised that was not seen."""


def estimate_busy_seconds(load: EngineLoad, prompt_tokens: int, output_tokens: int) -> float | None:
    """Engine time that so many tokens stand for; None if the engine has not measured itself yet.

    Each token is charged its share of the engine's rate with all sequences running together, so that the sum over
    requests is the engine's busy time. `prompt_tokens` without those that came from a cache.
    """
    if load.prefill_tokens_per_second <= 0:
        return None
    together = max(1, load.running_sequences)
    seconds = prompt_tokens / load.prefill_tokens_per_second
    return seconds + output_tokens / interpolate_decode_rate(load.decode_tokens_per_second, together)


def interpolate_decode_rate(measured: Mapping[int, float], sequences: int) -> float:
    """Tokens/s over `sequences` running together, between the nearest measured numbers of sequences."""
    points = sorted((count, rate) for count, rate in measured.items() if rate > 0)
    if not points:
        return _PRIOR_DECODE
    below = [point for point in points if point[0] <= sequences]
    above = [point for point in points if point[0] >= sequences]
    if not below:
        # fewer sequences than ever measured: each at the same speed at least
        return above[0][1] * max(1, sequences) / above[0][0]
    if not above:
        return below[-1][1]
    (low, low_rate), (high, high_rate) = below[-1], above[0]
    if low == high:
        return low_rate
    return low_rate + (high_rate - low_rate) * (sequences - low) / (high - low)
