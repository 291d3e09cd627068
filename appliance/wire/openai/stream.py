"""A verified whole chat reply as the stream that its caller asked for."""

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

DONE = b"data: [DONE]\n\n"


def stream_of(payload: Mapping[str, Any], body: Mapping[str, Any]) -> Iterator[bytes]:
    """Server-sent events of a chat payload: each choice's message, its end, usage if `body` asked for it, the end."""
    head = {name: payload[name] for name in ("id", "created", "model", "system_fingerprint") if name in payload}
    head["object"] = "chat.completion.chunk"
    for position, choice in enumerate(payload["choices"]):
        index = choice.get("index", position)
        chunk = {"index": index, "delta": _delta(choice["message"]), "finish_reason": None}
        if choice.get("logprobs") is not None:
            chunk["logprobs"] = choice["logprobs"]
        yield event({**head, "choices": [chunk]})
        end = {"index": index, "delta": {}, "finish_reason": choice.get("finish_reason")}
        yield event({**head, "choices": [end]})
    if (body.get("stream_options") or {}).get("include_usage"):
        yield event({**head, "choices": [], "usage": payload.get("usage")})
    yield DONE


def _delta(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rows of a list have an index each in a stream, which OpenAI's SDK puts them together by."""
    rows = {name: message[name] for name in ("tool_calls", "thinking_blocks") if message.get(name)}
    return {**message, **{name: [{"index": at, **row} for at, row in enumerate(rows[name])] for name in rows}}


def event(data: object) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"
