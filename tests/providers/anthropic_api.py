"""A stand-in for Anthropic's Messages API, built with the official SDK's types."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import orjson
from anthropic import types
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming, MessageCreateParamsStreaming
from anthropic.types.raw_message_delta_event import Delta
from anthropic.types.shared.error_response import ErrorResponse
from pydantic import BaseModel, TypeAdapter

from tests.providers.served import Served, Speech, typed_wrongs
from tests.providers.speech import Cut, Fail, Say, pieces_of

WHOLE: Final[TypeAdapter[Any]] = TypeAdapter(MessageCreateParamsNonStreaming)
STREAM: Final[TypeAdapter[Any]] = TypeAdapter(MessageCreateParamsStreaming)
SIGNATURE = "c2lnbmF0dXJl"
_EMPTY: Final[Mapping[str, dict[str, Any]]] = {
    "text": {"text": ""},
    "thinking": {"thinking": "", "signature": ""},
    "tool_use": {"input": {}},
}
"""Blocks begin empty in a stream."""
_REASONS: Final[Mapping[str, Any]] = {"stop": "end_turn", "length": "max_tokens", "refusal": "refusal"}


class AnthropicApi(Served):
    """`samples`: whether it takes temperature, top_p and top_k, as the API did before its version 2026-10-21."""

    samples = False

    def wrong_with(self, path: str, body: dict[str, Any]) -> Iterable[str]:
        headers = self.headers[-1]
        if path != "/messages":
            yield f"no endpoint {path}"
        if headers.get("x-api-key") != "sk-secret":
            yield "no x-api-key"
        if not headers.get("anthropic-version"):
            yield "no anthropic-version"
        if self.samples:
            body = {name: value for name, value in body.items() if name not in ("temperature", "top_p", "top_k")}
        yield from typed_wrongs(STREAM if body.get("stream") else WHOLE, body)
        yield from _wrong_turns(body.get("messages") or [])

    def misunderstood(self, said: str) -> Fail:
        return Fail(400, "invalid_request_error", said)

    def error(self, fail: Fail) -> Any:
        error = {"type": fail.kind, "message": fail.message}
        if fail.kind != "insufficient":
            return ErrorResponse.model_validate({"type": "error", "error": error, "request_id": "req_1"}).to_dict()
        return {"type": "error", "error": error}

    def whole(self, path: str, body: Mapping[str, Any], say: Say) -> bytes:
        return message_of(body, say).to_json().encode()

    def events(self, path: str, body: Mapping[str, Any], speech: Speech) -> Iterable[bytes]:
        say = speech if isinstance(speech, Say) else Say(text=getattr(speech, "text", "so far"))
        message = message_of(body, say)
        blocks = message.content
        start = message.model_copy(update={"content": [], "stop_reason": None, "stop_details": None})
        start.usage = start.usage.model_copy(update={"output_tokens": 1})
        yield _event(types.RawMessageStartEvent(type="message_start", message=start))
        yield b'event: ping\ndata: {"type": "ping"}\n\n'
        for index, block in enumerate(blocks):
            yield from _block_events(index, block)
            if isinstance(speech, Cut):
                return
            if isinstance(speech, Fail):
                error = ErrorResponse.model_validate(self.error(speech))
                yield b"event: error\ndata: " + orjson.dumps(error.to_dict()) + b"\n\n"
                return
        delta = Delta(stop_reason=message.stop_reason, stop_details=message.stop_details)
        usage = types.MessageDeltaUsage(
            output_tokens=say.output_tokens, output_tokens_details=message.usage.output_tokens_details
        )
        yield _event(types.RawMessageDeltaEvent(type="message_delta", delta=delta, usage=usage))
        yield _event(types.RawMessageStopEvent(type="message_stop"))


def message_of(body: Mapping[str, Any], say: Say) -> types.Message:
    content: list[Any] = []
    if say.thought:
        content.append(types.ThinkingBlock(type="thinking", thinking=say.thought, signature=SIGNATURE))
        content.append(types.RedactedThinkingBlock(type="redacted_thinking", data="aGlkZGVu"))
    tool = body.get("tool_choice") or {}
    if tool.get("type") == "tool" and tool.get("name") == "json_answer":
        # the stand-in is made to call a tool whose input is the answer
        content.append(
            types.ToolUseBlock(type="tool_use", id="toolu_0", name="json_answer", input=orjson.loads(say.text))
        )
    elif say.text:
        content.append(types.TextBlock(type="text", text=say.text))
    content += [
        types.ToolUseBlock(type="tool_use", id=call.id, name=call.name, input=dict(call.arguments))
        for call in say.calls
    ]
    is_call = any(block.type == "tool_use" for block in content)
    refused = types.RefusalStopDetails(type="refusal", explanation=say.refusal) if say.finish == "refusal" else None
    return types.Message(
        id="msg_1",
        type="message",
        role="assistant",
        model=body["model"],
        content=content,
        stop_reason="tool_use" if is_call else _REASONS[say.finish],
        stop_details=refused,
        usage=types.Usage(
            input_tokens=say.prompt_tokens - say.cached_tokens - say.written_tokens,
            cache_read_input_tokens=say.cached_tokens,
            cache_creation_input_tokens=say.written_tokens,
            cache_creation=types.CacheCreation(
                ephemeral_1h_input_tokens=say.written_long_tokens,
                ephemeral_5m_input_tokens=say.written_tokens - say.written_long_tokens,
            ),
            output_tokens=say.output_tokens,
            output_tokens_details=types.OutputTokensDetails(thinking_tokens=say.thought_tokens),
            service_tier="standard",
        ),
    )


def _block_events(index: int, block: Any) -> Iterator[bytes]:
    empty = _EMPTY.get(block.type, {})
    start = block.model_copy(update=empty)
    yield _event(types.RawContentBlockStartEvent(type="content_block_start", index=index, content_block=start))
    for delta in _deltas(block):
        yield _event(types.RawContentBlockDeltaEvent(type="content_block_delta", index=index, delta=delta))
    yield _event(types.RawContentBlockStopEvent(type="content_block_stop", index=index))


def _deltas(block: Any) -> Iterator[Any]:
    match block.type:
        case "text":
            for piece in pieces_of(block.text):
                yield types.TextDelta(type="text_delta", text=piece)
        case "thinking":
            for piece in pieces_of(block.thinking):
                yield types.ThinkingDelta(type="thinking_delta", thinking=piece)
            yield types.SignatureDelta(type="signature_delta", signature=block.signature)
        case "tool_use" if block.input:
            yield types.InputJSONDelta(type="input_json_delta", partial_json="")
            for piece in pieces_of(orjson.dumps(block.input).decode()):
                yield types.InputJSONDelta(type="input_json_delta", partial_json=piece)


def _event(event: BaseModel) -> bytes:
    data = event.model_dump_json(exclude_unset=True)
    return f"event: {event.type}\ndata: {data}\n\n".encode()  # type: ignore[attr-defined]


def _wrong_turns(messages: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """What types cannot say: that every tool call is answered in the very next turn."""
    open_calls: set[str] = set()
    for index, message in enumerate(messages):
        blocks = message["content"] if isinstance(message["content"], list) else []
        results = {block["tool_use_id"] for block in blocks if block["type"] == "tool_result"}
        if open_calls != results:
            yield f"messages.{index}: tool_use ids {sorted(open_calls)} were answered by {sorted(results)}"
        open_calls = {block["id"] for block in blocks if block["type"] == "tool_use"}
        if any(block["type"] == "text" and not block["text"] for block in blocks):
            yield f"messages.{index}: text content blocks must be non-empty"
