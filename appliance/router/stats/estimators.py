"""What experience teaches about targets: how far estimates were off, how long answers are, what is cached. Pure.

All of it is learned from requests that went through here; nothing is asked of anybody. Outlives reloads.
"""

import math
from collections.abc import Hashable
from typing import Final

_MOST_KEPT: Final = 4096
"""Entries of one kind; the oldest go first. A caller can make up prefixes without end."""


class Averages:
    """Running averages by key, with how often each has been told. The first ones count more."""

    def __init__(self, feedback: float) -> None:
        self._learning = feedback
        self._known: dict[Hashable, tuple[float, int]] = {}

    def get(self, key: Hashable) -> tuple[float, int] | None:
        """The average and the number of times it was told."""
        return self._known.get(key)

    def learn(self, key: Hashable, value: float) -> None:
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _MOST_KEPT:
                del self._known[next(iter(self._known))]
            self._known[key] = (value, 1)
            return
        average, seen = known
        weight = max(self._learning, 1 / (seen + 1))
        self._known[key] = (average + (value - average) * weight, seen + 1)


class TokenEstimateCorrection:
    """How far our token estimates are off, per target, learned from the usage that targets report.

    No tokenizer of ours counts for a hosted model, so the estimate is corrected by experience instead of trusted.
    """

    _FIRST: Final = 1.2
    """Until something was learned, estimates are raised by a fifth: too few tokens promise too much."""
    _ENOUGH: Final = 3

    def __init__(self) -> None:
        self._ratios = Averages(0.05)

    def correct(self, target: str, estimated_tokens: int) -> int:
        ratio, _ = self._ratios.get(target) or (self._FIRST, 0)
        return max(1, round(estimated_tokens * ratio))

    def at_least(self, target: str, estimated_tokens: int) -> int:
        """What the true count is hardly ever below, to refuse by: half the estimate, or a bit under the learned one."""
        ratio, seen = self._ratios.get(target) or (self._FIRST, 0)
        return int(estimated_tokens * (ratio * 0.7 if seen >= self._ENOUGH else 0.5))

    def learn(self, target: str, estimated_tokens: int, reported_tokens: int) -> None:
        """Short prompts teach nothing: the chat template outweighs them."""
        if estimated_tokens >= 20 and reported_tokens > 0:
            self._ratios.learn(target, min(max(reported_tokens / estimated_tokens, 0.25), 6.0))


class LatencyCorrection:
    """How much longer things take than predicted, by target and kind of work: the ratio that few exceed.

    A budget is a promise, so what counts is not the average. Each time the ratio is exceeded it rises by a tenth, each
    time it is not it sinks by a fraction of that, so that it settles where about one in fifty exceeds it.
    """

    FIRST: Final = 1.25
    """Until something was learned: careful, since a miss breaks a promise and caution costs little."""
    LEAST: Final = 0.25
    MOST: Final = 4.0
    _STEP: Final = 0.1
    _EXCEEDED: Final = 0.02
    """How often it may be, in the long run."""
    _TOO_SHORT: Final = 0.05
    """Seconds. Below this the scheduler's noise outweighs what was predicted, and no budget depends on it."""

    def __init__(self) -> None:
        self._logs: dict[Hashable, float] = {}

    def ratio(self, key: Hashable) -> float:
        return math.exp(self._logs.get(key, math.log(self.FIRST)))

    def learn(self, key: Hashable, predicted_seconds: float, observed_seconds: float) -> None:
        """`predicted_seconds` before any correction."""
        if predicted_seconds < self._TOO_SHORT or observed_seconds <= 0:
            return
        log = self._logs.get(key, math.log(self.FIRST))
        seen = math.log(observed_seconds / predicted_seconds)
        log += self._STEP * (1 - self._EXCEEDED) if seen > log else -self._STEP * self._EXCEEDED
        self._logs[key] = min(max(log, math.log(self.LEAST)), math.log(self.MOST))


class Estimators:
    """Everything learned, of all targets."""

    _MOST_CACHED: Final = 0.95
    _MARGIN: Final = 1.25
    """Expected answers are this much longer than the average: half of them are longer than that."""

    def __init__(self) -> None:
        self.tokens = TokenEstimateCorrection()
        self.first_byte_correction = LatencyCorrection()
        self.finish_correction = LatencyCorrection()
        self._cached = Averages(0.5)
        self._written = Averages(0.1)
        self._first_bytes = Averages(0.1)

    def uncached_tokens(self, target: str, prefix: Hashable, prompt_tokens: int) -> int:
        """How much of a prompt is left to compute, going by the last ones that began alike."""
        share, _ = self._cached.get((target, prefix)) or (0.0, 0)
        return max(1, round(prompt_tokens * (1 - min(share, self._MOST_CACHED))))

    def learn_cached(self, target: str, prefix: Hashable, prompt_tokens: int, cached_tokens: int) -> None:
        if prompt_tokens > 0:
            self._cached.learn((target, prefix), min(cached_tokens / prompt_tokens, 1.0))

    def output_tokens(self, target: str, kind: str, limit_tokens: int) -> int:
        """How long an answer is going to be, going by others with about the same limit; the limit itself at most."""
        share, seen = self._written.get((target, kind, limit_tokens.bit_length())) or (1.0, 0)
        return limit_tokens if seen < 3 else max(1, min(limit_tokens, round(limit_tokens * share * self._MARGIN)))

    def learn_output(self, target: str, kind: str, limit_tokens: int, written_tokens: int) -> None:
        if limit_tokens > 0 and written_tokens > 0:
            share = min(written_tokens / limit_tokens, 1.0)
            self._written.learn((target, kind, limit_tokens.bit_length()), share)

    def first_byte_seconds(self, target: str, stream: bool) -> float | None:
        """How long a target that is not predicted took to begin a stream, or to send a whole answer, of late.

        None where it was never asked.
        """
        known = self._first_bytes.get((target, stream))
        return None if known is None else known[0]

    def learn_first_byte(self, target: str, stream: bool, seconds: float) -> None:
        self._first_bytes.learn((target, stream), seconds)
