"""Server-sent events: the bytes of a stream cut into whole events, and events written."""

from collections.abc import Iterator
from typing import Final

import orjson

MAX_EVENT_BYTES: Final = 8_000_000
"""More than this without the end of an event is not an event stream (base64 images stay below it)."""

DONE: Final = b"data: [DONE]\n\n"


class EventTooLong(ValueError):
    pass


class SseReader:
    """Fed with the bytes of one stream, gives back blocks of whole events as they came. Nothing is parsed."""

    __slots__ = ("_held", "_held_bytes", "_tail")

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._tail = b""

    def feed(self, chunk: bytes) -> bytes:
        """Take what the socket had, return the complete events in it (maybe none). Raises EventTooLong."""
        if not self._held and chunk.endswith(b"\n\n"):
            return chunk
        seen = self._tail + chunk  # what is held back was looked through when it came, but for its last bytes
        end = _end_of_last_event(seen)
        if end < 0:
            self._held.append(chunk)
            self._held_bytes += len(chunk)
            self._tail = seen[-3:]
            if self._held_bytes > MAX_EVENT_BYTES:
                raise EventTooLong(f"an event is longer than {MAX_EVENT_BYTES} bytes")
            return b""
        block = b"".join([*self._held, seen[len(self._tail) : end]])
        self._hold(seen[end:])
        return block

    def end(self) -> bytes:
        """The bytes are over: what was left without its closing blank line, stripped."""
        rest = b"".join(self._held).strip()
        self._hold(b"")
        return rest

    def _hold(self, rest: bytes) -> None:
        self._held = [rest] if rest else []
        self._held_bytes = len(rest)
        self._tail = rest[-3:]


def read_events(block: bytes) -> Iterator[bytes]:
    """The data of each event in a block of whole events."""
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    for event in block.split(b"\n\n"):
        start = 0 if event.startswith(b"data:") else event.find(b"\ndata:") + 1
        if not start and not event.startswith(b"data:"):
            continue
        data = event[start + 5 :].strip()
        if b"\n" in data:
            lines = event[start:].split(b"\n")
            data = b"\n".join([line[5:].strip() for line in lines if line.startswith(b"data:")])
        if data or not start:
            yield data


def write_event(data: object, name: str | None = None) -> bytes:
    """One event with `data` as JSON."""
    if name is None:
        return b"data: " + orjson.dumps(data) + b"\n\n"
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"


def without_end(block: bytes) -> bytes:
    """A stream's last block without its `[DONE]`."""
    before, separator, last = block.rpartition(b"data:")
    return before if separator and last.strip() == b"[DONE]" else block


def _end_of_last_event(data: bytes) -> int:
    """The index behind the last blank line in `data`, or -1."""
    end = data.rfind(b"\n\n")
    end = end + 2 if end >= 0 else -1
    if b"\r" in data:
        other = data.rfind(b"\r\n\r\n")
        end = max(end, other + 4 if other >= 0 else -1)
    return end
