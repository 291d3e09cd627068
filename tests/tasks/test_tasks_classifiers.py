"""Decisions that a trained classifier answers."""

from dataclasses import replace
from typing import Any

import orjson
import pytest

from appliance.core import Target, UpstreamReply, Usage
from appliance.errors import BackendGarbage, RequestError, Unsupported
from appliance.tasks.decisions import decision_results, openai_shape, systemone

MAIL = Target(
    name="classifier/mail",
    location="onsite",
    dialect="openai",
    address="unix:/nowhere",
    model="mail",
    abilities=frozenset({"classify", "decisions"}),
)
SHARES = [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]


def reply(rows: Any = None, labels: Any = ("a", "b", "c"), strange: float = -0.5) -> UpstreamReply:
    rows = SHARES[:1] if rows is None else rows
    payload = {"labels": list(labels), "probabilities": rows, "out_of_scope": [strange] * len(rows), "model": "mail"}
    return UpstreamReply(payload, Usage(5, 0), 0.1, 0.1)


def choice(*values: str, **more: Any) -> dict[str, Any]:
    return {"type": "choice", "instructions": "Which?", "choices": [{"value": value} for value in values], **more}


def answered(body: dict[str, Any], given: UpstreamReply) -> Any:
    _, (call,) = openai_shape.read_decision_request({"model": "classifier/mail", "input": "hello", **body})
    (outgoing,) = call.outgoing(MAIL)
    assert (outgoing.path, outgoing.body) == ("/classify", {"texts": ["hello"]})
    return call.read(MAIL, [given]).payload


@pytest.mark.parametrize("body", [{}, {"questions": [{"type": "choice", "instructions": "Which?"}]}])
def test_a_question_may_leave_the_choices_to_the_classifier(body: dict[str, Any]) -> None:
    told = answered(body, reply())
    assert told["model"] == "classifier/mail"
    (answer,) = told["answers"]
    assert (answer["choice"], answer["confidence"]) == ("a", 0.7)
    assert [row["value"] for row in answer["probabilities"]] == ["a", "b", "c"]


def test_some_of_the_labels_share_the_whole_probability_in_the_order_asked() -> None:
    (answer,) = answered({"questions": [choice("c", "b", name="kind")]}, reply())["answers"]
    assert answer["name"] == "kind"
    assert [row["value"] for row in answer["probabilities"]] == ["c", "b"]
    assert [row["probability"] for row in answer["probabilities"]] == pytest.approx([1 / 3, 2 / 3])


def test_a_choice_that_is_no_label_is_named_with_those_there_are() -> None:
    with pytest.raises(Unsupported, match="'x' is not a label of classifier/mail, which has 'a', 'b', 'c'"):
        answered({"questions": [choice("a", "x")]}, reply())


def test_a_text_like_nothing_known_is_unsure() -> None:
    (answer,) = answered({}, reply(strange=0.25))["answers"]
    assert (answer["unsure"], answer["out_of_scope"], answer["out_of_scope_score"]) == (True, True, 0.25)
    (known,) = answered({}, reply())["answers"]
    assert "unsure" not in known


@pytest.mark.parametrize(
    "questions",
    [
        [{"type": "predicate", "instructions": "Is it?"}],
        [choice("a", "b"), choice("b", "c")],
        [{"type": "score", "instructions": "How?", "levels": [{"label": "x"}, {"label": "y"}]}],
    ],
)
def test_other_questions_are_for_other_models(questions: list[Any]) -> None:
    _, (call,) = openai_shape.read_decision_request({"model": "classifier/mail", "input": "x", "questions": questions})
    with pytest.raises(Unsupported, match="one question, a choice among its labels"):
        call.outgoing(MAIL)


def test_other_models_still_need_their_questions() -> None:
    with pytest.raises(RequestError, match="questions is missing"):
        openai_shape.read_decision_request({"model": "auto", "input": "x"})


def test_a_batch_goes_in_large_pieces_and_comes_back_in_order() -> None:
    _, calls = openai_shape.read_decision_batch(
        {"model": "classifier/mail", "inputs": [f"text {n}" for n in range(2_500)]}
    )
    assert [len(call.inputs) for call in calls] == [1_024, 1_024, 452]
    _, calls = openai_shape.read_decision_batch({"model": "classifier/mail", "inputs": ["x", "y"]})
    question_result = calls[0].read(MAIL, [reply(SHARES)])
    told = openai_shape.make_batch_payload([question_result], calls)
    assert [row["answers"][0]["choice"] for row in told["results"]] == ["a", "c"]


def test_many_labels_are_written_as_few_are() -> None:
    labels = [f'label {n} is 100% "quoted" or not, é' for n in range(40)]
    shares = [[(n + place) / 1_000 for n in range(40)] for place in range(3)]
    _, calls = openai_shape.read_decision_batch({"model": "classifier/mail", "inputs": ["x", "y", "z"]})
    question_result = calls[0].read(MAIL, [reply(shares, labels)])
    told = orjson.loads(orjson.dumps(openai_shape.make_batch_payload([question_result], calls)))
    one_by_one = [
        decision_results.make_openai_payload(replace(question_result, rows=(row,)), calls[0].questions)
        for row in question_result.rows
    ]
    assert [row["answers"] for row in told["results"]] == [payload["answers"] for payload in one_by_one]
    assert [row["answers"][0]["choice"] for row in told["results"]] == [labels[-1]] * 3


def test_systemone_asks_a_classifier_too() -> None:
    _, (call,) = systemone.read_systemone_request({"model": "classifier/mail", "state": "hello"})
    told = call.read(MAIL, [reply()]).payload
    assert told["answers"]["label"]["probabilities"] == {"a": 0.7, "b": 0.2, "c": 0.1}
    questions = {"kind": {"type": "choice", "instructions": "Which?", "criteria": {"a": None, "c": None}}}
    _, (call,) = systemone.read_systemone_request(
        {"model": "classifier/mail", "state": "hello", "questions": questions}
    )
    assert call.read(MAIL, [reply()]).payload["answers"]["kind"]["probabilities"] == pytest.approx(
        {"a": 0.875, "c": 0.125}
    )


@pytest.mark.parametrize(
    "payload",
    [
        None,
        {},
        {"labels": ["a"], "probabilities": [], "out_of_scope": []},
        {"labels": ["a", "b"], "probabilities": [[1.0]], "out_of_scope": [0.0]},
    ],
)
def test_a_broken_reply_is_garbage(payload: Any) -> None:
    _, (call,) = openai_shape.read_decision_request({"model": "classifier/mail", "input": "x"})
    with pytest.raises(BackendGarbage):
        call.read(MAIL, [UpstreamReply(payload, Usage(), 0.1, 0.1)])
