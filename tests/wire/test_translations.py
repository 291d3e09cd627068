"""Streams of other dialects in any pieces, and the small print of translating requests. No sockets."""

from collections.abc import Callable, Mapping
from typing import Any

import orjson
import pytest

from appliance.core import Target, UpstreamCall
from appliance.errors import BackendGarbage, RejectedReply, RequestError, Unsupported
from appliance.wire.anthropic.outbound import write_message_body
from appliance.wire.anthropic.output_schema import narrow_schema
from appliance.wire.anthropic.stream import AnthropicStreamTranslator
from appliance.wire.dialect import CHAT_PATH, WireRequest
from appliance.wire.gemini.outbound import write_content_body
from appliance.wire.gemini.reply import read_gemini_reply
from appliance.wire.gemini.stream import GeminiStreamTranslator
from appliance.wire.sse import EventTooLong
from appliance.wire.stream_translator import ChunkTranslator
from tests.providers.anthropic_api import AnthropicApi
from tests.providers.collected import collected
from tests.providers.gemini_api import GeminiApi
from tests.providers.speech import THINKS_AND_CALLS, TWO_CALLS, Called, Say
from tests.router.scene import hosted_target

CALL = {"id": "call:1.a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
ASKED = {"role": "user", "content": "Weather?"}


def claude(**fields: Any) -> Target:
    return hosted_target(dialect="anthropic", abilities=frozenset({"chat", "tools", "reasoning"}), **fields)


def gem(**fields: Any) -> Target:
    return hosted_target(dialect="gemini", **{"abilities": frozenset({"chat", "tools"}), **fields})


def wire_request(target: Target) -> WireRequest:
    body = {"stream": True, "stream_options": {"include_usage": True}}
    return WireRequest(target, UpstreamCall(CHAT_PATH, body), CHAT_PATH, b"")


def anthropic_stream(say: Say) -> bytes:
    return b"".join(AnthropicApi().events("/messages", {"model": "c"}, say))


def gemini_stream(say: Say) -> bytes:
    return b"".join(GeminiApi().events("/models/gem:streamGenerateContent", {}, say))


def message_passage() -> ChunkTranslator:
    return AnthropicStreamTranslator(wire_request(claude(model="c")))


def content_passage() -> ChunkTranslator:
    return GeminiStreamTranslator(wire_request(gem(model="gem")))


STREAMS: list[tuple[Callable[[Say], bytes], Callable[[], ChunkTranslator]]] = [
    (anthropic_stream, message_passage),
    (gemini_stream, content_passage),
]


def without_time(raw: bytes) -> list[Any]:
    events = [event.removeprefix(b"data: ") for event in raw.split(b"\n\n") if event]
    return [event if event == b"[DONE]" else {**orjson.loads(event), "created": 0} for event in events]


@pytest.mark.parametrize("say", [TWO_CALLS, THINKS_AND_CALLS, Say(text="naïve ✓ 終")])
@pytest.mark.parametrize(("stream", "passage"), STREAMS)
@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_a_stream_may_come_in_any_pieces(
    stream: Callable[[Say], bytes], passage: Callable[[], ChunkTranslator], say: Say, size: int
) -> None:
    raw = stream(say)
    at_once, in_pieces = passage(), passage()
    whole = at_once.feed(raw) + at_once.end()
    parts = [in_pieces.feed(raw[at : at + size]) for at in range(0, len(raw), size)]
    assert without_time(b"".join(parts) + in_pieces.end()) == without_time(whole)
    assert collected(whole).is_done and in_pieces.usage == at_once.usage is not None


@pytest.mark.parametrize(("stream", "passage"), STREAMS)
def test_nothing_is_passed_on_after_the_end_or_an_error(
    stream: Callable[[Say], bytes], passage: Callable[[], ChunkTranslator]
) -> None:
    reading = passage()
    assert reading.feed(b"data: {not json\n\n" + stream(TWO_CALLS)) == b"" and reading.error is not None
    assert reading.feed(stream(TWO_CALLS)) == b"" and reading.end() == b"" and not reading.done


def test_an_event_without_an_end_is_given_up() -> None:
    reading = message_passage()
    with pytest.raises(EventTooLong):
        for _ in range(10):
            reading.feed(b"data: " + b"x" * 1_000_000)


# --- Anthropic


def test_results_of_several_tools_and_the_next_question_are_one_turn() -> None:
    other = {**CALL, "id": "c2", "function": {"name": "clock", "arguments": ""}}
    body = write_message_body(
        claude(),
        {
            "messages": [
                ASKED,
                {"role": "assistant", "content": "", "tool_calls": [CALL, other]},
                {"role": "tool", "tool_call_id": "call:1.a", "content": "12", "is_error": True},
                {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "noon"}]},
                {"role": "user", "content": "So?"},
            ]
        },
    )
    assert [turn["role"] for turn in body["messages"]] == ["user", "assistant", "user"]
    used, answered = body["messages"][1]["content"], body["messages"][2]["content"]
    assert [block["id"] for block in used] == ["call_1_a", "c2"] and used[1]["input"] == {}
    assert answered[0] == {"type": "tool_result", "tool_use_id": "call_1_a", "content": "12", "is_error": True}
    assert [block["type"] for block in answered] == ["tool_result", "tool_result", "text"]


