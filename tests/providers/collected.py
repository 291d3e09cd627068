"""A stream of chat chunks put together again, each chunk checked against OpenAI's own type."""

from dataclasses import dataclass, field
from typing import Any

import orjson
from openai.types.chat import ChatCompletionChunk


@dataclass
class Collected:
    """What a stream came to: one message of each choice, as a whole reply would have had it."""

    messages: dict[int, dict[str, Any]] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    is_done: bool = False
    error: dict[str, Any] | None = None

    @property
    def message(self) -> dict[str, Any]:
        return self.messages[0]


def collected(raw: bytes) -> Collected:
    came = Collected()
    for event in raw.split(b"\n\n"):
        data = event.removeprefix(b"data: ").strip()
        if not data:
            continue
        assert not came.is_done, "something came after the end"
        if data == b"[DONE]":
            came.is_done = True
            continue
        payload = orjson.loads(data)
        if payload.get("error"):
            came.error = payload["error"]
            continue
        ChatCompletionChunk.model_validate(payload, strict=True)
        came.usage = payload.get("usage") or came.usage
        for choice in payload["choices"]:
            message = came.messages.setdefault(choice["index"], {})
            _add(message, choice["delta"])
            if choice.get("finish_reason"):
                assert choice["index"] not in came.finishes, "a choice was finished twice"
                came.finishes[choice["index"]] = choice["finish_reason"]
    return came


def _add(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, value in delta.items():
        if name == "tool_calls":
            for part in value:
                _add_call(message.setdefault("tool_calls", []), part)
        elif name == "thinking_blocks":
            for block in value:
                blocks = message.setdefault(name, [])
                assert block["index"] == len(blocks)
                blocks.append({key: part for key, part in block.items() if key != "index"})
        elif name in ("content", "refusal", "reasoning_content") and value is not None:
            message[name] = (message.get(name) or "") + value
        else:
            message[name] = value


def _add_call(calls: list[dict[str, Any]], part: dict[str, Any]) -> None:
    if part["index"] == len(calls):
        calls.append({"function": {"arguments": ""}})
    call = calls[part["index"]]
    call |= {name: value for name, value in part.items() if name in ("id", "type", "extra_content")}
    function = part.get("function") or {}
    call["function"]["name"] = function.get("name") or call["function"].get("name")
    call["function"]["arguments"] += function.get("arguments") or ""
