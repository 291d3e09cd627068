"""A stream of one dialect made into a stream of another, event by event and never the whole.

A target's stream becomes chunks of a chat (`StreamTranslator`); a chat's chunks become the caller's (`StreamWriter`).
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import orjson

from appliance.core import Usage
from appliance.core.json_types import JsonObject
from appliance.errors import ApplianceError, StreamBroken
from appliance.wire.chat_ir import SHAPE_ERRORS, ChatChoice, ChatChunk, ChatDelta, ToolCall
from appliance.wire.sse import DONE, SseReader, read_events, write_event
from appliance.wire.usage import read_usage, write_usage


class StreamTranslator(Protocol):
    """The bytes of one stream in passing: what comes in is the target's, what goes out are events of a chat."""

    usage: Usage | None
    error: object
    """The error object of an error event; nothing after it is passed on, nor is the event itself."""
    done: bool
    """Whether the end of the stream came and was passed on."""
    finished_choices: int

    def feed(self, chunk: bytes) -> bytes:
        """Take what the socket had, return complete events (maybe none). Raises EventTooLong."""

    def end(self) -> bytes:
        """The bytes are over: what is still to be passed on."""


class ChunkTranslator(ABC):
    """What all translated streams share: events in, chunks out. Subclasses say what an event becomes (`_take`).

    It is a `StreamTranslator`.
    """

    def __init__(self, model: str, *, keep_usage: bool) -> None:
        self._model = model
        self._keep_usage = keep_usage
        self._reader = SseReader()
        self._created = int(time.time())
        self.identity = ""
        self.usage: Usage | None = None
        self.error: object = None
        self.done = False
        self.finished_choices = 0

    def feed(self, chunk: bytes) -> bytes:
        block = self._reader.feed(chunk)
        return self._translated(read_events(block)) if block else b""

    def end(self) -> bytes:
        return self._translated(read_events(self._reader.end())) + self._last()

    def _last(self) -> bytes:
        """For dialects without an event at the end."""
        return b""

    def _translated(self, events: Iterable[bytes]) -> bytes:
        out: list[bytes] = []
        for data in events:
            if self.error is not None or self.done:
                break
            if not data:
                continue
            try:
                payload = orjson.loads(data)
            except orjson.JSONDecodeError:
                self.error = {"message": f"an event that is not JSON: {data[:60]!r}"}
                break
            if isinstance(payload, dict):
                try:
                    out.extend(self._take(payload))
                except SHAPE_ERRORS:
                    self.error = {"message": "an event of a shape that the dialect does not have"}
        return b"".join(out)

    @abstractmethod
    def _take(self, event: JsonObject) -> Iterator[bytes]:
        """What one event of the dialect becomes; `error`, `usage` and `done` are set on the way."""

    def _chunk(
        self, delta: ChatDelta, *, index: int = 0, finish: str | None = None, more: ChatChoice | None = None
    ) -> bytes:
        """`more`: fields of the choice beside its delta."""
        if finish is not None:
            self.finished_choices += 1
        choice: ChatChoice = {"index": index, "delta": delta, "finish_reason": finish}
        return write_event({**self._head(), "choices": [{**choice, **more} if more else choice]})

    def _head(self) -> ChatChunk:
        return {
            "id": self.identity,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
        }

    def _finish(self) -> bytes:
        """Usage where it was asked for, and the end."""
        self.done = True
        if not self._keep_usage or self.usage is None:
            return DONE
        return write_event({**self._head(), "choices": [], "usage": write_usage(self.usage)}) + DONE


@dataclass(frozen=True, slots=True)
class StreamStart:
    """What is known of a stream before its first chunk."""

    original: JsonObject
    """The body that asked for it, in the caller's dialect."""
    prompt_tokens: int = 0
    """An estimate, for dialects that report it first; the last event has the true count."""
    as_events: bool = True
    """False: as a JSON list that grows, where the dialect knows such streams (Gemini)."""


class StreamWriter(Protocol):
    """Writes one stream of another dialect. Fed in order; each call gives the bytes that may go out now."""

    def feed(self, chunk: ChatChunk) -> bytes:
        """One chunk of a chat completion. Raises one of SHAPE_ERRORS where it is none."""

    def end(self) -> bytes:
        """The chat was whole."""

    def fail(self, error: ApplianceError) -> bytes:
        """It was not, and nothing follows."""


