"""Streams of chat chunks: a target's passed on as they are, and a verified whole reply written as one."""

import re
from collections.abc import Iterator, Mapping
from typing import cast

from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.wire.chat_ir import ChatCompletion, ChatMessage, wants_usage
from appliance.wire.sse import DONE, write_event
from appliance.wire.stream_passthrough import StreamPassthrough
from appliance.wire.usage import read_usage


class ChatStreamPassthrough(StreamPassthrough):
    """`keep_usage`: whether the caller asked for the usage event; else one that carries nothing else is left out."""

    __slots__ = ("_keep_usage",)
    notable = re.compile(rb'"usage"\s*:\s*\{|"finish_reason"\s*:\s*"|"error"\s*:\s*[{"]|\[DONE\]')

    def __init__(self, *, keep_usage: bool) -> None:
        super().__init__()
        self._keep_usage = keep_usage

    def read_event(self, event: JsonObject) -> bool:
        if event.get("error"):
            self.error = event["error"]
            return False
        choices = event.get("choices") or []
        self.finished_choices += sum(
            1 for choice in choices if isinstance(choice, dict) and choice.get("finish_reason")
        )
        if isinstance(event.get("usage"), dict):
            self.usage = read_usage(event["usage"])
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
