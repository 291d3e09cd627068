"""What to make of labels: whether a threshold is known, whether a candidate is better, when to train. Pure.

Every fifth labelled text, by its digest, is never trained on: versions are compared on those, which no version has
seen. A comparison counts only the texts on which the two differ; were they equally good, each would win such a text as
often as the other (McNemar, "Note on the sampling error of the difference between correlated proportions or
percentages", Psychometrika 12, 1947; here the exact binomial form). It is made at most MOST_TESTS times for a
candidate, each at SIGNIFICANCE / MOST_TESTS, so that all of them together promote one that is no better at most that
often (Bonferroni).
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal

from appliance.quality.models import ThresholdReply
from appliance.tasks.classify.cascade import CascadeThresholds

SIGNIFICANCE: Final = 0.05
MOST_TESTS: Final = 5
LEAST_TEST_ROWS: Final = 30
"""Fewer texts never show a difference."""
LEAST_SHADOW_TEXTS: Final = 100
"""Real traffic that a candidate must have seen first."""
_GROWTH: Final = 1.5
"""By how much the texts to compare on must have grown before it is worth looking again."""
_TEST_SHARE: Final = 5
_LEAST: Final = 2
"""Texts of a label, to be learned at all."""

Verdict = Literal["promote", "reject", "wait"]


def is_for_testing(text: str) -> bool:
    """Whether a text is kept out of every training. The same text always is, or never."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).digest()[0] % _TEST_SHARE == 0


def combine_thresholds(reply: ThresholdReply, bound: float) -> CascadeThresholds:
    """The threshold that both samples allow: held-out rows of the training, and audited traffic as soon as it suffices.

    `reply` is the encoder program's answer. Held-out rows alone promise only for traffic like the examples; audited
    traffic overrules them, and where it allows no threshold there is none.
    """
    held, live = reply["held_out"], reply["live"]
    rows = f"{held['rows']} held-out and {live['rows']} audited texts"
    if live["is_enough"] and live["threshold"] is None:
        return CascadeThresholds(None, f"no threshold keeps {bound:.0%} on {live['rows']} audited texts")
    found = [one["threshold"] for one in (held, live) if one["is_enough"] and one["threshold"] is not None]
    if not live["is_enough"] and held["threshold"] is None:
        why = "no threshold keeps" if held["is_enough"] else "too few labels to keep"
        return CascadeThresholds(None, f"{why} {bound:.0%}: {rows}")
    threshold = max(found)
    return CascadeThresholds(threshold, f"below {threshold:.3f} by {rows}")


@dataclass(frozen=True, slots=True)
class CandidateComparison:
    """A candidate against the serving version, on texts that neither has seen."""

    rows: int
    won: int
    """The candidate alone was right."""
    lost: int
    """The serving version alone was right."""
    audited_won: int = 0
    audited_lost: int = 0
    """The same of the texts that were drawn by chance, sure or unsure."""

    @property
    def p_value(self) -> float:
        return sign_test(self.won, self.lost)

    def __str__(self) -> str:
        return f"won {self.won} and lost {self.lost} of {self.rows} unseen texts, p = {self.p_value:.3g}"


def sign_test(won: int, lost: int) -> float:
    """How likely so many wins or more are, were wins and losses equally likely: one-sided, exact."""
    total = won + lost
    ways = sum(math.comb(total, wins) for wins in range(won, total + 1))
    return float(Fraction(ways, 2**total))


def compare_candidates(
    truth: Sequence[str], serving: Sequence[str], candidate: Sequence[str], audited: Sequence[bool]
) -> CandidateComparison:
    pairs = [
        (ours == right, theirs == right, drawn)
        for right, theirs, ours, drawn in zip(truth, serving, candidate, audited, strict=True)
    ]
    return CandidateComparison(
        rows=len(pairs),
        won=sum(ours and not theirs for ours, theirs, _ in pairs),
        lost=sum(theirs and not ours for ours, theirs, _ in pairs),
        audited_won=sum(ours and not theirs and drawn for ours, theirs, drawn in pairs),
        audited_lost=sum(theirs and not ours and drawn for ours, theirs, drawn in pairs),
    )


def is_test_due(rows: int, tested_rows: int, shadow_texts: int) -> bool:
    return rows >= max(LEAST_TEST_ROWS, _GROWTH * tested_rows) and shadow_texts >= LEAST_SHADOW_TEXTS


def judge_candidate(match: CandidateComparison, tests: int) -> Verdict:
    """`tests`: how many there were, this one included. Labels come mostly from texts that the serving version was
    unsure of, so a candidate must not lose among those drawn by chance either."""
    level = SIGNIFICANCE / MOST_TESTS
    if match.p_value <= level and match.audited_won >= match.audited_lost:
        return "promote"
    if tests >= MOST_TESTS or sign_test(match.lost, match.won) <= level:
        return "reject"
    return "wait"


def is_training_due(examples: int, examples_trained: int, learn_after: int | None) -> bool:
    return learn_after is not None and examples - examples_trained >= learn_after


def select_owners(owners: Sequence[str], allowed: Sequence[str] | None) -> Sequence[str] | None:
    """Whose texts go into one classifier; None where several keys have some and no setting lets them be mixed."""
    if allowed is not None:
        return [owner for owner in owners if owner in allowed]
    return owners if len(owners) <= 1 else None


def select_examples(rows: Sequence[tuple[str, str]], labels: Sequence[str] | None) -> Sequence[Mapping[str, str]]:
    """Examples (text, label) as a training takes them: of the labels that serve already, or, before there is a version,
    of those that have two texts."""
    seen = [(text, label) for text, label in rows if not is_for_testing(text)]
    counts = Counter(label for _, label in seen)
    known = set(labels) if labels is not None else {label for label, count in counts.items() if count >= _LEAST}
    return [{"text": text, "label": label} for text, label in seen if label in known]