def test_later_instructions_keep_their_place() -> None:
    messages = [{"role": "system", "content": "A"}, ASKED, {"role": "developer", "content": "B"}]
    body = write_message_body(claude(), {"messages": messages})
    assert body["system"] == [{"type": "text", "text": "A"}]
    assert [turn["role"] for turn in body["messages"]] == ["user", "system"]


def test_hints_of_caching_are_carried_to_where_they_stood() -> None:
    mark = {"type": "ephemeral"}
    part = {"type": "text", "text": "long", "prompt_cache_breakpoint": {"mode": "explicit"}}
    tool = {"type": "function", "function": {"name": "t"}, "cache_control": {**mark, "ttl": "1h"}}
    called = {"role": "assistant", "tool_calls": [{**CALL, "cache_control": mark}]}
    result = {"role": "tool", "tool_call_id": "call:1.a", "content": "x", "cache_control": mark}
    body = write_message_body(
        claude(), {"messages": [{"role": "user", "content": [part]}, called, result], "tools": [tool]}
    )
    assert body["messages"][0]["content"][0]["cache_control"] == mark
    assert body["messages"][1]["content"][0]["cache_control"] == mark
    assert body["messages"][2]["content"][0]["cache_control"] == mark
    assert body["tools"][0]["cache_control"]["ttl"] == "1h"


def test_anthropics_own_word_on_thinking_counts_more_than_an_effort() -> None:
    given = {"messages": [ASKED], "thinking": {"type": "enabled", "budget_tokens": 5000}, "reasoning_effort": "high"}
    body = write_message_body(claude(), given)
    assert body["thinking"] == given["thinking"] and body["max_tokens"] == 5000 + 8192


@pytest.mark.parametrize("arguments", ["{", "[1]", '"text"'], ids=["no JSON", "a list", "a text"])
def test_arguments_that_are_no_object_are_the_callers_mistake(arguments: str) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    messages = [ASKED, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(RequestError, match=r"messages\[1\].tool_calls\[0\]"):
        write_message_body(claude(), {"messages": messages})


@pytest.mark.parametrize("url", ["data:image/png;base64,@@@", "data:image/png,abc", "data:;base64,AAAA", "ftp://x/y"])
def test_a_picture_that_cannot_be_read_is_the_callers_mistake(url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    with pytest.raises(RequestError):
        write_message_body(claude(), {"messages": [{"role": "user", "content": [part]}]})


def test_instructions_alone_are_no_question() -> None:
    for write, target in ((write_message_body, claude()), (write_content_body, gem())):
        with pytest.raises(RequestError, match="instructions alone"):
            write(target, {"messages": [{"role": "system", "content": "Be brief."}]})


def test_a_schema_gets_no_wider_and_its_limits_are_told() -> None:
    schema = {
        "$schema": "x",
        "type": ["object", "null"],
        "properties": {"n": {"type": "integer", "minimum": 1, "description": "How many."}, "minLength": {"const": 3}},
        "oneOf": [{"type": "object"}, {"$ref": "#/$defs/a"}],
        "$defs": {"a": {"type": "array", "items": {"properties": {}}, "minItems": 3}},
    }
    assert narrow_schema(schema) == {
        "type": ["object", "null"],
        "properties": {"n": {"type": "integer", "description": "How many. {minimum: 1}"}, "minLength": {"const": 3}},
        "anyOf": [{"type": "object", "additionalProperties": False}, {"$ref": "#/$defs/a"}],
        "$defs": {
            "a": {
                "type": "array",
                "items": {"properties": {}, "additionalProperties": False},
                "description": "{minItems: 3}",
            }
        },
        "additionalProperties": False,
    }


# --- Gemini


def test_calls_without_ids_get_one_and_results_find_their_tool() -> None:
    api = GeminiApi()
    api.gives_ids = False
    raw = api.whole("/models/gem:generateContent", {}, TWO_CALLS)
    payload, _ = read_gemini_reply(wire_request(gem()), orjson.loads(raw))
    message = payload["choices"][0]["message"]
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 2
    results = [
        {"role": "tool", "tool_call_id": one, "content": text} for one, text in zip(ids, ("{}", "x"), strict=True)
    ]
    contents = write_content_body(gem(), {"messages": [ASKED, message, *results]})["contents"]
    answers = [part["functionResponse"] for part in contents[2]["parts"]]
    assert [(one["name"], one["response"]) for one in answers] == [
        ("weather", {"output": {}}),
        ("clock", {"output": "x"}),
    ]


def test_a_result_of_no_call_is_the_callers_mistake() -> None:
    with pytest.raises(RequestError, match="no call before it"):
        write_content_body(gem(), {"messages": [ASKED, {"role": "tool", "tool_call_id": "x", "content": "y"}]})


def test_calls_that_another_model_made_are_marked_as_unsigned_for_one_that_thinks() -> None:
    past = {"messages": [ASKED, {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "c2"}]}]}
    first, second = write_content_body(gem(abilities=frozenset({"chat", "reasoning"})), past)["contents"][1]["parts"]
    assert first["thoughtSignature"] == "skip_thought_signature_validator" and "thoughtSignature" not in second
    first, _ = write_content_body(gem(), past)["contents"][1]["parts"]
    assert "thoughtSignature" not in first


