"""Thresholds that keep a bound."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.encoders.training.selective_risk import compute_upper_limit, find_threshold


def test_the_upper_limit_is_that_of_the_exact_binomial() -> None:
    # No wrong in n rows: (1 - limit)^n = 1 - confidence.
    assert compute_upper_limit(0, 59, 0.95) == pytest.approx(1 - 0.05 ** (1 / 59))
    assert compute_upper_limit(5, 100, 0.95) == pytest.approx(0.10225, abs=1e-4)
    assert compute_upper_limit(7, 7, 0.95) == 1.0


def test_too_few_rows_keep_no_bound_however_right_they_are() -> None:
    assert find_threshold(0.05, 0.95, [(0.9, True)] * 58).threshold is None
    assert find_threshold(0.05, 0.95, [(0.9, True)] * 59).threshold == 0.9
    assert find_threshold(0.05, 0.95, []).threshold is None


def test_the_lowest_threshold_that_keeps_the_bound_is_taken_and_equal_scores_stand_together() -> None:
    sure = [(0.9, True)] * 900
    found = find_threshold(0.05, 0.95, [*sure, *[(0.5, False)] * 100])
    assert (found.threshold, found.local_share, found.disagreement) == (0.9, 0.9, 0.0)
    found = find_threshold(0.15, 0.95, [*sure, *[(0.5, False)] * 100])
    assert (found.threshold, found.local_share, found.disagreement) == (0.5, 1.0, 0.1)
    assert found.upper_limit < 0.15


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=200), st.floats(0.01, 0.4))
def test_what_is_promised_holds_for_the_rows_themselves(scores: list[tuple[float, bool]], bound: float) -> None:
    found = find_threshold(bound, 0.9, scores)
    if found.threshold is not None:
        wrong = sum(score >= found.threshold and not right for score, right in scores)
        assert compute_upper_limit(wrong, len(scores), 0.9) <= bound
        assert found.local_share == sum(score >= found.threshold for score, _ in scores) / len(scores)


def test_a_threshold_keeps_its_bound_on_new_rows_as_often_as_it_promises() -> None:
    # Confidence is the true probability, so the risk of every threshold is known: the mean of (1 - p) above it.
    chance = np.random.default_rng(7)
    truth = chance.beta(4, 1, size=200_000)
    broken = 0
    for _ in range(200):
        shares = chance.beta(4, 1, size=800)
        right = chance.random(800) < shares
        found = find_threshold(0.05, 0.95, list(zip(shares.tolist(), right.tolist(), strict=True)))
        assert found.threshold is not None
        broken += float((1 - truth[truth >= found.threshold]).sum() / truth.size) > 0.05
    assert broken <= 18  # 10 are expected of 200 at most; 18 or fewer come with a probability of 99 %


def test_a_promise_for_the_next_texts_is_kept_by_the_texts_themselves() -> None:
    chance = np.random.default_rng(3)
    broken, long_run_broken, share = 0, 0, 0.0
    for _ in range(200):
        shares = chance.beta(4, 1, size=1_400)
        right = chance.random(1_400) < shares
        held = list(zip(shares[:1_000].tolist(), right[:1_000].tolist(), strict=True))
        coming, coming_right = shares[1_000:], right[1_000:]
        found = find_threshold(0.05, 0.95, held, next_rows=400)
        assert found.threshold is not None
        broken += ((coming >= found.threshold) & ~coming_right).mean() > 0.05
        share += found.local_share / 200
        loose = find_threshold(0.05, 0.95, held).threshold
        long_run_broken += ((coming >= (loose or 2)) & ~coming_right).mean() > 0.05
    assert broken <= 18  # 10 are expected at most
    assert long_run_broken > broken, "what holds in the long run is broken by more of the short streams"
    assert share > 0.3


@pytest.mark.parametrize(("bound", "confidence"), [(0.0, 0.95), (1.0, 0.95), (0.05, 1.0), (0.05, 0.2)])
def test_a_bound_or_a_confidence_that_cannot_be_is_refused(bound: float, confidence: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        find_threshold(bound, confidence, [(1.0, True)])
