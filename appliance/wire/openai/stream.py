"""Streams of chat chunks: a target's passed on as they are, and a verified whole reply written as one."""

import re
from collections.abc import Iterator, Mapping
from typing import Final, cast

import orjson

from appliance.core import Usage
from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.wire.chat_ir import ChatCompletion, ChatMessage, wants_usage
from appliance.wire.sse import DONE, SseReader, write_event
from appliance.wire.usage import read_usage

# One pass of the regex engine over a block decides whether anything in it needs a look. A text that quotes these words
# has its quotes escaped inside JSON, so only fields match.
_NOTABLE: Final = re.compile(rb'"usage"\s*:\s*\{|"finish_reason"\s*:\s*"|"error"\s*:\s*[{"]|\[DONE\]')
_EVENT_END: Final = re.compile(rb"\r?\n\r?\n")


class ChatStreamPassthrough:
    """Whole events go through as bytes; those that must be known are read. It is a `StreamTranslator`.

    `keep_usage`: whether the caller asked for the usage event; else an event that carries nothing else is left out.
    """

    __slots__ = ("_keep_usage", "_reader", "done", "error", "finished_choices", "usage")

    def __init__(self, *, keep_usage: bool) -> None:
        self._keep_usage = keep_usage
        self._reader = SseReader()
        self.usage: Usage | None = None
        self.error: object = None
        self.done = False
        self.finished_choices = 0

    def feed(self, chunk: bytes) -> bytes:
        block = self._reader.feed(chunk)
        return block if _NOTABLE.search(block) is None else self._look_at(block)

    def end(self) -> bytes:
        rest = self._reader.end()
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


def write_chat_stream(payload: JsonObject, body: JsonObject) -> Iterator[bytes]:
    """Events of a chat payload: each choice's message, its end, usage if `body` asked for it, the end."""
    reply = cast(ChatCompletion, payload)
    head: MutableJsonObject = {
        name: payload[name] for name in ("id", "created", "model", "system_fingerprint") if name in payload
    }
    head["object"] = "chat.completion.chunk"
    for position, choice in enumerate(reply["choices"]):
        index = choice.get("index", position)
        chunk: MutableJsonObject = {"index": index, "delta": _delta(choice["message"]), "finish_reason": None}
        if choice.get("logprobs") is not None:
            chunk["logprobs"] = choice["logprobs"]
        yield write_event({**head, "choices": [chunk]})
        end = {"index": index, "delta": {}, "finish_reason": choice.get("finish_reason")}
        yield write_event({**head, "choices": [end]})
    if wants_usage(body):
        yield write_event({**head, "choices": [], "usage": payload.get("usage")})
    yield DONE


def _delta(message: ChatMessage) -> JsonObject:
    """Rows of a list have an index each in a stream, which OpenAI's SDK puts them together by."""
    plain = cast(Mapping[str, object], message)
    rows = {name: value for name in ("tool_calls", "thinking_blocks") if isinstance(value := plain.get(name), list)}
    return {**plain, **{name: [{"index": at, **row} for at, row in enumerate(rows[name])] for name in rows}}
