"""Figures of how good answers are, each with what chance alone may have done to it. Pure.

Shares have Wilson's interval (Wilson, "Probable inference", 1927), sums over rows a bootstrap over rows (Efron,
"Bootstrap methods", 1979), both at 95 %. Two models are compared on the same rows, so their difference is bootstrapped
over rows that both answered.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

ECE_BINS: Final = 10
RESAMPLES: Final = 1_000
_Z: Final = 1.959963984540054
"""95 % of a normal distribution lie within so many deviations."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MetricInterval:
    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def share(hits: int, count: int) -> MetricInterval:
    """Wilson's interval: right also for few rows and for shares near 0 and 1."""
    if count == 0:
        return MetricInterval(0.0, 0.0, 1.0)
    rate, spread = hits / count, _Z * _Z / count
    middle = (rate + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(rate * (1 - rate) / count + spread / (4 * count))
    return MetricInterval(rate, max(0.0, middle - half), min(1.0, middle + half))


def ece(confidence: Sequence[float], hits: Sequence[bool], bins: int = ECE_BINS) -> float | None:
    """Expected calibration error: the mean gap between confidence and accuracy, over bins of equal width."""
    if not confidence:
        return None
    sure, hit = np.asarray(confidence, np.float64), np.asarray(hits, np.float64)
    place = np.minimum((sure * bins).astype(np.int64), bins - 1)
    return float(np.abs(np.bincount(place, weights=sure - hit, minlength=bins)).sum() / len(sure))


def class_f1(truth: Ints, answered: Ints, classes: int, seed: int = 0) -> MetricInterval:
    """Macro F1 over the classes that occur. An answer outside them is -1."""
    value = _macro(truth, answered, classes)
    draws = np.random.default_rng(seed).integers(0, len(truth), (RESAMPLES, len(truth)))
    return _interval(value, np.array([_macro(truth[draw], answered[draw], classes) for draw in draws]))


def _macro(truth: Ints, answered: Ints, classes: int) -> float:
    gold = np.bincount(truth, minlength=classes)
    said = np.bincount(answered[answered >= 0], minlength=classes)
    right = np.bincount(truth[truth == answered], minlength=classes)
    there = (gold + said) > 0
    return float((2 * right[there] / (gold + said)[there]).mean())


@dataclass(frozen=True, slots=True)
class Overlap:
    """Micro and macro F1 of what was found against what is there, with precision and recall over all fields."""

    micro: MetricInterval
    macro: MetricInterval
    precision: float
    recall: float


def overlap(right: Ints, said: Ints, there: Ints, seed: int = 0) -> Overlap:
    """Counts of shape (rows, fields): values that are right, that were said, that are there."""
    draws = np.random.default_rng(seed).integers(0, len(right), (RESAMPLES, len(right)))
    micro, macro = _f1s(right.sum(0), said.sum(0), there.sum(0))
    drawn = [_f1s(right[draw].sum(0), said[draw].sum(0), there[draw].sum(0)) for draw in draws]
    return Overlap(
        _interval(micro, np.array([one for one, _ in drawn])),
        _interval(macro, np.array([one for _, one in drawn])),
        float(right.sum() / max(1, said.sum())),
        float(right.sum() / max(1, there.sum())),
    )


def _f1s(right: Ints, said: Ints, there: Ints) -> tuple[float, float]:
    both = said + there
    used = both > 0
    micro = 2 * right.sum() / both.sum() if both.sum() else 1.0
    return float(micro), float((2 * right[used] / both[used]).mean()) if used.any() else 1.0


def mean(values: Sequence[float], seed: int = 0) -> MetricInterval:
    rows = np.asarray(values, np.float64)
    draws = np.random.default_rng(seed).integers(0, len(rows), (RESAMPLES, len(rows)))
    return _interval(float(rows.mean()), rows[draws].mean(axis=1))


def difference(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> MetricInterval:
    """How much better one is than the other on the same rows: the mean difference of their rows' scores."""
    return mean([mine - other for mine, other in zip(ours, theirs, strict=True)], seed)


def verdict(gap: MetricInterval) -> str:
    if gap.low > 0:
        return "better"
    return "worse" if gap.high < 0 else "no difference shown"


def _interval(value: float, drawn: Floats) -> MetricInterval:
    low, high = np.quantile(drawn, (0.025, 0.975))
    return MetricInterval(value, float(low), float(high))
