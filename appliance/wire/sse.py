"""A stream of server-sent events in passing: whole events go through as bytes; few of them are ever parsed."""

import re
from typing import Any, Final

import orjson

from appliance.core import Usage

# One pass of the regex engine over a block decides whether anything in it needs a look. A text that quotes these words
# has its quotes escaped inside JSON, so only fields match.
_NOTABLE: Final = re.compile(rb'"usage"\s*:\s*\{|"finish_reason"\s*:\s*"|"error"\s*:\s*[{"]|\[DONE\]')
_EVENT_END: Final = re.compile(rb"\r?\n\r?\n")

MAX_EVENT_BYTES: Final = 8_000_000
"""More than this without the end of an event is not an event stream (base64 images stay below it)."""

DONE: Final = b"data: [DONE]\n\n"

MOST_TOKENS: Final = 1_000_000_000
"""More than this in one call is no count; no ledger could hold what it would cost."""


class EventTooLong(ValueError):
    pass


class SseReader:
    """Fed with the bytes of one reply, gives back whole events to pass on, and remembers what they said.

    `keep_usage`: whether the caller asked for the usage event; else an event that carries nothing else is left out.
    """

    __slots__ = ("_held", "_held_bytes", "_keep_usage", "_tail", "done", "error", "finished_choices", "usage")

    def __init__(self, *, keep_usage: bool) -> None:
        self._keep_usage = keep_usage
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._tail = b""
        self.usage: Usage | None = None
        self.error: Any = None
        """The error object of an error event; nothing after it is passed on, nor is the event itself."""
        self.done = False
        """Whether `[DONE]` came."""
        self.finished_choices = 0

    def feed(self, chunk: bytes) -> bytes:
        """Take what the socket had, return the complete events in it (maybe none). Raises EventTooLong."""
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
        return block if _NOTABLE.search(block) is None else self._look_at(block)

    def _hold(self, rest: bytes) -> None:
        self._held = [rest] if rest else []
        self._held_bytes = len(rest)
        self._tail = rest[-3:]

    def end(self) -> bytes:
        """The reply's bytes are over: whatever was left without its closing blank line, as an event."""
        rest = b"".join(self._held).strip()
        self._hold(b"")
        return self._look_at(rest + b"\n\n") if rest.startswith(b"data:") else b""

    def _look_at(self, block: bytes) -> bytes:
        kept = []
        start = 0
        for match in _EVENT_END.finditer(block):
            event, start = block[start : match.end()], match.end()
            if self.error is not None or self.done:
                break
            if _NOTABLE.search(event) is None or self._note(event):
                kept.append(event)
        return b"".join(kept)

    def _note(self, event: bytes) -> bool:
        """Remember what a notable event says. False where it is not to be passed on."""
        data = b"\n".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))
        if data == b"[DONE]":
            self.done = True
            return True
        try:
            payload = orjson.loads(data)
        except orjson.JSONDecodeError:
            return True  # not ours to judge: bytes in are bytes out
        if not isinstance(payload, dict):
            return True
        if payload.get("error"):
            self.error = payload["error"]
            return False
        choices = payload.get("choices") or []
        self.finished_choices += sum(
            1 for choice in choices if isinstance(choice, dict) and choice.get("finish_reason")
        )
        if isinstance(payload.get("usage"), dict):
            self.usage = read_usage(payload["usage"])
            return bool(choices) or self._keep_usage
        return True


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


def read_usage(fields: Any) -> Usage | None:
    """Token counts under either of OpenAI's two namings; None where there are none to be trusted."""
    if not isinstance(fields, dict):
        return None
    prompt = token_count(fields.get("prompt_tokens", fields.get("input_tokens")))
    if prompt is None:
        return None
    taken = fields.get("prompt_tokens_details") or fields.get("input_tokens_details") or {}
    made = fields.get("completion_tokens_details") or fields.get("output_tokens_details") or {}
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=token_count(fields.get("completion_tokens", fields.get("output_tokens"))) or 0,
        cached_tokens=token_count(taken.get("cached_tokens")) or 0 if isinstance(taken, dict) else 0,
        reasoning_tokens=token_count(made.get("reasoning_tokens")) or 0 if isinstance(made, dict) else 0,
        cache_write_tokens=token_count(taken.get("cache_write_tokens")) or 0 if isinstance(taken, dict) else 0,
    )


def token_count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS else None
