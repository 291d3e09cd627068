"""Anthropic's messages and their event streams, read into OpenAI's chat completions."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import orjson

from appliance.core import Target, Usage
from appliance.errors import BackendGarbage
from appliance.wire.sse import token_count
from appliance.wire.stream_translator import ChunkTranslator, completion

FINISHES: Final[Mapping[str, str]] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
}
_TIERS: Final[Mapping[str, str]] = {"standard": "default", "priority": "priority", "batch": "flex"}
_REFUSED: Final = "The model declined to answer this request."


def read_message(target: Target, payload: Mapping[str, Any], answer_tool: str | None) -> tuple[dict[str, Any], Usage]:
    """A whole reply. `answer_tool`: the tool whose input is the answer's text. Raises BackendGarbage."""
    blocks = payload.get("content")
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise BackendGarbage(f"{target.name} answered without content")
    usage = read_counts(payload.get("usage"))
    choice = {"index": 0, "message": _message(blocks, answer_tool), "logprobs": None, **_ending(payload, answer_tool)}
    refusal = _refusal(payload)
    if refusal is not None:
        choice["message"]["refusal"] = refusal
    tier = _TIERS.get(str((payload.get("usage") or {}).get("service_tier")))
    identity, model = str(payload.get("id") or ""), str(payload.get("model") or target.model)
    return completion(identity, model, [choice], usage or Usage(), service_tier=tier), usage or Usage()


def _message(blocks: list[dict[str, Any]], answer_tool: str | None) -> dict[str, Any]:
    texts, thoughts, own, calls = [], [], [], []
    for block in blocks:
        match block.get("type"):
            case "text":
                texts.append(block.get("text") or "")
            case "thinking":
                thoughts.append(block.get("thinking") or "")
                own.append(block)
            case "redacted_thinking":
                own.append(block)
            case "tool_use" if block.get("name") == answer_tool:
                texts.append(orjson.dumps(block.get("input")).decode())
            case "tool_use":
                arguments = orjson.dumps(block.get("input") or {}).decode()
                function = {"name": block.get("name"), "arguments": arguments}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) if texts else None, "refusal": None}
    if any(thoughts):
        message["reasoning_content"] = "".join(thoughts)
    if own:
        message["thinking_blocks"] = own
    if calls:
        message["tool_calls"] = calls
    return message


def _ending(payload: Mapping[str, Any], answer_tool: str | None) -> dict[str, Any]:
    """Finish reason, and which stop sequence it was (as vLLM tells it)."""
    reason = str(payload.get("stop_reason"))
    finish = FINISHES.get(reason, "stop")
    if answer_tool is not None and finish == "tool_calls":
        finish = "stop"
    sequence = payload.get("stop_sequence")
    return {"finish_reason": finish, **({"stop_reason": sequence} if sequence else {})}


def _refusal(payload: Mapping[str, Any]) -> str | None:
    if payload.get("stop_reason") != "refusal":
        return None
    details = payload.get("stop_details")
    said = details.get("explanation") if isinstance(details, Mapping) else None
    return said or _REFUSED


def read_counts(fields: Any) -> Usage | None:
    """Token counts; Anthropic counts what is read from and written to its cache beside the other input."""
    if not isinstance(fields, Mapping):
        return None
    fresh = token_count(fields.get("input_tokens"))
    if fresh is None:
        return None
    read = token_count(fields.get("cache_read_input_tokens")) or 0
    written = token_count(fields.get("cache_creation_input_tokens")) or 0
    creation, made = fields.get("cache_creation"), fields.get("output_tokens_details")
    long = token_count(creation.get("ephemeral_1h_input_tokens")) if isinstance(creation, Mapping) else None
    return Usage(
        prompt_tokens=fresh + read + written,
        completion_tokens=token_count(fields.get("output_tokens")) or 0,
        cached_tokens=read,
        reasoning_tokens=(token_count(made.get("thinking_tokens")) or 0) if isinstance(made, Mapping) else 0,
        cache_write_tokens=written,
        cache_write_long_tokens=long or 0,
    )


class AnthropicStreamTranslator(ChunkTranslator):
    """One message's events. Counts in `message_delta` are totals, and complete those of `message_start`."""

    def __init__(self, model: str, *, keep_usage: bool, answer_tool: str | None) -> None:
        super().__init__(model, keep_usage=keep_usage)
        self._answer_tool = answer_tool
        self._counts: dict[str, Any] = {}
        self._blocks: dict[int, dict[str, Any]] = {}
        self._calls: dict[int, int] = {}
        """Content block -> index of the tool call."""
        self._thought = 0
        """Index of the next thinking block: OpenAI's SDK wants one on every list of a delta."""

    def _take(self, event: dict[str, Any]) -> Iterator[bytes]:
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

    def _start(self, message: Mapping[str, Any]) -> bytes:
        self.identity = str(message.get("id") or "")
        self._model = str(message.get("model") or self._model)
        self._count(message.get("usage"))
        return self._chunk({"role": "assistant", "content": ""})

    def _count(self, counts: Any) -> None:
        if isinstance(counts, Mapping):
            self._counts |= {name: value for name, value in counts.items() if value is not None}
            self.usage = read_counts(self._counts)

    def _block_start(self, index: int, block: dict[str, Any]) -> Iterator[bytes]:
        self._blocks[index] = block
        if block.get("text"):
            yield self._chunk({"content": block["text"]})
        if block.get("thinking"):
            yield self._chunk({"reasoning_content": block["thinking"]})
        if block.get("type") != "tool_use" or block.get("name") == self._answer_tool:
            return
        number = self._calls[index] = len(self._calls)
        text = orjson.dumps(block["input"]).decode() if block.get("input") else ""
        block["said"] = bool(text)
        function = {"name": block.get("name"), "arguments": text}
        yield self._chunk(
            {"tool_calls": [{"index": number, "id": block.get("id"), "type": "function", "function": function}]}
        )

    def _delta(self, index: int, delta: Mapping[str, Any]) -> Iterator[bytes]:
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
                block["said"] = True
                text = delta["partial_json"]
                if index not in self._calls:
                    yield self._chunk({"content": text})
                else:
                    call = {"index": self._calls[index], "function": {"arguments": text}}
                    yield self._chunk({"tool_calls": [call]})

    def _block_stop(self, index: int) -> Iterator[bytes]:
        block = self._blocks.pop(index, {})
        kind = block.get("type")
        if kind in ("thinking", "redacted_thinking"):
            yield self._chunk({"thinking_blocks": [{"index": self._thought, **block}]})
            self._thought += 1
        elif index in self._calls and not block.get("said"):
            call = {"index": self._calls[index], "function": {"arguments": "{}"}}
            yield self._chunk({"tool_calls": [call]})

    def _ends(self, event: Mapping[str, Any]) -> bytes:
        self._count(event.get("usage"))
        delta = event.get("delta") or {}
        ending = _ending(delta, self._answer_tool)
        refusal = _refusal(delta)
        said = {} if refusal is None else {"refusal": refusal}
        finish = ending.pop("finish_reason")
        return self._chunk(said, finish=finish, more=ending)