class ItemStreamWriter(ABC):
    """What writers share whose dialect has one choice, written as items (blocks) one after the other.

    It is a `StreamWriter`, but for `end` and `fail`.
    """

    def __init__(self, start: StreamStart) -> None:
        self._original = start.original
        self._usage = Usage()
        self._choice: ChatChoice = {}
        """The one that ended the answer."""
        self._calls = 0
        self._has_begun = False

    def feed(self, chunk: ChatChunk) -> bytes:
        out = self._begin_once(chunk)
        self._usage = read_usage(chunk.get("usage")) or self._usage
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta")
            if delta:
                out += self._delta(delta, choice)
            if choice.get("finish_reason"):
                self._choice = choice
        return out

    def _begin_once(self, chunk: ChatChunk) -> bytes:
        if self._has_begun:
            return b""
        self._has_begun = True
        return self._begin(chunk)

    def _delta(self, delta: ChatDelta, choice: ChatChoice) -> bytes:
        out = self._think(delta)
        content, refusal = delta.get("content"), delta.get("refusal")
        if isinstance(content, str) and content:
            out += self._say(content, choice)
        if isinstance(refusal, str) and refusal:
            out += self._refuse(refusal)
        for call in delta.get("tool_calls") or ():
            out += self._call(call)
        return out

    def _call(self, call: ToolCall) -> bytes:
        number = call.get("index")
        if number is None:  # some servers send each call whole, without one
            number = self._calls if call.get("id") else self._calls - 1
        function = call.get("function") or {}
        out = b""
        if not self._is_in_call() or number != self._calls - 1:
            if number < self._calls:
                raise ValueError("a tool call goes on after the next one began")
            self._calls = number + 1
            out += self._begin_call(str(call.get("id") or ""), str(function["name"]))
        arguments = function.get("arguments")
        return out + self._add_arguments(arguments) if arguments else out

    @abstractmethod
    def _begin(self, chunk: ChatChunk) -> bytes:
        """What comes before all items."""

    @abstractmethod
    def _think(self, delta: ChatDelta) -> bytes:
        """Thinking, and what other dialects want back."""

    @abstractmethod
    def _say(self, text: str, choice: ChatChoice) -> bytes: ...

    @abstractmethod
    def _refuse(self, text: str) -> bytes: ...

    @abstractmethod
    def _is_in_call(self) -> bool:
        """Whether the open item is a tool call."""

    @abstractmethod
    def _begin_call(self, call_id: str, name: str) -> bytes: ...

    @abstractmethod
    def _add_arguments(self, text: str) -> bytes: ...


class StreamRewriter:
    """Blocks of whole chat events in, a writer's events out. Ends once, and never cleanly unless `[DONE]` came."""

    __slots__ = ("_writer", "has_failed", "is_over")

    def __init__(self, writer: StreamWriter) -> None:
        self._writer = writer
        self.is_over = False
        self.has_failed = False
        """Whether it ended with an error: nothing more of the chat is wanted then."""

    def feed(self, block: bytes) -> bytes:
        out: list[bytes] = []
        for data in read_events(block):
            if self.is_over:
                break
            if data == b"[DONE]":
                self.is_over = True
                out.append(self._writer.end())
                break
            out.append(self._event(data))
        return b"".join(out)

    def close(self) -> bytes:
        """What is left to say where the chat's stream ended without saying so."""
        return b"" if self.is_over else self.fail(StreamBroken("the stream ended in the middle of the answer"))

    def fail(self, error: ApplianceError) -> bytes:
        if self.is_over:
            return b""
        self.is_over = self.has_failed = True
        return self._writer.fail(error)

    def _event(self, data: bytes) -> bytes:
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            return self.fail(StreamBroken("an event of the stream is not JSON"))
        if not isinstance(chunk, dict):
            return self.fail(StreamBroken("an event of the stream is not an object"))
        if chunk.get("error"):
            return self.fail(_stream_error(chunk["error"]))
        try:
            return self._writer.feed(cast(ChatChunk, chunk))
        except SHAPE_ERRORS:
            return self.fail(StreamBroken("an event of the stream is not what the dialect promises"))


def _stream_error(fields: object) -> ApplianceError:
    message = fields.get("message") if isinstance(fields, Mapping) else None
    return StreamBroken(message if isinstance(message, str) and message else "the stream broke off")
