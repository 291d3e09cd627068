"""Extraction: one chat call for each text, objects validated, confidence for each field."""

import math
from typing import Any

import pytest

from appliance.core import Usage
from appliance.errors import BackendOverloaded, RejectedReply
from appliance.tasks import extract
from tests.tasks.rows import LOCAL, chat_payload, hosted, refusal, reply

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def logprobs(*tokens: tuple[str, float]) -> dict[str, Any]:
    return {"content": [{"token": text, "logprob": math.log(p), "bytes": list(text.encode())} for text, p in tokens]}


def test_each_text_is_one_strict_chat_call_at_temperature_zero() -> None:
    asked, calls = extract.read({"texts": ["one", "two"], "schema": SCHEMA, "instructions": "Ages in years."})
    assert len(calls) == 2
    assert asked.needs == {"chat", "json_schema"} and "two" in asked.text
    (outgoing,) = calls[1].outgoing(LOCAL)
    body = outgoing.body
    assert outgoing.path == "/chat/completions"
    assert (body["temperature"], body["logprobs"]) == (0, True)
    assert body["response_format"]["json_schema"] == {"name": "extraction", "strict": True, "schema": SCHEMA}
    assert "Ages in years." in body["messages"][0]["content"] and body["messages"][1]["content"] == "two"
    assert body["max_tokens"] >= 64


def test_texts_of_one_request_share_their_prefix() -> None:
    _, calls = extract.read({"texts": ["one", "two"], "schema": SCHEMA})
    assert len({call.outgoing(LOCAL)[0].body["messages"][0]["content"] for call in calls}) == 1


def test_a_hosted_target_is_asked_only_what_it_can_do() -> None:
    loose = {"type": "object", "properties": {"name": {"type": "string"}}}
    _, (call,) = extract.read({"text": "one", "schema": loose})
    body = call.outgoing(hosted("chat", "json_schema"))[0].body
    assert "logprobs" not in body
    assert body["response_format"]["json_schema"]["strict"] is False


def test_an_object_comes_with_a_confidence_for_each_field() -> None:
    _, (call,) = extract.read({"text": "Ann is 42.", "schema": SCHEMA})
    tokens = [('{"name":', 1.0), ('"Ann"', 0.5), (',"age":', 1.0), ("42", 0.25), ("}", 1.0)]
    content = "".join(text for text, _ in tokens)
    found = call.read(LOCAL, [reply(chat_payload(content, logprobs=logprobs(*tokens)), Usage(20, 9, 5))])
    assert extract.payload(found) == {
        "model": "small",
        "object": {"name": "Ann", "age": 42},
        "confidence": {"/name": pytest.approx(0.5), "/age": pytest.approx(0.25)},
        "usage": {
            "prompt_tokens": 20,
            "completion_tokens": 9,
            "total_tokens": 29,
            "prompt_tokens_details": {"cached_tokens": 5},
        },
    }


def test_without_token_probabilities_the_confidence_is_null() -> None:
    _, (call,) = extract.read({"text": "Ann is 42.", "schema": SCHEMA})
    found = call.read(hosted("chat"), [reply(chat_payload('{"name":"Ann","age":42}'))])
    assert extract.payload(found)["confidence"] is None


@pytest.mark.parametrize(
    "payload",
    [
        chat_payload('{"name":"Ann"}'),
        chat_payload('{"name":"Ann","age":42,"more":1}'),
        chat_payload('{"name":"Ann"', finish_reason="length"),
        chat_payload(None, message={"refusal": "no"}),
    ],
)
def test_an_object_that_does_not_match_is_rejected(payload: dict[str, Any]) -> None:
    _, (call,) = extract.read({"text": "Ann", "schema": SCHEMA})
    with pytest.raises(RejectedReply):
        call.read(LOCAL, [reply(payload)])


def test_results_come_in_order_with_the_errors_of_single_texts() -> None:
    _, calls = extract.read({"texts": ["one", "two", "three"], "schema": SCHEMA})
    found = calls[0].read(LOCAL, [reply(chat_payload('{"name":"Ann","age":42}'), Usage(20, 9))])
    payload = extract.texts_payload([found, BackendOverloaded("full"), found])
    assert [row["index"] for row in payload["results"]] == [0, 1, 2]
    assert payload["results"][0]["object"] == {"name": "Ann", "age": 42}
    assert payload["results"][1]["error"]["code"] == "backend_overloaded"
    assert payload["usage"]["total_tokens"] == 58


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"text": None}, "text", "None"),
        ({"text": ""}, "text", "empty"),
        ({"texts": ["x"]}, "texts", "both"),
        ({"schema": None}, "schema", "missing"),
        ({"schema": {"type": "objct"}}, "schema", "'objct'"),
        ({"schema": {"type": "array"}}, "schema.type", "'array'"),
        ({"schema": {}}, "schema.type", "None"),
        ({"schema": "person"}, "schema", "not an object"),
        ({"instructions": 5}, "instructions", "5"),
        ({"max_tokens": 0}, "max_tokens", "0"),
    ],
)
def test_a_wrong_extract_field_is_refused_by_name(change: dict[str, Any], param: str, words: str) -> None:
    error = refusal(extract.read, {"text": "Ann", "schema": SCHEMA, **change})
    assert error.param == param
    assert words in error.message


@pytest.mark.parametrize(("texts", "words"), [([], "0 texts"), (["x"] * 1001, "1001"), ([5], "5"), ("x", "'x'")])
def test_wrong_texts_are_refused(texts: Any, words: str) -> None:
    assert words in refusal(extract.read, {"texts": texts, "schema": SCHEMA}).message


def test_a_chat_body_sent_to_extract_is_told_so() -> None:
    error = refusal(extract.read, {"messages": [], "schema": SCHEMA})
    assert "belongs to /v1/chat/completions" in error.message
