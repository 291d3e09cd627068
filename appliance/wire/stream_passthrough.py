"""Streams that are passed on as they come: whole events go through as bytes, and few of them are ever parsed."""

import re
from abc import ABC, abstractmethod
from typing import ClassVar, Final

import orjson

from appliance.core import Usage
from appliance.core.json_types import JsonObject
from appliance.wire.sse import SseReader

_EVENT_END: Final = re.compile(rb"\r?\n\r?\n")


class StreamPassthrough(ABC):
    """It is a `StreamTranslator` that translates nothing. Subclasses say which events have to be read, and read them.

    One pass of `notable` over a block decides whether anything in it needs a look. A text that quotes these words has
    its quotes escaped inside JSON, so only fields match.
    """

    __slots__ = ("_reader", "done", "ending", "error", "finished_choices", "usage")
    notable: ClassVar[re.Pattern[bytes]]

    def __init__(self) -> None:
        self._reader = SseReader()
        self.usage: Usage | None = None
        self.error: object = None
        self.done = False
        self.finished_choices = 0
        self.ending = b""
        """The event that ended the stream, once it came."""

    def feed(self, chunk: bytes) -> bytes:
        block = self._reader.feed(chunk)
        return block if self.notable.search(block) is None else self._look_at(block)

    def end(self) -> bytes:
        rest = self._reader.end()
        return self._look_at(rest + b"\n\n") if b"data:" in rest else b""

    @abstractmethod
    def read_event(self, event: JsonObject) -> bool:
        """Set what a notable event says. False where it is not to be passed on."""

    def _look_at(self, block: bytes) -> bytes:
        kept = []
        start = 0
        for match in _EVENT_END.finditer(block):
            event, start = block[start : match.end()], match.end()
            if self.error is not None or self.done:
                break
            if self.notable.search(event) is None or self._note(event):
                kept.append(event)
        return b"".join(kept)

    def _note(self, event: bytes) -> bool:
        data = b"\n".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))
        if data == b"[DONE]":
            self.done, self.ending = True, event
            return True
        try:
            payload = orjson.loads(data)
        except orjson.JSONDecodeError:
            return True  # not ours to judge: bytes in are bytes out
        if not isinstance(payload, dict):
            return True
        is_passed = self.read_event(payload)
        if self.done:
            self.ending = event
        return is_passed and self.error is None
