"""Decisions in both wire formats: limits, prompts for engines, requests for hosted targets, answers."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
from openai.types import Decision

from appliance.core import Usage
from appliance.errors import ApplianceError, BackendGarbage, BackendOverloaded, ContextTooLong, Unsupported
from appliance.tasks.decisions import openai_shape, systemone
from appliance.tasks.decisions.decision_results import DecisionResult
from appliance.tasks.decisions.label_prompts import list_labels
from appliance.tasks.decisions.openai_shape import make_batch_payload
from appliance.tasks.decisions.questions import Option, Question, read_questions
from tests.tasks.rows import LOCAL, hosted, refusal, reply

TRUE: dict[str, Any] = {"type": "predicate", "name": "urgent", "instructions": "The writer wants an answer today."}
TOPIC: dict[str, Any] = {
    "type": "choice",
    "name": "topic",
    "instructions": "What is it about?",
    "choices": [{"value": "billing", "description": "Invoices and refunds"}, {"value": "sports"}],
}
MOOD: dict[str, Any] = {
    "type": "score",
    "name": "mood",
    "instructions": "How angry is the writer?",
    "levels": [{"label": "calm"}, {"label": "annoyed"}, {"label": "furious"}],
}
ALL = [TRUE, TOPIC, MOOD]


def scored(labels: Mapping[str, float], mass: float = 0.9) -> dict[str, Any]:
    """An engine's result for one item, from the labels' probabilities."""
    rows = [
        {"label": label, "logprob": math.log(share * mass) if share else None, "probability": share}
        for label, share in labels.items()
    ]
    return {"labels": rows, "label_mass": mass, "prompt_tokens": 10, "cached_tokens": 4}


def choices(count: int) -> dict[str, Any]:
    return {**TOPIC, "choices": [{"value": f"option {n}"} for n in range(count)]}


def test_one_text_and_several_questions_share_the_text_as_prefix() -> None:
    _, (call,) = openai_shape.read_decision_request({"input": "Pay me now!", "questions": ALL})
    (outgoing,) = call.outgoing(LOCAL)
    assert outgoing.path == "/labels"
    (system,) = outgoing.body["messages"]
    assert system["role"] == "system" and "Pay me now!" in system["content"]
    assert [outgoing.body["label_sets"][item["labels"]] for item in outgoing.body["items"]] == [
        ["yes", "no"],
        ["billing", "sports"],
        ["calm", "annoyed", "furious"],
    ]
    assert "- billing: Invoices and refunds" in outgoing.body["items"][1]["content"]


def test_one_question_comes_first_so_that_texts_share_it_as_prefix() -> None:
    _, (call,) = openai_shape.read_decision_batch({"inputs": ["one", "two"], "questions": [TOPIC]})
    (outgoing,) = call.outgoing(LOCAL)
    (system,) = outgoing.body["messages"]
    assert "What is it about?" in system["content"]
    assert [item["content"] for item in outgoing.body["items"]] == ["one", "two"]


def test_a_batch_keeps_one_layout_whatever_chunk_a_text_falls_into() -> None:
    _, calls = openai_shape.read_decision_batch({"inputs": ["text"] * 65, "questions": ALL})
    assert sum(len(call.inputs) for call in calls) == 65 and len(calls) > 2
    assert {call.question_first for call in calls} == {True}
    (outgoing,) = calls[-1].outgoing(LOCAL)
    assert outgoing.body["items"][0]["messages"][1] == {"role": "user", "content": "text"}


def test_a_batch_is_cut_by_tokens_and_a_text_longer_than_a_chunk_stands_alone() -> None:
    texts = ["short"] * 40 + ["word " * 5000] + ["short"]
    _, calls = openai_shape.read_decision_batch({"inputs": texts, "questions": [TOPIC]})
    assert [len(call.inputs) for call in calls] == [32, 8, 1, 1]
    assert calls[2].longest_prompt_tokens > 5000 > calls[0].prompt_tokens > 32 * calls[0].longest_prompt_tokens - 33


def test_a_text_that_no_context_holds_does_not_make_its_batch_look_impossible() -> None:
    _, calls = openai_shape.read_decision_batch({"inputs": ["short", "word " * 50_000, "short"], "questions": [TOPIC]})
    assert max(call.prompt_tokens for call in calls) <= openai_shape.TOKENS_PER_CALL
    _, (alone,) = openai_shape.read_decision_request({"input": "word " * 50_000, "questions": [TOPIC]})
    assert alone.prompt_tokens > 50_000


def test_many_questions_make_smaller_chunks() -> None:
    questions = [{**TRUE, "name": f"q{n}"} for n in range(400)]
    _, calls = openai_shape.read_decision_batch({"inputs": ["text"] * 3, "questions": questions})
    assert [len(call.inputs) for call in calls] == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        (("true", "false"), ("true", "false")),
        ((True, False), ("true", "false")),
        ((True, "true", "no"), ("1", "2", "3")),
        (("US", "us"), ("1", "2")),
        (("a" * 41, "b"), ("1", "2")),
        ((" padded ", "plain"), ("padded", "plain")),
    ],
)
def test_labels_can_always_be_told_apart(options: tuple[str | bool, ...], labels: tuple[str, ...]) -> None:
    question = Question("choice", None, "?", tuple(Option(option) for option in options))
    assert list_labels(question) == labels


def test_values_that_read_alike_are_shown_apart_and_answered_with_their_type() -> None:
    typed = {**TOPIC, "choices": [{"value": "true"}, {"value": True}]}
    _, (call,) = openai_shape.read_decision_request({"input": "x", "questions": [typed]})
    (outgoing,) = call.outgoing(LOCAL)
    shown = outgoing.body["messages"][0]["content"]
    assert '- 1: "true"' in shown and "- 2: true (not the word)" in shown
    payload = call.read(LOCAL, [reply({"results": [scored({"1": 0.1, "2": 0.9})]})]).payload
    assert payload["answers"][0]["choice"] is True
    assert [row["value"] for row in payload["answers"][0]["probabilities"]] == ["true", True]


def test_answers_are_what_the_official_sdk_reads() -> None:
    _, (call,) = openai_shape.read_decision_request({"input": "Pay me now!", "questions": ALL})
    results = [
        scored({"yes": 0.8, "no": 0.2}, mass=0.5),
        scored({"billing": 0.75, "sports": 0.25}),
        scored({"calm": 0.0, "annoyed": 0.5, "furious": 0.5}),
    ]
    payload = call.read(LOCAL, [reply({"results": results}, Usage(100, 3, 40))]).payload
    decision = Decision.model_validate(payload, strict=True)
    urgent, topic, mood = decision.answers
    assert urgent.type == "predicate" and urgent.probability == pytest.approx(0.8)
    assert topic.type == "choice" and topic.choice == "billing" and topic.confidence == pytest.approx(0.75)
    assert mood.type == "score" and mood.score == pytest.approx(1.5) and mood.confidence == pytest.approx(0.5)
    assert [(row.value, row.label) for row in mood.probabilities] == [(0, "calm"), (1, "annoyed"), (2, "furious")]
    assert payload["answers"][0]["label_mass"] == 0.5
    assert decision.usage.input_tokens_details.cached_tokens == 40
    assert decision.usage.total_tokens == 103
    assert decision.model == "small"


def test_a_target_that_speaks_decisions_gets_the_body_as_it_came() -> None:
    body = {"model": "auto", "input": "Pay me now!", "questions": ALL, "prompt_cache_key": "k", "x_new": 1}
    _, (call,) = openai_shape.read_decision_request(body)
    (outgoing,) = call.outgoing(hosted("chat", "decisions"))
    assert outgoing.path == "/decisions"
    assert outgoing.body == {"input": "Pay me now!", "questions": ALL, "prompt_cache_key": "k", "x_new": 1}


def test_a_hosted_answer_is_checked_and_keeps_no_local_score() -> None:
    _, (call,) = openai_shape.read_decision_request({"input": "x", "questions": ALL})
    answers = [
        {"type": "predicate", "name": "urgent", "probability": 0.9},
        {"type": "refusal", "name": "topic"},
        {"type": "score", "probabilities": [{"value": 2, "label": "furious", "probability": 1.0}]},
    ]
    payload = call.read(hosted("decisions"), [reply({"answers": answers}, Usage(7, 0))]).payload
    assert payload["answers"][0] == {
        "type": "predicate",
        "name": "urgent",
        "probability": 0.9,
        "label_mass": None,
    }
    assert payload["answers"][1] == {"type": "refusal", "name": "topic"}
    assert payload["answers"][2]["score"] == 2.0


@pytest.mark.parametrize(
    "payload",
    [
        None,
        {},
        {"answers": []},
        {"answers": [{"type": "choice"}]},
        {"answers": [{"type": "predicate", "probability": 1.5}]},
        {"answers": [{"type": "predicate", "probability": True}]},
        {"answers": ["yes"]},
    ],
)
def test_a_hosted_answer_that_is_not_one_is_garbage(payload: Any) -> None:
    _, (call,) = openai_shape.read_decision_request({"input": "x", "questions": [TRUE]})
    with pytest.raises(BackendGarbage):
        call.read(hosted("decisions"), [reply(payload)])


def test_a_target_that_can_do_neither_is_not_asked() -> None:
    _, (call,) = openai_shape.read_decision_request({"input": "x", "questions": [TRUE]})
    with pytest.raises(Unsupported, match="acme/large cannot answer decisions"):
        call.outgoing(hosted("chat"))


def test_an_image_goes_to_no_target_that_scores_labels() -> None:
    message = {"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AA=="}]}
    asked, (call,) = openai_shape.read_decision_request({"input": [message], "questions": [TRUE]})
    assert asked.needs == {"vision"}
    with pytest.raises(Unsupported, match="images"):
        call.outgoing(LOCAL)
    assert call.outgoing(hosted("decisions", "vision"))[0].body["input"] == [message]


def test_messages_calls_and_json_are_rendered_as_text_in_order() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Where is my order?"}]},
        {"type": "function_call", "call_id": "1", "name": "find", "arguments": '{"id": 7}'},
        {"type": "function_call_output", "call_id": "1", "output": "lost"},
        {"role": "user", "content": [{"type": "input_json", "data": {"order": 7}}]},
    ]
    asked, (call,) = openai_shape.read_decision_request({"input": items, "questions": [TRUE]})
    assert call.inputs[0].text == (
        'user: Where is my order?\nassistant: find({"id": 7})\ntool: lost\nuser: {"order":7}'
    )
    assert "The writer wants an answer today." in asked.text and "lost" in asked.text


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"questions": None}, "questions", "missing"),
        ({"questions": []}, "questions", "0 questions"),
        ({"questions": [TRUE] * 401}, "questions", "401"),
        ({"questions": {}}, "questions", "list"),
        ({"questions": [5]}, "questions[0]", "5"),
        ({"questions": [{**TRUE, "type": "noul"}]}, "questions[0].type", "'noul'"),
        ({"questions": [{**TRUE, "name": 5}]}, "questions[0].name", "5"),
        ({"questions": [TRUE, TRUE]}, "questions[1].name", "'urgent'"),
        ({"questions": [{"type": "predicate"}]}, "questions[0].instructions", "missing"),
        ({"questions": [{**TRUE, "instructions": " "}]}, "questions[0].instructions", "empty"),
        ({"questions": [choices(0)]}, "questions[0].choices", "0 choices"),
        ({"questions": [choices(1)]}, "questions[0].choices", "1 choices"),
        ({"questions": [choices(256)]}, "questions[0].choices", "256 choices: it must have 2 to 255"),
        (
            {"questions": [{**TOPIC, "choices": [{"value": "a"}, {"value": "a"}]}]},
            "questions[0].choices[1]",
            "'a'",
        ),
        ({"questions": [{**TOPIC, "choices": [{"value": "a"}, {"value": 5}]}]}, "questions[0].choices[1].value", "5"),
        ({"questions": [{**TOPIC, "choices": [{"value": "a"}, {"value": ""}]}]}, "questions[0].choices[1]", "empty"),
        ({"questions": [{**TOPIC, "choices": None}]}, "questions[0].choices", "missing"),
        ({"questions": [{**MOOD, "levels": [{"label": "a"}]}]}, "questions[0].levels", "1 levels"),
        ({"questions": [{**MOOD, "levels": [{"label": str(n)} for n in range(11)]}]}, "questions[0].levels", "11"),
        ({"input": ""}, "input", "empty"),
        ({"input": []}, "input", "empty"),
        ({"input": 5}, "input", "5"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "'robot'"),
        ({"input": [{"role": "user", "content": [{"type": "video"}]}]}, "input[0].content[0].type", "'video'"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].arguments", "None"),
    ],
)
def test_a_wrong_decisions_field_is_refused_by_name(change: dict[str, Any], param: str, words: str) -> None:
    error = refusal(openai_shape.read_decision_request, {"input": "text", "questions": [TRUE], **change})
    assert error.param == param
    assert words in error.message


def test_255_choices_are_taken() -> None:
    (question,) = read_questions({"questions": [choices(255)]})
    assert len(list_labels(question)) == 255


@pytest.mark.parametrize(
    ("read", "body", "belongs_to"),
    [
        (openai_shape.read_decision_request, {"state": "x", "questions": {}}, "/v1/systemone"),
        (openai_shape.read_decision_request, {"inputs": ["x"], "questions": []}, "/v1/decisions/batch"),
        (openai_shape.read_decision_batch, {"input": "x", "questions": []}, "/v1/decisions"),
        (systemone.read_systemone_request, {"input": "x", "questions": []}, "/v1/decisions"),
    ],
)
def test_a_body_for_another_endpoint_is_told_so(read: Any, body: dict[str, Any], belongs_to: str) -> None:
    assert f"belongs to {belongs_to}" in refusal(read, body).message


@pytest.mark.parametrize(
    ("inputs", "words"), [([], "0 inputs"), (["x"] * 10_001, "10001"), ([5], "5"), (None, "missing")]
)
def test_a_wrong_batch_is_refused(inputs: Any, words: str) -> None:
    assert words in refusal(openai_shape.read_decision_batch, {"inputs": inputs, "questions": [TRUE]}).message


def test_a_batchs_rows_come_in_order_with_the_errors_of_single_inputs() -> None:
    _, calls = openai_shape.read_decision_batch({"inputs": ["text"] * 34, "questions": [TRUE]})
    too_long = {"error": {"code": "context_length_exceeded", "message": "9000 tokens do not fit 2048"}}
    results = [scored({"yes": 0.6, "no": 0.4}) for _ in range(31)] + [too_long]
    question_result = calls[0].read(LOCAL, [reply({"results": results}, Usage(50, 31))])
    assert isinstance(question_result, DecisionResult)
    payload = make_batch_payload([question_result, BackendOverloaded("full")], calls)
    assert [len(call.inputs) for call in calls] == [32, 2]
    rows = payload["results"]
    assert [row["index"] for row in rows] == list(range(34))
    assert rows[0]["answers"][0]["probability"] == pytest.approx(0.6)
    assert rows[31]["error"]["code"] == "context_length_exceeded"
    assert rows[33]["error"]["code"] == "backend_overloaded"
    assert payload["usage"]["total_tokens"] == 81


def test_a_single_inputs_own_error_is_the_requests_error() -> None:
    _, (call,) = openai_shape.read_decision_request({"input": "x", "questions": [TRUE]})
    too_long = {"error": {"code": "context_length_exceeded", "message": "items[0]: 9000 tokens do not fit 2048"}}
    with pytest.raises(ContextTooLong, match=r"^9000"):
        call.read(LOCAL, [reply({"results": [too_long]})])


@pytest.mark.parametrize(
    "payload",
    [
        None,
        {},
        {"results": []},
        {"results": [{}]},
        {"results": [{"labels": [{}, {}]}]},
        {"results": [scored({"yes": 1})]},
    ],
)
def test_scores_that_do_not_match_the_question_are_garbage(payload: Any) -> None:
    _, (call,) = openai_shape.read_decision_request({"input": "x", "questions": [TRUE]})
    with pytest.raises(BackendGarbage):
        call.read(LOCAL, [reply(payload)])


SYSTEM_ONE: dict[str, Any] = {
    "state": {"mail": "Pay me now!"},
    "questions": {
        "urgent": {"type": "noul", "instructions": "Is it urgent?", "criteria": {"true": "today"}},
        "topic": {"type": "choice", "instructions": "Topic?", "criteria": {"billing": "money", "sports": None}},
        "mood": {"type": "score", "instructions": "Anger?", "criteria": ["calm", "furious"]},
    },
}


def test_system_one_is_answered_in_its_own_shape() -> None:
    asked, (call,) = systemone.read_systemone_request(SYSTEM_ONE)
    assert '{"mail":"Pay me now!"}' in asked.text and "money" in asked.text
    results = [
        scored({"yes": 0.8, "no": 0.2}),
        scored({"billing": 0.75, "sports": 0.25}),
        scored({"calm": 0.5, "furious": 0.5}),
    ]
    payload = call.read(LOCAL, [reply({"results": results}, Usage(10, 0))]).payload
    answers = payload["answers"]
    assert answers["urgent"]["type"] == "noul" and answers["urgent"]["noul"] == pytest.approx(0.8)
    assert answers["topic"]["choice"] == "billing"
    assert answers["topic"]["probabilities"] == {"billing": pytest.approx(0.75), "sports": pytest.approx(0.25)}
    assert answers["mood"]["legend"] == {"0": "calm", "1": "furious"}
    assert answers["mood"]["probabilities"] == {"0": pytest.approx(0.5), "1": pytest.approx(0.5)}
    assert answers["mood"]["score"] == pytest.approx(0.5)
    assert payload["usage"]["input_tokens"] == 10


def test_system_one_is_translated_for_a_hosted_target() -> None:
    _, (call,) = systemone.read_systemone_request(SYSTEM_ONE)
    (outgoing,) = call.outgoing(hosted("decisions"))
    assert outgoing.body["input"] == '{"mail":"Pay me now!"}'
    urgent, topic, mood = outgoing.body["questions"]
    assert urgent == {"type": "predicate", "name": "urgent", "instructions": "Is it urgent?\nTrue means: today"}
    assert topic["choices"] == [{"value": "billing", "description": "money"}, {"value": "sports"}]
    assert mood["levels"] == [{"label": "calm"}, {"label": "furious"}]
    answers = [
        {"type": "predicate", "probability": 0.5},
        {"type": "refusal"},
        {"type": "score", "probabilities": [{"label": "calm", "value": 0, "probability": 1}]},
    ]
    payload = call.read(hosted("decisions"), [reply({"answers": answers})]).payload
    assert set(payload["answers"]) == {"urgent", "mood"}


@pytest.mark.parametrize(
    ("question", "param", "words"),
    [
        ({"type": "predicate", "instructions": "?"}, "questions.q.type", "'predicate'"),
        ({"type": "noul"}, "questions.q.instructions", "missing"),
        ({"type": "noul", "instructions": "?", "criteria": {"maybe": "x"}}, "questions.q.criteria", "'maybe'"),
        ({"type": "choice", "instructions": "?", "criteria": {}}, "questions.q.criteria", "0 options"),
        ({"type": "choice", "instructions": "?", "criteria": {"a": None}}, "questions.q.criteria", "1 options"),
        ({"type": "choice", "instructions": "?"}, "questions.q.criteria", "None"),
        ({"type": "score", "instructions": "?", "criteria": ["a"]}, "questions.q.criteria", "1 levels"),
        ({"type": "score", "instructions": "?", "criteria": ["a", "a"]}, "questions.q.criteria[1]", "'a'"),
        ({"type": "score", "instructions": "?", "criteria": {}}, "questions.q.criteria", "list"),
        (5, "questions.q", "5"),
    ],
)
def test_a_wrong_system_one_question_is_refused_by_name(question: Any, param: str, words: str) -> None:
    error = refusal(systemone.read_systemone_request, {"state": "x", "questions": {"q": question}})
    assert error.param == param
    assert words in error.message


@pytest.mark.parametrize("questions", [None, [], {}, {f"q{n}": {} for n in range(401)}])
def test_system_one_needs_1_to_400_questions(questions: Any) -> None:
    assert refusal(systemone.read_systemone_request, {"state": "x", "questions": questions}).param == "questions"


def test_every_error_row_is_an_error_of_ours() -> None:
    _, (call,) = openai_shape.read_decision_batch({"inputs": ["a", "b"], "questions": [TRUE]})
    question_result = call.read(
        LOCAL, [reply({"results": [{"error": "odd"}, {"error": {"message": "no", "code": "x"}}]})]
    )
    assert all(isinstance(row, ApplianceError) and row.status == 400 for row in question_result.rows)
