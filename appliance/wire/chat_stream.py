"""A chat's stream taken apart for those who write it anew in another dialect, event by event and never the whole."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import orjson

from appliance.errors import ApplianceError, StreamBroken


class DialectStreamWriter(Protocol):
    """Writes one stream of another dialect. Fed in order; each call gives the bytes that may go out now."""

    def feed(self, chunk: Mapping[str, Any]) -> bytes:
        """One chunk of a chat completion."""

    def end(self) -> bytes:
        """The chat was whole."""

    def fail(self, error: ApplianceError) -> bytes:
        """It was not, and nothing follows."""


class StreamRewriter:
    """Blocks of whole OpenAI events in, a writer's events out. Ends once, and never cleanly unless `[DONE]` came."""

    __slots__ = ("_writer", "has_failed", "is_over")

    def __init__(self, writer: DialectStreamWriter) -> None:
        self._writer = writer
        self.is_over = False
        self.has_failed = False
        """Whether it ended with an error: nothing more of the chat is wanted then."""

    def feed(self, block: bytes) -> bytes:
        out: list[bytes] = []
        for data in events_of(block):
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
            return self.fail(_error_of(chunk["error"]))
        try:
            return self._writer.feed(chunk)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            return self.fail(StreamBroken("an event of the stream is not what the dialect promises"))


def events_of(block: bytes) -> Iterator[bytes]:
    """The data of each event in a block of whole events."""
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    for event in block.split(b"\n\n"):
        if event.startswith(b"data:") and b"\n" not in event:
            yield event[5:].strip()
        elif b"data:" in event:
            data = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
            if data:
                yield data


def _error_of(fields: Any) -> ApplianceError:
    message = fields.get("message") if isinstance(fields, dict) else None
    return StreamBroken(message if isinstance(message, str) and message else "the stream broke off")


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The thinking in a message or delta, under either of the names that servers use."""
    text = message.get("reasoning_content") or message.get("reasoning")
    return text if isinstance(text, str) else ""


def thinking_blocks_of(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Those of a message or delta, without the index that they have in a delta."""
    blocks = message.get("thinking_blocks")
    return (
        [
            {name: value for name, value in block.items() if name != "index"}
            for block in blocks
            if isinstance(block, dict)
        ]
        if isinstance(blocks, list)
        else ()
    )


def counts_of(usage: Any) -> tuple[int, int, int, int]:
    """Tokens of a chat's usage: of the prompt, of those cached, of the answer, of those thinking. 0 where not told."""
    given = usage if isinstance(usage, dict) else {}
    prompt_details = given.get("prompt_tokens_details")
    answer_details = given.get("completion_tokens_details")
    return (
        _count(given.get("prompt_tokens")),
        _count(prompt_details.get("cached_tokens")) if isinstance(prompt_details, dict) else 0,
        _count(given.get("completion_tokens")),
        _count(answer_details.get("reasoning_tokens")) if isinstance(answer_details, dict) else 0,
    )


def _count(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0
