"""Choosing among targets by weights instead of by order. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from appliance.config import RouteScore
from appliance.core import Target


@dataclass(frozen=True, slots=True)
class TargetFigures:
    """What a score is made of, for one target."""

    first_byte_seconds: float
    usd: float
    quality: float | None


def rank_by_score(
    targets: Sequence[Target], figures: Mapping[str, TargetFigures], weights: RouteScore, budget_seconds: float
) -> list[tuple[Target, str]]:
    """The targets, best first, each with its score in words. Equal scores keep their order.

    Each part lies between 0 and 1: quality as declared (none counts as 0), latency as the share of the budget that is
    left, cost as the share of the dearest target's price that is saved.
    """
    dearest = max((figures[target.name].usd for target in targets), default=0.0)
    scored = [(_score(figures[target.name], weights, budget_seconds, dearest), target) for target in targets]
    scored.sort(key=lambda pair: -pair[0])
    return [(target, _words(score, figures[target.name])) for score, target in scored]


def _score(figures: TargetFigures, weights: RouteScore, budget_seconds: float, dearest_usd: float) -> float:
    latency = max(0.0, 1.0 - figures.first_byte_seconds / budget_seconds)
    cost = 1.0 - figures.usd / dearest_usd if dearest_usd > 0 else 1.0
    total = weights.latency * latency + weights.quality * (figures.quality or 0.0) + weights.cost * cost
    return total / (weights.latency + weights.quality + weights.cost)


def _words(score: float, figures: TargetFigures) -> str:
    quality = "no quality declared" if figures.quality is None else f"quality {figures.quality:g}"
    return f"score {score:.2f} ({quality}, {figures.first_byte_seconds:.2f} s, {figures.usd:.6f} USD)"
