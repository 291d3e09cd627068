"""Streams of Gemini's responses: a target's read into chunks of a chat, a chat's written for a caller."""

from collections.abc import Iterator, Sequence
from typing import TypedDict

import orjson

from appliance.core import Usage
from appliance.core.json_types import JsonObject
from appliance.errors import ApplianceError
from appliance.wire.chat_ir import ChatChoice, ChatChunk, ChatDelta, ToolCall, wants_usage
from appliance.wire.dialect import WireRequest
from appliance.wire.gemini.reply import (
    FINISH_REASONS,
    GEMINI_USAGE,
    CandidateParts,
    Part,
    read_block,
    read_logprobs,
    sign_parts,
    wants_thoughts,
    write_call_part,
    write_candidate,
    write_gemini_error,
    write_gemini_usage,
    write_head,
    write_parts,
)
from appliance.wire.streams import ChunkTranslator, StreamStart
from appliance.wire.usage import read_usage


class GeminiStreamTranslator(ChunkTranslator):
    """A stream of responses, each with the parts that are new. The last one of a candidate has its finish reason; the
    stream itself has no event at its end."""

    def __init__(self, request: WireRequest) -> None:
        body = request.outgoing.body
        super().__init__(request.target.model, keep_usage=wants_usage(body))
        choices = body.get("n")
        self._choices = choices if isinstance(choices, int) else 1
        self._parts: dict[int, CandidateParts] = {}

    def _take(self, event: JsonObject) -> Iterator[bytes]:
        if event.get("error"):
            self.error = event["error"]
            return
        self.identity = str(event.get("responseId") or self.identity)
        self._model = str(event.get("modelVersion") or self._model)
        self.usage = GEMINI_USAGE.read(event.get("usageMetadata")) or self.usage
        refusal = read_block(event)
        if refusal is not None:
            yield self._chunk({"role": "assistant", "refusal": refusal}, finish="content_filter")
        for position, candidate in enumerate(event.get("candidates") or ()):
            yield from self._candidate(candidate, candidate.get("index", position))

    def _candidate(self, candidate: JsonObject, index: int) -> Iterator[bytes]:
        is_first = index not in self._parts
        parts = self._parts.setdefault(index, CandidateParts(self.identity, index))
        delta = parts.read((candidate.get("content") or {}).get("parts") or ())
        logprobs = read_logprobs(candidate.get("logprobsResult"))
        if is_first:
            delta = {"role": "assistant", **delta}
        reason = candidate.get("finishReason")
        if delta or logprobs:
            yield self._chunk(delta, index=index, more={"logprobs": logprobs} if logprobs else None)
        if reason is None:
            return
        if reason not in FINISH_REASONS:
            self.error = {"message": f"no answer came about ({reason}) {candidate.get('finishMessage') or ''}".rstrip()}
            return
        yield self._chunk({}, index=index, finish=parts.finish_reason(reason))

    def _last(self) -> bytes:
        is_over = self.finished_choices >= self._choices or (self.finished_choices > 0 and not self._parts)
        return self._finish() if is_over and self.error is None and not self.done else b""


class _Call(TypedDict, total=False):
    """A function call while its pieces come in."""

    id: str
    name: str
    arguments: list[str]
    extra_content: JsonObject
    is_written: bool


class GeminiStreamWriter:
    """A stream of responses: as events, or as a JSON list that grows. Function calls are given once they are whole."""

    def __init__(self, start: StreamStart) -> None:
        self._shows_thoughts = wants_thoughts(start.original)
        self._as_events = start.as_events
        self._count = 0
        self._head = write_head({})
        self._usage = Usage()
        self._calls: dict[tuple[int, int], _Call] = {}
        """By candidate and the call's number in it."""
        self._finished: dict[int, ChatChoice] = {}
        self._refused: set[int] = set()

    def feed(self, chunk: ChatChunk) -> bytes:
        if chunk.get("id"):
            self._head = write_head(chunk)
        self._usage = read_usage(chunk.get("usage")) or self._usage
        out = b""
        for choice in chunk.get("choices") or ():
            index, delta = choice.get("index") or 0, choice.get("delta") or {}
            if delta.get("refusal"):
                self._refused.add(index)
            parts = sign_parts(write_parts(delta, self._shows_thoughts), delta)
            parts = [*self._whole_calls(index, delta), *parts] if delta.get("tool_calls") else parts
            if parts:
                out += self._response([write_candidate(index, parts, {**choice, "finish_reason": None})])
            if choice.get("finish_reason"):
                self._finished[index] = {**choice, "logprobs": None}
        return out

    def end(self) -> bytes:
        """What ends an answer comes with its usage, in the last response."""
        candidates = [
            write_candidate(index, self._rest_of(index), choice, index in self._refused)
            for index, choice in sorted(self._finished.items())
        ]
        candidates = candidates or [write_candidate(0, self._rest_of(0), {"finish_reason": "stop"})]
        usage = write_gemini_usage(self._usage)
        return self._response(candidates, usage) + (b"" if self._as_events else b"]")

    def fail(self, error: ApplianceError) -> bytes:
        return self._written(write_gemini_error(error)) + (b"" if self._as_events else b"]")

    def _whole_calls(self, index: int, delta: ChatDelta) -> list[Part]:
        """Take in pieces of calls; the calls before the one that a piece belongs to are whole."""
        done: list[Part] = []
        for piece in delta["tool_calls"]:
            number = piece.get("index")
            if number is None:  # some servers send each call whole, without one
                number = sum(1 for one, _ in self._calls if one == index)
            if (index, number) not in self._calls:
                done += self._rest_of(index)
                self._calls[index, number] = {"arguments": []}
            self._add_piece(self._calls[index, number], piece)
        return done

    def _add_piece(self, call: _Call, piece: ToolCall) -> None:
        if "is_written" in call:
            raise ValueError("a tool call goes on after the next one began")
        function = piece.get("function") or {}
        if piece.get("id"):
            call["id"] = piece["id"]
        if function.get("name"):
            call["name"] = function["name"]
        if isinstance(piece.get("extra_content"), dict):
            call["extra_content"] = piece["extra_content"]
        call["arguments"].append(function.get("arguments") or "")

    def _rest_of(self, index: int) -> list[Part]:
        """The calls of one candidate that have not been given yet."""
        parts = []
        for (owner, _), call in self._calls.items():
            if owner == index and "is_written" not in call:
                whole: ToolCall = {"id": call.get("id", ""), "extra_content": call.get("extra_content", {})}
                whole["function"] = {"name": call["name"], "arguments": "".join(call["arguments"])}
                call["is_written"] = True
                parts.append(write_call_part(whole))
        return parts

    def _response(self, candidates: Sequence[JsonObject], usage: JsonObject | None = None) -> bytes:
        counts = {} if usage is None else {"usageMetadata": usage}
        return self._written({"candidates": list(candidates), **counts, **self._head})

    def _written(self, response: JsonObject) -> bytes:
        self._count += 1
        if self._as_events:
            return b"data: " + orjson.dumps(response) + b"\r\n\r\n"
        return (b"[" if self._count == 1 else b",\r\n") + orjson.dumps(response)
