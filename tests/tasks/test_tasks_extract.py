"""Extraction: one chat call for each text, objects validated, confidence for each field."""

import math
from typing import Any

import pytest

from appliance.core import Usage
from appliance.errors import BackendOverloaded, RejectedReply
from appliance.tasks.extract import extraction
from appliance.tasks.extract.extract_payload import make_extract_payload, make_texts_payload
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
    asked, calls = extraction.read_extract_request(
        {"texts": ["one", "two"], "schema": SCHEMA, "instructions": "Ages in years."}
    )
    assert len(calls) == 2
    assert asked.needs == {"chat", "json_schema"} and "two" in asked.text
    (outgoing,) = calls[1].outgoing(LOCAL)
    body = outgoing.body
    assert outgoing.path == "/chat/completions"
    assert (body["temperature"], body["logprobs"]) == (0, True)
    wanted = body["response_format"]["json_schema"]
    assert (wanted["name"], wanted["strict"]) == ("extraction", True)
    assert wanted["schema"]["properties"]["name"] == {"type": "string", "maxLength": 200}
    assert body["messages"][1]["content"].startswith("two\n\n") and "Ages in years." in body["messages"][1]["content"]
    assert body["max_tokens"] >= 64


def test_texts_of_one_request_share_their_prefix() -> None:
    _, calls = extraction.read_extract_request({"texts": ["one", "two"], "schema": SCHEMA})
    assert len({call.outgoing(LOCAL)[0].body["messages"][0]["content"] for call in calls}) == 1


def test_a_hosted_target_is_asked_only_what_it_can_do() -> None:
    loose = {"type": "object", "properties": {"name": {"type": "string"}}}
    _, (call,) = extraction.read_extract_request({"text": "one", "schema": loose})
    body = call.outgoing(hosted("chat", "json_schema"))[0].body
    assert "logprobs" not in body
    assert body["response_format"]["json_schema"]["strict"] is False


def test_an_object_comes_with_a_confidence_for_each_field() -> None:
    _, (call,) = extraction.read_extract_request({"text": "Ann is 42.", "schema": SCHEMA})
    tokens = [('{"name":', 1.0), ('"Ann"', 0.5), (',"age":', 1.0), ("42", 0.25), ("}", 1.0)]
    content = "".join(text for text, _ in tokens)
    found = call.read(LOCAL, [reply(chat_payload(content, logprobs=logprobs(*tokens)), Usage(20, 9, 5))])
    assert make_extract_payload([found], [call]) == {
        "model": "small",
        "object": {"name": "Ann", "age": 42},
        "confidence": {"/name": pytest.approx(0.5), "/age": pytest.approx(0.25)},
        "usage": {
            "prompt_tokens": 20,
            "completion_tokens": 9,
            "total_tokens": 29,
            "prompt_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


def test_without_token_probabilities_the_confidence_is_null() -> None:
    _, (call,) = extraction.read_extract_request({"text": "Ann is 42.", "schema": SCHEMA})
    found = call.read(hosted("chat"), [reply(chat_payload('{"name":"Ann","age":42}'))])
    assert make_extract_payload([found], [call])["confidence"] is None


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
    _, (call,) = extraction.read_extract_request({"text": "Ann", "schema": SCHEMA})
    with pytest.raises(RejectedReply):
        call.read(LOCAL, [reply(payload)])


def test_results_come_in_order_with_the_errors_of_single_texts() -> None:
    _, calls = extraction.read_extract_request({"texts": ["one", "two", "three"], "schema": SCHEMA})
    found = calls[0].read(LOCAL, [reply(chat_payload('{"name":"Ann","age":42}'), Usage(20, 9))])
    payload = make_texts_payload([found, BackendOverloaded("full"), found], calls)
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
        ({"chunk_tokens": 5}, "chunk_tokens", "128"),
    ],
)
def test_a_wrong_extract_field_is_refused_by_name(change: dict[str, Any], param: str, words: str) -> None:
    error = refusal(extraction.read_extract_request, {"text": "Ann", "schema": SCHEMA, **change})
    assert error.param == param
    assert words in error.message


@pytest.mark.parametrize(("texts", "words"), [([], "0 texts"), (["x"] * 1001, "1001"), ([5], "5"), ("x", "'x'")])
def test_wrong_texts_are_refused(texts: Any, words: str) -> None:
    assert words in refusal(extraction.read_extract_request, {"texts": texts, "schema": SCHEMA}).message


