"""The profilers on open routing data. Not part of the repository: without it these tests skip, saying so."""

import pytest

from appliance.router.profile.linear_model import load_shipped_weights
from scripts.benchmarks.profile import Apgr, Guesser, apgr_of, by_length, by_rules, by_weights, is_right
from scripts.profile_data import FILES, LICENCES, Row, is_test_text, may_train, read_rows
from scripts.train_profile import training_rows, without
from tests.evaldata import evaluation_data


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read_rows(evaluation_data("routing"))


@pytest.fixture(scope="module")
def apgr() -> Apgr:
    return apgr_of(evaluation_data())


def _mixed(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.dataset == "mixed"]


def _measured(rows: list[Row], dataset: str, *, only_test: bool) -> list[Row]:
    return [row for row in rows if row.dataset == dataset and (row.is_test or not only_test)]


def _score(apgr: Apgr, guesser: Guesser, rows: list[Row]) -> float:
    return apgr([(row.weak, row.strong, guesser(row).complexity) for row in rows])


def test_every_file_is_read(rows: list[Row]) -> None:
    assert {row.dataset for row in rows} == set(FILES)


def test_rules_get_nineteen_in_twenty_mixed_requests_right(rows: list[Row]) -> None:
    mixed = _mixed(rows)
    assert sum(is_right(by_rules(row), row) for row in mixed) / len(mixed) >= 0.95


def test_learned_weights_get_nineteen_in_twenty_of_those_they_never_saw_right(rows: list[Row]) -> None:
    unseen = [row for row in _mixed(rows) if row.is_test]
    guesser = by_weights(load_shipped_weights())
    assert len(unseen) > 150
    assert sum(is_right(guesser(row), row) for row in unseen) / len(unseen) >= 0.95


@pytest.mark.parametrize(("dataset", "least"), [("mmlu", 0.6), ("gsm8k", 0.62), ("llmrouter", 0.69)])
def test_learned_complexity_finds_more_than_length_among_rows_it_never_saw(
    rows: list[Row], apgr: Apgr, dataset: str, least: float
) -> None:
    unseen = _measured(rows, dataset, only_test=True)
    learned = _score(apgr, by_weights(load_shipped_weights()), unseen)
    assert learned >= least
    assert learned > _score(apgr, by_length, unseen)


@pytest.mark.parametrize(("dataset", "least"), [("mmlu", 0.55), ("gsm8k", 0.59), ("llmrouter", 0.64)])
def test_complexity_by_rules_is_far_from_chance(rows: list[Row], apgr: Apgr, dataset: str, least: float) -> None:
    assert _score(apgr, by_rules, _measured(rows, dataset, only_test=False)) >= least


def test_no_text_is_both_learned_from_and_tested_on(rows: list[Row]) -> None:
    learned_from = training_rows(rows)
    assert not {row.text for row in learned_from} & {row.text for row in rows if row.is_test}
    assert all(row.dataset == "made" or row.source in LICENCES for row in learned_from)


def test_what_the_weights_say_of_their_sources_is_what_the_rows_are(rows: list[Row]) -> None:
    told = {one["name"]: one["texts"] for one in load_shipped_weights().about["sources"]}
    counts: dict[str, int] = {}
    for row in training_rows(rows):
        counts[row.source] = counts.get(row.source, 0) + 1
    assert told == counts


def test_rows_whose_licence_does_not_allow_it_are_never_learned_from(rows: list[Row]) -> None:
    learned_from = {row.source for row in rows if may_train(row)}
    assert {row.source for row in rows} - learned_from == {"agnews", "sroie", "xquad_en"}


def test_leaving_a_set_out_leaves_its_kind_out_everywhere(rows: list[Row]) -> None:
    left = without(rows, "gsm8k")
    assert not [row for row in left if row.dataset == "gsm8k" or row.kind in ("gsm8k", "agentverse-mgsm")]
    assert [row for row in left if row.dataset == "llmrouter"]
    assert not [row for row in without(rows, "llmrouter") if "llmrouter" in (row.dataset, row.source)]


def test_the_same_question_under_another_instruction_falls_on_the_same_side() -> None:
    question = "How many legs do seven spiders and nine ants have together? " * 8
    assert len({is_test_text(f"{start}\n{question}") for start in ("", "Answer briefly.", "You are kind!", "Hm.")}) == 1
