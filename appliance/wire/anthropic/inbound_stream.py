"""A chat's stream as Anthropic's events: one block after the other, each opened, filled and closed."""

from collections.abc import Mapping
from typing import Any, Final

import orjson

from appliance.errors import ApplianceError
from appliance.wire.anthropic.inbound_reply import (
    OWN_BLOCKS,
    head_of,
    is_hidden,
    own_blocks_of,
    stop_of,
    thinking_block,
    usage_of,
)
from appliance.wire.chat_stream import reasoning_of
from appliance.wire.opaque_state import foreign_of, pack

_PING: Final = b'event: ping\ndata: {"type":"ping"}\n\n'


class AnthropicStreamWriter:
    """`original`: the body that asked. `prompt_tokens`: an estimate, told first; the last event has the true count."""

    __slots__ = ("_call", "_choice", "_hides", "_index", "_kind", "_opened", "_original", "_refused", "_usage", "calls")

    def __init__(self, original: Mapping[str, Any], prompt_tokens: int) -> None:
        self._original = original
        self._hides = is_hidden(original)
        self._usage: Any = {"prompt_tokens": prompt_tokens}
        self._opened = False
        self._index = -1
        self._kind = ""
        """Of the block that is open: text, thinking or tool_use."""
        self._call = -1
        """Number of the tool call whose block is open."""
        self._choice: Mapping[str, Any] = {}
        self._refused = False
        self.calls = 0

    def feed(self, chunk: Mapping[str, Any]) -> bytes:
        out = b"" if self._opened else self._open(chunk)
        if isinstance(chunk.get("usage"), dict):
            self._usage = chunk["usage"]
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta")
            if delta:
                out += self._delta(delta)
            if choice.get("finish_reason"):
                self._choice = choice
        return out

    def end(self) -> bytes:
        reason, stop = stop_of(self._choice, self._original, self.calls > 0)
        delta = {"stop_reason": "refusal" if self._refused else reason, "stop_sequence": stop}
        last = {"type": "message_delta", "delta": delta, "usage": usage_of(self._usage)}
        opening = b"" if self._opened else self._open({})
        return opening + self._close() + _event(last) + _event({"type": "message_stop"})

    def fail(self, error: ApplianceError) -> bytes:
        return _event(error.to_anthropic())

    def _open(self, chunk: Mapping[str, Any]) -> bytes:
        self._opened = True
        rest: dict[str, Any] = {
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_of(self._usage),
        }
        return _event({"type": "message_start", "message": {**head_of(chunk), **rest}}) + _PING

    def _delta(self, delta: Mapping[str, Any]) -> bytes:
        out = self._thinking(delta)
        for name in ("content", "refusal"):
            text = delta.get(name)
            if isinstance(text, str) and text:
                self._refused = self._refused or name == "refusal"
                out += self._in_block("text", {"type": "text", "text": ""})
                out += self._filled({"type": "text_delta", "text": text})
        for call in delta.get("tool_calls") or ():
            out += self._tool_call(call)
        return out

    def _thinking(self, delta: Mapping[str, Any]) -> bytes:
        """Thinking comes as text, as signed blocks, or as text and then, once it is whole, its blocks."""
        text, blocks = reasoning_of(delta), own_blocks_of(delta)
        out = b""
        if text and (not blocks or self._kind == "thinking"):
            out += self._in_block("thinking", thinking_block({}, False))
            if not self._hides:
                out += self._filled({"type": "thinking_delta", "thinking": text})
        for block in blocks:
            out += self._thinking_block(block)
        foreign = foreign_of(delta, OWN_BLOCKS)
        if foreign:
            whole = {"type": "redacted_thinking", "data": pack(foreign)}
            out += self._close() + self._begin("redacted_thinking", whole) + self._close()
        return out

    def _thinking_block(self, block: Mapping[str, Any]) -> bytes:
        whole = thinking_block(block, self._hides)
        if whole["type"] == "redacted_thinking":
            return self._close() + self._begin("redacted_thinking", whole) + self._close()
        out = b""
        if self._kind != "thinking":
            out += self._in_block("thinking", thinking_block({}, False))
            if whole["thinking"]:
                out += self._filled({"type": "thinking_delta", "thinking": whole["thinking"]})
        if whole["signature"]:
            out += self._filled({"type": "signature_delta", "signature": whole["signature"]}) + self._close()
        return out

    def _tool_call(self, call: Mapping[str, Any]) -> bytes:
        number = call.get("index")
        if number is None:  # some servers send each call whole, without one
            number = self.calls if call.get("id") else self._call
        function = call.get("function") or {}
        out = b""
        if self._kind != "tool_use" or number != self._call:
            if number < self.calls:
                raise ValueError("a tool call goes on after the next one began")
            self._call, self.calls = number, number + 1
            block = {"type": "tool_use", "id": call.get("id") or "", "name": function["name"], "input": {}}
            out += self._close() + self._begin("tool_use", block)
        arguments = function.get("arguments")
        return out + self._filled({"type": "input_json_delta", "partial_json": arguments}) if arguments else out

    def _in_block(self, kind: str, empty: Mapping[str, Any]) -> bytes:
        return b"" if self._kind == kind else self._close() + self._begin(kind, empty)

    def _begin(self, kind: str, block: Mapping[str, Any]) -> bytes:
        self._index += 1
        self._kind = kind
        return _event({"type": "content_block_start", "index": self._index, "content_block": block})

    def _filled(self, delta: Mapping[str, Any]) -> bytes:
        return _event({"type": "content_block_delta", "index": self._index, "delta": delta})

    def _close(self) -> bytes:
        if not self._kind:
            return b""
        self._kind = ""
        return _event({"type": "content_block_stop", "index": self._index})


def _event(data: Mapping[str, Any]) -> bytes:
    return b"event: " + str(data["type"]).encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"
