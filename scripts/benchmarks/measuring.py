"""Numbers of repeated runs: medians, ratios, percentiles, and the order in which contenders take turns. Pure."""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Contender = TypeVar("Contender")
Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Series:
    """The values of one contender's runs."""

    name: str
    values: tuple[float, ...]
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values) if self.values else math.nan

    def __str__(self) -> str:
        if not self.values:
            return "-"
        spread = f" ({shown(min(self.values))} to {shown(max(self.values))})" if len(self.values) > 1 else ""
        return f"{shown(self.median)}{spread}"


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the report: what we did, against a peer or against a bound, and what was promised.

    `ratio` is the figure that the target is about: ours over theirs, or, without a peer, our own value.
    """

    work: str
    title: str
    unit: str
    ours: Series
    theirs: Series | None
    ratio: float
    target: float | None
    better: Better = "higher"
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """None where nothing was promised, or nothing was measured."""
        if self.target is None or math.isnan(self.ratio):
            return None
        return self.ratio >= self.target if self.better == "higher" else self.ratio <= self.target


def ratio(ours: Series, theirs: Series) -> float:
    """Of the medians; nan where one is missing or nothing was done."""
    return ours.median / theirs.median if ours.values and theirs.values and theirs.median else math.nan


def turns(contenders: Sequence[Contender], runs: int) -> Iterator[tuple[int, Contender]]:
    """Who runs when: everybody once, then everybody again, so that a change of the machine hits all alike."""
    for run in range(1, runs + 1):
        for contender in contenders:
            yield run, contender


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of the values do not exceed; nan of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def gaps_within(moments: Sequence[float], start: float, stop: float) -> list[float]:
    """The pauses between consecutive moments that overlap [start, stop], whole, as a reader would feel them.

    A stream that ends with the window still open contributes the pause up to `stop`.
    """
    pauses = list(itertools.pairwise(moments))
    if moments and moments[-1] < stop:
        pauses.append((moments[-1], stop))
    return [other - one for one, other in pauses if other > start and one < stop]


def shown(value: float) -> str:
    """Three figures that matter."""
    if math.isnan(value):
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.4f}"
