"""Streams of Anthropic's events: a target's read into chunks of a chat, a chat's written for a caller."""

from collections.abc import Iterator, Mapping
from typing import Final

from appliance.core import Usage
from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.errors import ApplianceError
from appliance.wire.anthropic.outbound import answer_tool
from appliance.wire.anthropic.reply import (
    ANTHROPIC_USAGE,
    OWN_BLOCKS,
    hides_thinking,
    own_thinking_blocks,
    read_ending,
    read_refusal,
    write_anthropic_error,
    write_anthropic_usage,
    write_head,
    write_state_block,
    write_stop,
    write_thinking_block,
)
from appliance.wire.chat_ir import ChatChoice, ChatChunk, ChatDelta, ToolCall, json_text, reasoning_text, wants_usage
from appliance.wire.dialect import WireRequest
from appliance.wire.sse import write_event
from appliance.wire.streams import ChunkTranslator, ItemStreamWriter, StreamStart

_PING: Final = b'event: ping\ndata: {"type":"ping"}\n\n'


class AnthropicStreamTranslator(ChunkTranslator):
    """One message's events. Counts in `message_delta` are totals, and complete those of `message_start`."""

    def __init__(self, request: WireRequest) -> None:
        body = request.outgoing.body
        super().__init__(request.target.model, keep_usage=wants_usage(body))
        self._answer_tool = answer_tool(body)
        self._counts: MutableJsonObject = {}
        self._blocks: dict[int, MutableJsonObject] = {}
        self._calls: dict[int, int] = {}
        """Content block -> index of the tool call."""
        self._thought = 0
        """Index of the next thinking block: OpenAI's SDK wants one on every list of a delta."""

    def _take(self, event: JsonObject) -> Iterator[bytes]:
        match event.get("type"):
            case "message_start":
                yield self._start(event.get("message") or {})
            case "content_block_start":
                yield from self._block_start(event.get("index", 0), dict(event.get("content_block") or {}))
            case "content_block_delta":
                yield from self._delta(event.get("index", 0), event.get("delta") or {})
            case "content_block_stop":
                yield from self._block_stop(event.get("index", 0))
            case "message_delta":
                yield self._ends(event)
            case "message_stop":
                yield self._finish()
            case "error":
                self.error = event.get("error") or event

    def _start(self, message: JsonObject) -> bytes:
        self.identity = str(message.get("id") or "")
        self._model = str(message.get("model") or self._model)
        self._count(message.get("usage"))
        return self._chunk({"role": "assistant", "content": ""})

    def _count(self, counts: object) -> None:
        if isinstance(counts, Mapping):
            self._counts |= {name: value for name, value in counts.items() if value is not None}
            self.usage = ANTHROPIC_USAGE.read(self._counts)

    def _block_start(self, index: int, block: MutableJsonObject) -> Iterator[bytes]:
        self._blocks[index] = block
        if block.get("text"):
            yield self._chunk({"content": block["text"]})
        if block.get("thinking"):
            yield self._chunk({"reasoning_content": block["thinking"]})
        if block.get("type") != "tool_use" or block.get("name") == self._answer_tool:
            return
        number = self._calls[index] = len(self._calls)
        text = json_text(block["input"]) if block.get("input") else ""
        block["has_arguments"] = bool(text)
        call: ToolCall = {"index": number, "id": block["id"], "type": "function"}
        call["function"] = {"name": block["name"], "arguments": text}
        yield self._chunk({"tool_calls": [call]})

    def _delta(self, index: int, delta: JsonObject) -> Iterator[bytes]:
        block = self._blocks.setdefault(index, {})
        match delta.get("type"):
            case "text_delta":
                yield self._chunk({"content": delta.get("text", "")})
            case "thinking_delta":
                block["thinking"] = block.get("thinking", "") + delta.get("thinking", "")
                yield self._chunk({"reasoning_content": delta.get("thinking", "")})
            case "signature_delta":
                block["signature"] = delta.get("signature", "")
            case "input_json_delta" if delta.get("partial_json"):
                block["has_arguments"] = True
                text = delta["partial_json"]
                if index in self._calls:
                    yield self._arguments(index, text)
                else:
                    yield self._chunk({"content": text})

    def _block_stop(self, index: int) -> Iterator[bytes]:
        block = self._blocks.pop(index, {})
        if block.get("type") in OWN_BLOCKS:
            yield self._chunk({"thinking_blocks": [{"index": self._thought, **block}]})
            self._thought += 1
        elif index in self._calls and not block.get("has_arguments"):
            yield self._arguments(index, "{}")

    def _arguments(self, index: int, text: str) -> bytes:
        return self._chunk({"tool_calls": [{"index": self._calls[index], "function": {"arguments": text}}]})

    def _ends(self, event: JsonObject) -> bytes:
        self._count(event.get("usage"))
        delta = event.get("delta") or {}
        ending = read_ending(delta, self._answer_tool)
        refusal = read_refusal(delta)
        return self._chunk({} if refusal is None else {"refusal": refusal}, finish=ending["finish_reason"], more=ending)


