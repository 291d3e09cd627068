"""Datasets as rows, what is asked of them, and what answers are worth."""

from pathlib import Path
from typing import Any

import orjson
import pytest

from appliance.errors import ConfigError, RequestError
from appliance.quality.evaluation.adapters import load_adapters
from appliance.quality.evaluation.client import EvalReply, EvalRequestOptions
from appliance.quality.evaluation.datasets import Dataset, pick_examples, read_dataset, sample_rows
from appliance.quality.evaluation.record import AnswerRecord, identity
from appliance.quality.evaluation.scoring import GradedRow, compare_models, score_model
from appliance.tasks.decisions import openai_shape
from appliance.tasks.extract import extraction
from tests.evaldata import evaluation_data

TOPICS = [{"text": f"text {n}", "label": ("billing", "sports")[n % 2]} for n in range(20)]
RECEIPTS = [{"id": "1", "text": "ACME 5.00", "fields": {"company": "ACME", "total": "5.00"}}]
ENTITIES = [{"text": "Ann in Rome", "tokens": [], "entities": [{"type": "person", "text": "Ann"}]}]
QUESTIONS = [{"context": "Rollo came.", "question": "Who came?", "answers": ["Rollo", "rollo"]}]


def dataset(tmp_path: Path, rows: list[dict[str, Any]]) -> Dataset:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(orjson.dumps(row) for row in rows) + b"\n")
    return read_dataset(path, load_adapters())


@pytest.mark.parametrize(
    ("rows", "adapter"),
    [
        (TOPICS, "classification"),
        (RECEIPTS, "receipts"),
        ([{"text": "for two", "requested": [], "fields": {"people": "two"}}], "slots"),
        (ENTITIES, "entities"),
        (QUESTIONS, "questions"),
    ],
)
def test_a_files_kind_is_told_by_its_rows(tmp_path: Path, rows: list[dict[str, Any]], adapter: str) -> None:
    assert dataset(tmp_path, rows).adapter.name == adapter