@pytest.mark.parametrize("reason", ["MALFORMED_FUNCTION_CALL", "OTHER", "A_NEW_ONE"])
def test_an_answer_that_did_not_come_about_is_none(reason: str) -> None:
    candidate: Mapping[str, Any] = {"finishReason": reason, "content": {"parts": []}}
    with pytest.raises(RejectedReply, match=reason):
        read_gemini_reply(wire_request(gem()), {"candidates": [candidate]})
    reading = content_passage()
    reading.feed(b"data: " + orjson.dumps({"candidates": [candidate]}) + b"\n\n")
    assert reason in str(reading.error)


@pytest.mark.parametrize("payload", [{}, {"candidates": []}, {"candidates": [1]}, {"candidates": "x"}])
def test_a_reply_without_candidates_is_garbage_unless_it_is_blocked(payload: dict[str, Any]) -> None:
    if payload.get("candidates") == []:
        payload = {**payload, "promptFeedback": {"blockReason": "SAFETY"}}
        assert read_gemini_reply(wire_request(gem()), payload)[0]["choices"][0]["finish_reason"] == "content_filter"
        return
    with pytest.raises(BackendGarbage):
        read_gemini_reply(wire_request(gem()), payload)


def test_log_probabilities_have_openais_shape() -> None:
    tops = [{"candidates": [{"token": "Ja", "logProbability": -0.1}, {"token": "No", "logProbability": -2.3}]}]
    result = {"chosenCandidates": [{"token": "Ja", "logProbability": -0.1}], "topCandidates": tops}
    candidate = {"finishReason": "STOP", "content": {"parts": [{"text": "Ja"}]}, "logprobsResult": result}
    payload, _ = read_gemini_reply(wire_request(gem()), {"candidates": [candidate]})
    (row,) = payload["choices"][0]["logprobs"]["content"]
    assert (row["token"], row["logprob"], row["bytes"]) == ("Ja", -0.1, [74, 97])
    assert [top["token"] for top in row["top_logprobs"]] == ["Ja", "No"]


def test_googles_own_settings_have_their_usual_place() -> None:
    google = {"thinking_config": {"thinking_budget": 5, "include_thoughts": True}, "cached_content": "cachedContents/1"}
    body = write_content_body(gem(), {"messages": [ASKED], "extra_body": {"google": google}})
    assert body["generationConfig"]["thinkingConfig"] == {"thinkingBudget": 5, "includeThoughts": True}
    assert body["cachedContent"] == "cachedContents/1"
    with pytest.raises(Unsupported) as caught:
        write_content_body(gem(), {"messages": [ASKED], "extra_body": {"google": {"other": 1}}})
    assert caught.value.param == "extra_body.google.other"


def test_sound_and_documents_are_carried_over() -> None:
    parts = [
        {"type": "input_audio", "input_audio": {"format": "wav", "data": "AAAA"}},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"}},
    ]
    written = write_content_body(gem(), {"messages": [{"role": "user", "content": parts}]})["contents"][0]["parts"]
    assert [part["inlineData"]["mimeType"] for part in written] == ["audio/wav", "application/pdf"]
    document = write_message_body(claude(), {"messages": [{"role": "user", "content": parts[1:]}]})
    assert document["messages"][0]["content"][0]["title"] == "a.pdf"


def test_a_tool_without_arguments_is_called_with_none() -> None:
    for stream, passage in STREAMS:
        reading = passage()
        raw = stream(Say(calls=(Called("c", "clock", {}),)))
        came = collected(reading.feed(raw) + reading.end())
        assert orjson.loads(came.message["tool_calls"][0]["function"]["arguments"]) == {}
