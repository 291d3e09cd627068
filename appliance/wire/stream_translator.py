"""A provider's stream in another dialect, translated event by event into chunks of a chat."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import orjson

from appliance.core import Usage
from appliance.core.json_types import JsonObject
from appliance.wire.chat_ir import SHAPE_ERRORS, ChatChoice, ChatChunk, ChatCompletion, ChatDelta
from appliance.wire.sse import DONE, SseReader, read_events, write_event
from appliance.wire.usage import write_usage


def make_completion(
    identity: str, model: str, choices: Sequence[ChatChoice], usage: Usage, *, service_tier: str | None = None
) -> ChatCompletion:
    """A chat completion as OpenAI's API gives it."""
    made: ChatCompletion = {
        "id": identity,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": list(choices),
        "usage": write_usage(usage),
    }
    if service_tier is not None:
        made["service_tier"] = service_tier
    return made


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
