"""A stream of another dialect's events, translated event by event into chunks of OpenAI's."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import orjson

from appliance.core import Usage
from appliance.wire.sse import DONE, MAX_EVENT_BYTES, EventTooLong

SHAPELESS: Final = (TypeError, AttributeError, KeyError, IndexError, ValueError)
"""What reading something of another shape raises."""


def wants_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    return isinstance(options, Mapping) and options.get("include_usage") is True


def chunk_event(payload: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def usage_fields(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
        },
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def completion(
    identity: str, model: str, choices: Sequence[Mapping[str, Any]], usage: Usage, **more: Any
) -> dict[str, Any]:
    """A chat completion as OpenAI's API gives it."""
    return {
        "id": identity,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": list(choices),
        "usage": usage_fields(usage),
        **{name: value for name, value in more.items() if value is not None},
    }


class ChunkTranslator(ABC):
    """The part of a translated stream that all dialects share: events in, chunks out. Subclasses say `_take`."""

    def __init__(self, model: str, *, keep_usage: bool) -> None:
        self._model = model
        self._keep_usage = keep_usage
        self._held = b""
        self._created = int(time.time())
        self.identity = ""
        self.usage: Usage | None = None
        self.error: Any = None
        self.done = False
        self.finished_choices = 0

    def feed(self, chunk: bytes) -> bytes:
        data = (self._held + chunk) if self._held else chunk
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        events, separator, rest = data.rpartition(b"\n\n")
        self._held = rest if separator else data
        if len(self._held) > MAX_EVENT_BYTES:
            raise EventTooLong(f"an event is longer than {MAX_EVENT_BYTES} bytes")
        return self._translated(events.split(b"\n\n")) if separator else b""

    def end(self) -> bytes:
        rest, self._held = self._held, b""
        return self._translated([rest]) + self._last()

    def _last(self) -> bytes:
        """For dialects without an event at the end."""
        return b""

    def _translated(self, events: Iterable[bytes]) -> bytes:
        out: list[bytes] = []
        for event in events:
            if self.error is not None or self.done:
                break
            data = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
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
                except SHAPELESS:
                    self.error = {"message": "an event of a shape that the dialect does not have"}
        return b"".join(out)

    @abstractmethod
    def _take(self, event: dict[str, Any]) -> Iterator[bytes]:
        """What one event of the dialect becomes; `error`, `usage` and `done` are set on the way."""

    def _chunk(
        self,
        delta: Mapping[str, Any],
        *,
        index: int = 0,
        finish: str | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> bytes:
        """`more`: fields of the choice beside its delta."""
        if finish is not None:
            self.finished_choices += 1
        choice = {"index": index, "delta": delta, "finish_reason": finish, **(more or {})}
        return chunk_event({**self._head(), "choices": [choice]})

    def _head(self) -> dict[str, Any]:
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
        return chunk_event({**self._head(), "choices": [], "usage": usage_fields(self.usage)}) + DONE