def test_a_chat_body_sent_to_extract_is_told_so() -> None:
    error = refusal(extraction.read_extract_request, {"messages": [], "schema": SCHEMA})
    assert "belongs to /v1/chat/completions" in error.message


def test_a_hosted_target_gets_the_callers_own_schema() -> None:
    _, (call,) = extraction.read_extract_request({"text": "one", "schema": SCHEMA})
    body = call.outgoing(hosted("chat", "json_schema"))[0].body
    assert body["response_format"]["json_schema"] == {"name": "extraction", "strict": True, "schema": SCHEMA}


def test_plain_fields_are_asked_by_name_and_others_by_the_schema() -> None:
    plain = {"type": "object", "properties": {"name": {"type": "string", "description": "in capitals"}}}
    _, (call,) = extraction.read_extract_request({"text": "one", "schema": plain})
    assert "name (in capitals)." in call.task and "{" not in call.task
    chosen = {"type": "object", "properties": {"name": {"enum": ["A", "B"]}}}
    _, (call,) = extraction.read_extract_request({"text": "one", "schema": chosen})
    assert '"enum"' in call.task


def test_the_cut_off_leaves_room_for_the_longest_object_and_admission_reckons_with_a_likely_one() -> None:
    _, (call,) = extraction.read_extract_request({"text": "one", "schema": SCHEMA})
    assert call.output_tokens < 200 + 28 < call.max_tokens
    _, (call,) = extraction.read_extract_request({"text": "one", "schema": SCHEMA, "max_tokens": 50})
    assert (call.output_tokens, call.max_tokens) == (50, 50)


def test_a_string_that_reached_our_own_limit_is_told() -> None:
    _, (call,) = extraction.read_extract_request({"text": "one", "schema": SCHEMA})
    long = "x" * 200
    found = call.read(LOCAL, [reply(chat_payload(f'{{"name":"{long}","age":42}}'))])
    assert make_extract_payload([found], [call])["cut"] == ("/name",)
    found = call.read(hosted("chat"), [reply(chat_payload(f'{{"name":"{long}","age":42}}'))])
    assert "cut" not in make_extract_payload([found], [call])


def pieces_of(*objects: str) -> tuple[Any, Any]:
    text = "\n\n".join(f"Paragraph {number}: " + "word " * 90 for number in range(len(objects)))
    _, calls = extraction.read_extract_request({"text": text, "schema": LISTING, "chunk_tokens": 130})
    assert len(calls) == len(objects)
    return [
        call.read(LOCAL, [reply(chat_payload(o), Usage(10, 5))]) for call, o in zip(calls, objects, strict=True)
    ], calls


LISTING: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": ["string", "null"]},
        "items": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
    },
    "required": ["name", "items"],
}


def test_a_long_text_is_read_in_pieces_and_says_where_each_value_came_from() -> None:
    found, calls = pieces_of('{"name":null,"items":["a","b"]}', '{"name":"Ann","items":["b","c"]}')
    payload = make_extract_payload(found, calls)
    assert payload["object"] == {"name": "Ann", "items": ["a", "b", "c"]}
    start, end = calls[1].span
    assert payload["evidence"]["/name"] == {"start": start, "end": end}
    assert payload["evidence"]["/items/2"] == {"start": start, "end": end}
    assert payload["evidence"]["/items/1"] == {"start": calls[0].span[0], "end": calls[0].span[1]}
    assert payload["usage"]["total_tokens"] == 30


def test_pieces_that_do_not_fit_the_schema_together_are_rejected() -> None:
    found, calls = pieces_of('{"name":null,"items":["a","b"]}', '{"name":"Ann","items":["c","d"]}')
    with pytest.raises(RejectedReply, match="2 pieces"):
        make_extract_payload(found, calls)


def test_a_text_fails_with_any_of_its_pieces_and_others_do_not() -> None:
    found, calls = pieces_of('{"name":null,"items":[]}', '{"name":"Ann","items":[]}')
    payload = make_texts_payload([found[0], BackendOverloaded("full")], calls)
    assert [row["error"]["code"] for row in payload["results"]] == ["backend_overloaded"]
    with pytest.raises(BackendOverloaded):
        make_extract_payload([found[0], BackendOverloaded("full")], calls)
