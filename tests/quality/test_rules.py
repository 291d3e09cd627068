"""What labels are taken to mean."""

import random

import pytest

from appliance.quality import rules
from appliance.quality.models import SampleThreshold
from appliance.quality.rules import (
    CandidateComparison,
    combine_thresholds,
    compare_candidates,
    judge_candidate,
    select_examples,
    sign_test,
)


def side(threshold: float | None, *, enough: bool = True, rows: int = 500) -> dict[str, object]:
    return {"threshold": threshold, "is_enough": enough, "rows": rows}


@pytest.mark.parametrize(
    ("held", "live", "threshold", "reason"),
    [
        (side(0.6), side(None, enough=False, rows=0), 0.6, "below 0.600"),
        (side(0.6), side(0.8), 0.8, "below 0.800"),
        (side(0.8), side(0.6), 0.8, "below 0.800"),
        (side(None, enough=False, rows=20), side(0.7), 0.7, "below 0.700"),
        (side(None, enough=False, rows=20), side(None, enough=False, rows=3), None, "too few labels to keep 5%"),
        (side(None), side(None, enough=False, rows=3), None, "no threshold keeps 5%"),
        (side(0.6), side(None), None, "no threshold keeps 5% on 500 audited texts"),
    ],
)
def test_a_threshold_must_be_allowed_by_both_samples_and_traffic_overrules_examples(
    held: SampleThreshold, live: SampleThreshold, threshold: float | None, reason: str
) -> None:
    found = combine_thresholds({"held_out": held, "live": live}, 0.05)
    assert found.threshold == threshold
    assert reason in found.reason


def test_the_sign_test_is_the_exact_one() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 0) == pytest.approx(1 / 32)
    assert sign_test(8, 2) == pytest.approx(56 / 1024)
    assert sign_test(600, 400) < 1e-9


def test_only_texts_on_which_two_versions_differ_count() -> None:
    found = compare_candidates("aaab", serving="abba", candidate="abab", audited=[True, False, True, True])
    assert found == CandidateComparison(rows=4, won=2, lost=0, audited_won=2, audited_lost=0)


@pytest.mark.parametrize(
    ("match", "tests", "what"),
    [
        (CandidateComparison(60, 12, 1), 1, "promote"),
        (CandidateComparison(60, 12, 1, audited_won=0, audited_lost=1), 1, "wait"),
        (CandidateComparison(60, 8, 3), 1, "wait"),
        (CandidateComparison(60, 8, 3), 5, "reject"),
        (CandidateComparison(60, 1, 12), 1, "reject"),
        (CandidateComparison(60, 0, 0), 1, "wait"),
    ],
)
def test_a_candidate_serves_only_when_it_is_better(match: CandidateComparison, tests: int, what: str) -> None:
    assert judge_candidate(match, tests) == what


def test_a_candidate_that_is_no_better_is_hardly_ever_promoted() -> None:
    chance = random.Random(5)
    promoted = 0
    for _ in range(1_000):
        won = lost = 0
        for tests in range(1, rules.MOST_TESTS + 1):
            for _ in range(20):
                won, lost = (won + 1, lost) if chance.random() < 0.5 else (won, lost + 1)
            found = judge_candidate(CandidateComparison(100, won, lost), tests)
            if found != "wait":
                promoted += found == "promote"
                break
    assert promoted <= 50, "five tests together at 5 %"


def test_a_comparison_waits_for_texts_and_for_traffic() -> None:
    assert not rules.is_test_due(29, 0, 1_000)
    assert not rules.is_test_due(30, 0, 99)
    assert rules.is_test_due(30, 0, 100)
    assert not rules.is_test_due(44, 30, 100), "hardly more than at the last one"
    assert rules.is_test_due(45, 30, 100)


def test_a_fifth_of_the_texts_is_never_trained_on() -> None:
    texts = [f"text {number}" for number in range(2_000)]
    kept_out = [text for text in texts if rules.is_for_testing(text)]
    assert 340 <= len(kept_out) <= 460
    trained = select_examples([(text, "a") for text in texts], ["a", "b"])
    assert len(trained) == 2_000 - len(kept_out)
    assert not {row["text"] for row in trained} & set(kept_out)


def test_before_there_is_a_version_labels_with_one_text_are_left_out() -> None:
    rows = [(f"text {number}", "a" if number else "rare") for number in range(20)]
    assert {row["label"] for row in select_examples(rows, None)} == {"a"}
    assert {row["label"] for row in select_examples(rows, ["rare"])} <= {"rare"}


@pytest.mark.parametrize(
    ("owners", "allowed", "chosen"),
    [
        ([], None, []),
        (["one"], None, ["one"]),
        (["one", "two"], None, None),
        (["one", "two"], ["two", "three"], ["two"]),
    ],
)
def test_texts_of_several_keys_are_mixed_only_where_somebody_said_so(
    owners: list[str], allowed: list[str] | None, chosen: list[str] | None
) -> None:
    assert rules.select_owners(owners, allowed) == chosen
