"""A chat's stream written anew in the caller's dialect, event by event and never the whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import orjson

from appliance.core.json_types import JsonObject
from appliance.errors import ApplianceError, StreamBroken
from appliance.wire.chat_ir import SHAPE_ERRORS, ChatChunk
from appliance.wire.sse import read_events


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