class AnthropicStreamWriter(ItemStreamWriter):
    """One block after the other, each opened, filled and closed."""

    def __init__(self, start: StreamStart) -> None:
        super().__init__(start)
        self._hides = hides_thinking(start.original)
        self._usage = Usage(prompt_tokens=start.prompt_tokens)
        self._index = -1
        self._kind = ""
        """Of the block that is open: text, thinking or tool_use."""
        self._refused = False

    def end(self) -> bytes:
        reason, stop = write_stop(self._choice, self._original, self._calls > 0)
        delta = {"stop_reason": "refusal" if self._refused else reason, "stop_sequence": stop}
        last = {"type": "message_delta", "delta": delta, "usage": write_anthropic_usage(self._usage)}
        return self._begin_once({}) + self._close() + _event(last) + _event({"type": "message_stop"})

    def fail(self, error: ApplianceError) -> bytes:
        return _event(write_anthropic_error(error))

    def _begin(self, chunk: ChatChunk) -> bytes:
        rest: JsonObject = {
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": write_anthropic_usage(self._usage),
        }
        return _event({"type": "message_start", "message": {**write_head(chunk), **rest}}) + _PING

    def _say(self, text: str, choice: ChatChoice) -> bytes:
        return self._in_block("text", {"type": "text", "text": ""}) + self._filled({"type": "text_delta", "text": text})

    def _refuse(self, text: str) -> bytes:
        self._refused = True
        return self._say(text, {})

    def _think(self, delta: ChatDelta) -> bytes:
        """Thinking comes as text, as signed blocks, or as text and then, once it is whole, its blocks."""
        text, blocks = reasoning_text(delta), own_thinking_blocks(delta)
        out = b""
        if text and (not blocks or self._kind == "thinking"):
            out += self._in_block("thinking", write_thinking_block({}, False))
            if not self._hides:
                out += self._filled({"type": "thinking_delta", "thinking": text})
        for block in blocks:
            out += self._thinking_block(block)
        state = write_state_block(delta)
        return out if state is None else out + self._whole_block(state)

    def _thinking_block(self, block: JsonObject) -> bytes:
        whole = write_thinking_block(block, self._hides)
        if whole["type"] == "redacted_thinking":
            return self._whole_block(whole)
        out = b""
        if self._kind != "thinking":
            out += self._in_block("thinking", write_thinking_block({}, False))
            if whole["thinking"]:
                out += self._filled({"type": "thinking_delta", "thinking": whole["thinking"]})
        if whole["signature"]:
            out += self._filled({"type": "signature_delta", "signature": whole["signature"]}) + self._close()
        return out

    def _is_in_call(self) -> bool:
        return self._kind == "tool_use"

    def _begin_call(self, call_id: str, name: str) -> bytes:
        return self._close() + self._begin_block(
            "tool_use", {"type": "tool_use", "id": call_id, "name": name, "input": {}}
        )

    def _add_arguments(self, text: str) -> bytes:
        return self._filled({"type": "input_json_delta", "partial_json": text})

    def _in_block(self, kind: str, empty: JsonObject) -> bytes:
        return b"" if self._kind == kind else self._close() + self._begin_block(kind, empty)

    def _whole_block(self, block: JsonObject) -> bytes:
        return self._close() + self._begin_block(str(block["type"]), block) + self._close()

    def _begin_block(self, kind: str, block: JsonObject) -> bytes:
        self._index += 1
        self._kind = kind
        return _event({"type": "content_block_start", "index": self._index, "content_block": block})

    def _filled(self, delta: JsonObject) -> bytes:
        return _event({"type": "content_block_delta", "index": self._index, "delta": delta})

    def _close(self) -> bytes:
        if not self._kind:
            return b""
        self._kind = ""
        return _event({"type": "content_block_stop", "index": self._index})


def _event(data: JsonObject) -> bytes:
    return write_event(data, str(data["type"]))
