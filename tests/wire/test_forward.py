"""Bodies that travel as they came: what is left out of them all the same, and what is read off their streams."""

import base64
from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from appliance.core import CallerBody, ProviderQuirks, Target, UpstreamCall, Usage
from appliance.upstream import client
from appliance.wire.dialect import WireRequest
from appliance.wire.opaque_state import pack_state
from appliance.wire.registry import find_forwarder
from tests.router.scene import hosted_target

ASK = {"role": "user", "content": "x"}
REASONING = {"type": "reasoning", "id": "rs_9", "summary": [], "encrypted_content": "sealed"}
PACKED = pack_state({"thinking_blocks": [REASONING], "extra_content": {"google": {"thought_signature": "c2ln"}}})


def target_for(endpoint: str, **fields: Any) -> Target:
    dialect = {"messages": "anthropic", "responses": "openai", "generate_content": "gemini"}[endpoint]
    wire = ProviderQuirks(api="responses" if endpoint == "responses" else "chat")
    return hosted_target(**{"dialect": dialect, "wire": wire, **fields})


def written(
    endpoint: Any, body: Mapping[str, Any], chat: Mapping[str, Any] | None = None, **fields: Any
) -> WireRequest:
    call = UpstreamCall("/chat/completions", {"messages": [ASK], **(chat or {})}, CallerBody(endpoint, body))
    return client.write_request(target_for(endpoint, **fields), call, stream=False, salt="s", may_forward=True)


def forwarded(endpoint: Any, body: Mapping[str, Any], chat: Mapping[str, Any] | None = None, **fields: Any) -> Any:
    request = written(endpoint, body, chat, **fields)
    assert request.is_forwarded
    return orjson.loads(request.body)


def turns(*blocks: Mapping[str, Any]) -> dict[str, Any]:
    said = {"type": "text", "text": "y"}
    return {"max_tokens": 9, "messages": [ASK, {"role": "assistant", "content": [*blocks, said]}, ASK]}


@pytest.mark.parametrize(
    "foreign",
    [
        {"type": "redacted_thinking", "data": PACKED},
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
    ],
)
def test_another_providers_thinking_does_not_go_to_anthropic(foreign: Mapping[str, Any]) -> None:
    signed = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    assert forwarded("messages", turns(signed, foreign))["messages"] == turns(signed)["messages"]


def test_ids_that_anthropic_does_not_take_are_rewritten_by_the_translation() -> None:
    call = {"type": "tool_use", "id": "call.1", "name": "f", "input": {}}
    assert not written("messages", turns(call)).is_forwarded


def test_fields_that_ask_for_nothing_and_need_a_beta_are_left_out() -> None:
    body = {**turns(), "mcp_servers": [], "speed": "standard", "context_management": {"edits": []}}
    assert forwarded("messages", body) == {**turns(), "model": "big"}


def test_the_older_place_of_an_output_format_is_not_sent() -> None:
    format = {"type": "json_schema", "schema": {"type": "object"}}
    sent = forwarded("messages", {**turns(), "output_format": format, "output_config": {"effort": "low"}})
    assert sent["output_config"] == {"format": format, "effort": "low"} and "output_format" not in sent


def test_a_field_that_the_operator_leaves_out_or_the_target_refuses_is_left_to_the_translation() -> None:
    names = frozenset({"top_k"})
    for wire in (ProviderQuirks(leaves_out=names), ProviderQuirks(refuses=names)):
        call = UpstreamCall("/chat/completions", {"messages": [ASK], "top_k": 3}, CallerBody("messages", turns()))
        forwarder = find_forwarder(target_for("messages", wire=wire), call)
        assert forwarder is not None
        assert forwarder.write_request(target_for("messages", wire=wire), call, stream=False) is None
        assert forwarder.write_request(target_for("messages"), call, stream=False) is not None


def test_nothing_is_stored_by_openai_and_its_reasoning_comes_back_sealed() -> None:
    thinks = frozenset({"chat", "reasoning"})
    sent = forwarded("responses", {"model": "auto", "input": "x"}, abilities=thinks)
    assert sent == {"model": "big", "input": "x", "store": False, "include": ["reasoning.encrypted_content"]}