@pytest.mark.parametrize(
    ("part", "adapter"),
    [
        ("classification/banking77_test.jsonl", "classification"),
        ("extraction/sroie_receipts.jsonl", "receipts"),
        ("extraction/restaurant8k_test.jsonl", "slots"),
        ("extraction/wnut17_test.jsonl", "entities"),
        ("extraction/xquad_en_a.jsonl", "questions"),
    ],
)
def test_open_datasets_are_read_and_asked_about(part: str, adapter: str) -> None:
    found = read_dataset(evaluation_data(part), load_adapters())
    assert found.adapter.name == adapter and len(found.rows) > 300
    shown = pick_examples(found.rows, found.adapter, 2, seed=1)
    asking = EvalRequestOptions(found.adapter, "auto", found.labels if adapter == "classification" else (), shown)
    _, body = asking.make_body(asking.split_rows(found.rows)[0])
    # What is sent must be what the endpoints take, examples included.
    if adapter == "classification":
        openai_shape.read_decision_batch(body)
    else:
        extraction.read_extract_request(body)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"text": "a", "label": "x"}\n{"text": "b"\n', ":2 is not valid JSON"),
        (b'{"text": "a", "label": "x"}\n\n{"text": "caf\xe9", "label": "x"}\n', ":3 is not UTF-8 (byte 14)"),
        (b'{"text": "a", "label": "x"}\n{"text": "b", "name": "x"}\n', ":2 is not of kind classification"),
        (b'{"text": "a", "label": "x"}\n[1]\n', ":2 is no object"),
        (b'{"text": " ", "label": "x"}\n', ":1: text is empty"),
        (b'{"colour": "red"}\n', ":1 is of no known kind"),
        (b"", "holds no rows"),
        (b'{"text": "' + b"a" * 1_000_001 + b'", "label": "x"}\n', ":1 is longer than"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path: Path, raw: bytes, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(raw)
    with pytest.raises(RequestError) as caught:
        read_dataset(path, load_adapters())
    assert words in str(caught.value)


def test_rows_may_have_fields_that_nobody_knows_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a", "label": "x", "weight": 3}\n')
    assert len(read_dataset(path, load_adapters()).rows) == 1


def test_a_seed_draws_the_same_rows_and_examples_are_drawn_for_each_label(tmp_path: Path) -> None:
    found = dataset(tmp_path, TOPICS)
    drawn = sample_rows(found.rows, 5, seed=1)
    assert drawn == sample_rows(found.rows, 5, seed=1) != sample_rows(found.rows, 5, seed=2)
    shown = pick_examples(found.rows, found.adapter, 2, seed=1)
    assert sorted(one["label"] for one in shown) == ["billing", "billing", "sports", "sports"]


def test_an_adapter_of_ones_own_is_data(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[[adapters]]\nname = "mail"\nkind = "decision"\nfields = ["body", "folder"]\n'
        'text = "body"\ngold = "folder"\nform = "label"\nprompt = "Which folder?"\n'
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "hello", "folder": "inbox"}\n')
    found = read_dataset(rows, load_adapters(path))
    assert (found.adapter.name, found.labels) == ("mail", ["inbox"])
    for text in ("adapters = 5", '[[adapters]]\nname = "x"', "[[adapters", path.read_text().replace("form", "shape")):
        path.write_text(text)
        with pytest.raises(ConfigError):
            load_adapters(path)


def test_decisions_are_scored(tmp_path: Path) -> None:
    found = dataset(tmp_path, TOPICS)
    said = [{"answers": [{"choice": "billing", "confidence": 0.9, "label_mass": 0.5}]}] * 19
    results = [GradedRow(one, "onsite/x", 0.001, 10, 1) for one in said] + [GradedRow({"error": {"message": "full"}})]
    scored = score_model(found.adapter, found.rows, results, 2.0, found.labels)
    told = scored.report
    assert told["accuracy"]["value"] == 0.5 and told["errors"] == 1 and told["commonest_error"] == "full"
    assert told["cost_usd"] is None, "what an error cost nobody knows"
    assert (told["answers_per_second"], told["input_tokens"], told["label_mass"]) == (10.0, 190, 0.5)
    assert told["ece"] == pytest.approx(0.9 - 10 / 19)
    best = score_model(
        found.adapter,
        found.rows,
        [GradedRow({"answers": [{"choice": row["label"]}]}) for row in TOPICS],
        1,
        found.labels,
    )
    assert best.report["macro_f1"]["value"] == 1.0
    assert (
        compare_models(best, scored)["verdict"] == "better"
        and compare_models(best, best)["verdict"] == "no difference shown"
    )


def graded(tmp_path: Path, row: dict[str, Any], **said: Any) -> Any:
    found = dataset(tmp_path, [row])
    return score_model(found.adapter, found.rows, [GradedRow(said)], 1.0, ()).report


def test_objects_are_scored_field_by_field(tmp_path: Path) -> None:
    told = graded(
        tmp_path,
        RECEIPTS[0],
        object={"company": "acme.", "total": "5.00", "date": "today"},
        confidence={"/company": 0.5, "/total": 0.9, "/date": 0.0},
        not_in_text=["/date"],
    )
    assert {name: figure["value"] for name, figure in told["fields"].items()} == {
        "company": 0.0,  # not letter for letter
        "date": 0.0,
        "address": 1.0,  # none said, none there
        "total": 1.0,
    }
    assert told["micro_f1"]["value"] == pytest.approx(2 * 2 / (3 + 2))
    assert told["not_in_text"] == pytest.approx(1 / 3) and told["object_exactness"]["value"] == 0.0
    assert told["field_exactness"]["value"] == 0.5


def test_lists_are_scored_by_their_items_and_any_right_answer_counts(tmp_path: Path) -> None:
    told = graded(tmp_path, ENTITIES[0], object={"person": ["Ann", "Bob"], "location": []})
    assert told["precision"] == 0.5 and told["recall"] == 1.0
    told = graded(tmp_path, QUESTIONS[0], object={"answer": "Rollo"})
    assert told["object_exactness"]["value"] == 1.0 and told["token_f1"]["value"] == 1.0
    told = graded(tmp_path, QUESTIONS[0], object={"answer": "the Rollo"})
    assert told["object_exactness"]["value"] == 0.0 and told["token_f1"]["value"] == pytest.approx(2 / 3)
    told = graded(tmp_path, QUESTIONS[0], error={"message": "too long"})
    assert told["field_exactness"]["value"] == 0.0


def test_a_run_that_was_stopped_goes_on_with_its_answers(tmp_path: Path) -> None:
    found = dataset(tmp_path, TOPICS)
    asking, path = EvalRequestOptions(found.adapter, "onsite/x", found.labels), tmp_path / "answers.jsonl"
    record = AnswerRecord(path)
    good, bad = (
        GradedRow({"answers": [{"choice": "billing"}]}, "onsite/x", 0.1, 5, 1),
        GradedRow({"error": {"message": "no"}}),
    )
    record.add(asking, EvalReply(found.rows[:2], [good, bad], 1.5))
    record.add(asking, EvalReply(found.rows[2:3], [good], 2.5))
    with path.open("ab") as file:
        file.write(b'{"key": "cut sh')
    again = AnswerRecord(path)
    assert again.known(asking, found.rows) == {0: good, 2: good}, "what failed is asked again"
    assert again.seconds(asking) == 2.5
    other = EvalRequestOptions(found.adapter, "onsite/y", found.labels)
    assert again.known(other, found.rows) == {} and identity(other) != identity(asking)
    path.write_text("something else\n")
    with pytest.raises(RequestError, match="holds no answers"):
        AnswerRecord(path)
