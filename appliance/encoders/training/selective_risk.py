"""From which confidence on an answer may stand, so that wrong answers stay under a stated bound. Pure.

What is bounded is the share of all texts whose answer stands and disagrees with the reference. It can only fall as the
threshold rises, so the lowest threshold whose upper confidence limit is under the bound keeps the promise with the
stated confidence, over the draw of the held-out rows: the argument of risk-controlling prediction sets (Bates,
Angelopoulos, Lei, Malik, Jordan, "Distribution-free, risk-controlling prediction sets", Journal of the ACM 68, 2021).
Answers are right or wrong, so the limit is the exact one for a binomial share (Clopper, Pearson, "The use of confidence
or fiducial limits illustrated in the case of the binomial", Biometrika 26, 1934).

It promises for texts drawn as the held-out ones were, and in the long run: a short stream varies around its risk, and
exceeds a bound that is nearly used up almost every other time. Where the promise is for the next so many texts
themselves, the limit is the exact one for two samples of one population (hypergeometric): given the wrong answers of
both together, each is as likely to be held out as to come. That holds for the whole order of the scores, so for every
threshold at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypedDict

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, gammaln, logsumexp

SHOWN_BOUNDS: Final = (0.01, 0.02, 0.05, 0.10)
CONFIDENCE: Final = 0.95


class BoundRow(TypedDict):
    """A bound that is shown, and the threshold that keeps it (see RiskThreshold)."""

    bound: float
    confidence: float
    threshold: float | None
    local_share: float
    disagreement: float
    upper_limit: float


@dataclass(frozen=True, slots=True)
class RiskThreshold:
    """Answers of at least this confidence stand. `threshold` is None where no share of answers keeps the bound."""

    bound: float
    confidence: float
    threshold: float | None
    local_share: float
    """Share of the held-out texts whose answers stand."""
    disagreement: float
    """Share of the held-out texts whose answers stand and are wrong."""
    upper_limit: float
    """What that share is under, with the stated confidence."""
    rows: int


def compute_upper_limit(wrong: int, rows: int, confidence: float) -> float:
    """Clopper and Pearson's one-sided upper limit of a share, of which `wrong` in `rows` were seen."""
    if not 0 <= wrong <= rows:
        raise ValueError(f"{wrong} wrong of {rows} rows cannot be")
    if wrong == rows:
        return 1.0
    return float(betaincinv(wrong + 1, rows - wrong, confidence))


def find_threshold(
    bound: float, confidence: float, scores: Sequence[tuple[float, bool]], *, next_rows: int | None = None
) -> RiskThreshold:
    """`scores`: of each held-out row the confidence of its answer, and whether that answer was right.

    `next_rows`: the promise is that of the next so many texts no more than `bound` are answered here and wrong; None:
    that the long-run share is under the bound. `compute_upper_limit` is of the long run in both cases.
    """
    if not 0 < bound < 1 or not 0.5 <= confidence < 1:
        raise ValueError(f"bound {bound} must be between 0 and 1, confidence {confidence} from 0.5 to below 1")
    rows = len(scores)
    values = np.array([score for score, _ in scores], dtype=np.float64)
    order = np.argsort(-values, kind="stable")
    values = values[order]
    right = np.array([right for _, right in scores], dtype=bool)
    wrong = np.cumsum(~right[order])
    allowed = _most_wrong(bound, confidence, rows, next_rows)
    if allowed < 0:
        return RiskThreshold(bound, confidence, None, 0.0, 0.0, compute_upper_limit(0, rows, confidence), rows)
    # Equal scores stand or fall together, so a threshold lies only where the next score is lower.
    last_of_equals = np.flatnonzero(np.append(values[1:] < values[:-1], True))
    kept = last_of_equals[wrong[last_of_equals] <= allowed]
    if not kept.size:
        return RiskThreshold(bound, confidence, None, 0.0, 0.0, compute_upper_limit(0, rows, confidence), rows)
    place = int(kept[-1])
    count = int(wrong[place])
    return RiskThreshold(
        bound=bound,
        confidence=confidence,
        threshold=float(values[place]),
        local_share=(place + 1) / rows,
        disagreement=count / rows,
        upper_limit=compute_upper_limit(count, rows, confidence),
        rows=rows,
    )


def has_enough_rows(rows: int, bound: float, confidence: float, *, next_rows: int | None = None) -> bool:
    """Whether so many rows could keep the bound at all, were all of them right."""
    return _most_wrong(bound, confidence, rows, next_rows) >= 0


def tabulate_bounds(confidences: npt.ArrayLike, right: npt.ArrayLike) -> Sequence[BoundRow]:
    """For each bound that is shown: from which confidence on answers may stand, and what share of texts that is."""
    scores = list(zip(np.asarray(confidences).tolist(), np.asarray(right).tolist(), strict=True))
    rows: list[BoundRow] = []
    for bound in SHOWN_BOUNDS:
        found = find_threshold(bound, CONFIDENCE, scores)
        rows.append(
            {
                "bound": bound,
                "confidence": CONFIDENCE,
                "threshold": found.threshold,
                "local_share": found.local_share,
                "disagreement": found.disagreement,
                "upper_limit": found.upper_limit,
            }
        )
    return rows


def _most_wrong(bound: float, confidence: float, rows: int, next_rows: int | None) -> int:
    """The most wrong rows with which the promise still holds; -1 where even none are too few rows to make it."""
    low, high = -1, rows
    while low < high:
        middle = (low + high + 1) // 2
        if rows and _holds(middle, rows, bound, confidence, next_rows):
            low = middle
        else:
            high = middle - 1
    return low


def _holds(wrong: int, rows: int, bound: float, confidence: float, next_rows: int | None) -> bool:
    if next_rows is None:
        return compute_upper_limit(wrong, rows, confidence) <= bound
    too_many = int(bound * next_rows) + 1
    if too_many > next_rows:
        return True
    # That so few of `wrong + too_many` wrong answers were among the held-out rows, and the others are still to come.
    return _at_most(wrong, rows, wrong + too_many, rows + next_rows) <= 1 - confidence


def _at_most(wrong: int, rows: int, all_wrong: int, all_rows: int) -> float:
    """How likely it is that of `all_wrong` wrong answers among `all_rows` at most `wrong` are among `rows` of them."""
    counts = np.arange(max(0, rows - (all_rows - all_wrong)), wrong + 1)
    if not counts.size:
        return 0.0
    ways = _log_ways(all_wrong, counts) + _log_ways(all_rows - all_wrong, rows - counts)
    return float(np.exp(logsumexp(ways - _log_ways(all_rows, np.array([rows])))))


def _log_ways(of: int, taken: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The logarithm of the binomial coefficients."""
    ways: npt.NDArray[np.float64] = gammaln(of + 1) - gammaln(taken + 1) - gammaln(of - taken + 1)
    return ways