def test_reasoning_of_openai_is_unpacked_and_that_of_others_left_out() -> None:
    said = {"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": "y"}]}
    own = {"type": "reasoning", "id": "r1", "summary": [], "encrypted_content": PACKED}
    other = {"type": "reasoning", "id": "r2", "summary": [], "encrypted_content": pack_state({"thinking_blocks": []})}
    plain = {"type": "reasoning", "id": "r3", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    sent = forwarded("responses", {"input": [own, other, plain, said]})
    assert sent["input"] == [REASONING, {name: value for name, value in said.items() if name != "id"}]


def test_a_packed_signature_does_not_go_to_gemini() -> None:
    packed = base64.b64encode(PACKED.encode()).decode()
    turn = {"role": "model", "parts": [{"text": "y", "thoughtSignature": packed}]}
    contents = [{"role": "user", "parts": [{"text": "x"}]}, turn]
    assert not written("generate_content", {"contents": contents}).is_forwarded
    turn["parts"] = [{"text": "y", "thoughtSignature": "c2ln"}]
    assert forwarded("generate_content", {"contents": contents}) == {"contents": contents}


def test_a_call_that_a_thinking_gemini_wants_signed_is_left_to_the_translation() -> None:
    call = {"functionCall": {"name": "f", "args": {}}}
    contents = [{"role": "user", "parts": [{"text": "x"}]}, {"role": "model", "parts": [call]}]
    thinks = frozenset({"chat", "tools", "reasoning"})
    assert not written("generate_content", {"contents": contents}, abilities=thinks).is_forwarded
    assert written("generate_content", {"contents": contents}).is_forwarded


def test_a_role_that_was_left_out_is_the_users() -> None:
    sent = forwarded("generate_content", {"contents": [{"parts": [{"text": "x"}]}]})
    assert sent == {"contents": [{"role": "user", "parts": [{"text": "x"}]}]}


def test_limits_are_lowered_under_the_name_that_the_caller_uses() -> None:
    body = {
        "contents": [{"role": "user", "parts": [{"text": "x"}]}],
        "generation_config": {"max_output_tokens": 99, "top_k": 1},
    }
    sent = forwarded("generate_content", body, {"max_completion_tokens": 9})
    assert sent == {**body, "generation_config": {"max_output_tokens": 9, "top_k": 1}}


EVENTS: list[tuple[str, bytes, bytes, Usage]] = [
    (
        "messages",
        b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":7,"output_tokens":1}}}'
        b'\n\nevent: x\ndata: {"type":"content_block_delta","delta":{"text":"\\"type\\":\\"message_stop\\""}}\n\n'
        b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
        b'"usage":{"output_tokens":5}}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
        Usage(7, 5),
    ),
    (
        "responses",
        b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"x"}\n\n',
        b'event: response.completed\ndata: {"type":"response.completed","response":{"usage":{"input_tokens":7,'
        b'"output_tokens":5}}}\n\n',
        Usage(7, 5),
    ),
    (
        "generate_content",
        b'data: {"candidates":[{"content":{"parts":[{"text":"x"}]}}],"usageMetadata":{"promptTokenCount":7}}\r\n\r\n'
        b'data: {"candidates":[{"finishReason":"STOP"}],"usageMetadata":{"promptTokenCount":7,'
        b'"candidatesTokenCount":5}}\r\n\r\n',
        b"",
        Usage(7, 5),
    ),
]


@pytest.mark.parametrize(("endpoint", "events", "ending", "usage"), EVENTS)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_stream_passes_byte_for_byte_and_is_read_in_passing(
    endpoint: str, events: bytes, ending: bytes, usage: Usage, size: int
) -> None:
    stream = stream_for(endpoint)
    raw = events + ending
    passed = b"".join(stream.feed(raw[at : at + size]) for at in range(0, len(raw), size)) + stream.end()
    assert passed == raw
    assert (stream.usage, stream.done, stream.finished_choices, stream.error) == (usage, True, 1, None)
    assert stream.ending == ending


def stream_for(endpoint: str) -> Any:
    body: dict[str, Any] = {"messages": turns(), "responses": {"input": "x"}, "generate_content": {"contents": []}}
    request = written(endpoint, body[endpoint])
    forwarder = find_forwarder(request.target, request.outgoing)
    assert forwarder is not None
    return forwarder.read_stream(request)


@pytest.mark.parametrize(
    ("endpoint", "event"),
    [
        ("messages", b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"m"}}\n\n'),
        ("responses", b'data: {"type":"error","message":"m","code":"server_error","param":null}\n\n'),
        ("responses", b'data: {"type":"response.failed","response":{"error":{"code":"x","message":"m"}}}\n\n'),
        ("generate_content", b'data: {"error":{"code":503,"message":"m","status":"UNAVAILABLE"}}\n\n'),
    ],
)
def test_an_error_event_is_kept_and_nothing_after_it_is_passed_on(endpoint: str, event: bytes) -> None:
    stream = stream_for(endpoint)
    assert stream.feed(b'data: {"x":1}\n\n' + event + b'data: {"x":2}\n\n') == b'data: {"x":1}\n\n'
    assert stream.error["message"] == "m" and not stream.done


@pytest.mark.parametrize("endpoint", ["messages", "responses", "generate_content"])
def test_a_stream_without_an_end_is_not_whole(endpoint: str) -> None:
    stream = stream_for(endpoint)
    stream.feed(b'data: {"type":"other"}\n\n')
    assert stream.end() == b"" and not stream.done and stream.finished_choices == 0


def test_a_prompt_that_gemini_blocks_is_a_whole_answer() -> None:
    stream = stream_for("generate_content")
    stream.feed(b'data: {"promptFeedback":{"blockReason":"SAFETY"},"usageMetadata":{"promptTokenCount":3}}\n\n')
    assert stream.end() == b"" and stream.done and stream.usage == Usage(3, 0)
