"""Labelled examples as people send them."""

import json
from typing import Any

import pytest

from appliance.encoders.training.examples import MAX_LABELS, MAX_LINE_CHARS, read_examples
from appliance.errors import RequestError

GOOD = [{"text": f"{word} {number}", "label": word} for word in ("a", "b") for number in range(3)]


def refused(given: Any, format: str | None = None, labels: list[str] | None = None) -> str:
    with pytest.raises(RequestError) as caught:
        read_examples(given, format, labels, at_least=2)
    return caught.value.message


def test_a_list_json_lines_and_csv_come_to_the_same() -> None:
    lines = "\n".join(json.dumps(row) for row in GOOD)
    table = "Label;Text\n" + "\n".join(f"{row['label']};{row['text']}" for row in GOOD)
    expected = read_examples(GOOD, None, None)
    for found in (read_examples(lines, "jsonl", None), read_examples(table, "csv", None)):
        assert found.texts == expected.texts
        assert found.labels == ("a", "b")
        assert found.truth.tolist() == expected.truth.tolist() == [0, 0, 0, 1, 1, 1]


def test_contradictory_and_repeated_texts_are_left_out_and_said() -> None:
    found = read_examples([*GOOD, {"text": "a 0", "label": "b"}, GOOD[1]], None, None, at_least=2)
    assert "a 0" not in found.texts
    assert len(found.texts) == 5
    assert found.notes[0] == "1 texts came under more than one label and were left out"
    assert "2 rows repeated a text" in found.notes[1]


def test_one_label_alone_teaches_nothing() -> None:
    assert "needs at least two" in refused(GOOD[:3])


def test_a_label_with_one_example_is_named() -> None:
    assert "'c' (1)" in refused([*GOOD, {"text": "c", "label": "c"}])


def test_50_000_labels_are_refused_with_the_limit() -> None:
    rows = [{"text": f"t {number}", "label": f"l {number // 2}"} for number in range(100_000)]
    told = refused(rows)
    assert "50000 labels" in told
    assert str(MAX_LABELS) in told


def test_a_label_that_was_not_announced_is_named() -> None:
    assert "'b', which is not among the labels" in refused(GOOD, labels=["a", "c"])


def test_broken_and_endless_lines_are_named_by_number() -> None:
    lines = [json.dumps(row) for row in GOOD]
    assert "line 4 is not JSON" in refused("\n".join([*lines[:3], "{broken", *lines[3:]]), "jsonl")
    endless = json.dumps({"text": "x" * 1_000_000, "label": "a"})
    assert f"at most {MAX_LINE_CHARS}" in refused("\n".join([*lines, endless]), "jsonl")
    assert "line 3 has 3 columns" in refused("text,label\nfine,a\nno, quotes,a\n", "csv")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "no examples"),
        (7, "must be a list"),
        ([{"text": "x"}], "has no label"),
        ([{"text": " ", "label": "a"}], "has no text"),
        (["x"], "is no object"),
        ([{"text": "x" * 30_000, "label": "a"}], "at most 20000"),
    ],
)
def test_rows_that_are_no_examples_say_what_is_missing(given: Any, told: str) -> None:
    assert told in refused(given)


def test_a_csv_file_without_the_two_columns_says_which_it_has() -> None:
    assert "names the columns a, b" in refused("a,b\n1,2\n", "csv")
