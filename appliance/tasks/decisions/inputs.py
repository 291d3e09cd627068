"""What a decision is about: a text, or an ordered list of messages, calls and their outputs, rendered as text."""

from dataclasses import dataclass
from typing import Any

from appliance.core.json_types import JsonObject
from appliance.errors import RequestError
from appliance.tasks.decisions.questions import read_part_text
from appliance.wire.strict_fields import read_object, wrong

_ROLES = ("user", "developer", "system", "assistant")
_CALLS = {"function_call": "arguments", "custom_tool_call": "input"}
_OUTPUTS = ("function_call_output", "custom_tool_call_output")


@dataclass(frozen=True, slots=True)
class Input:
    text: str
    original: Any
    """As it came, for targets that speak the same wire format."""
    has_image: bool = False


def read_input(value: object, path: str) -> Input:
    """One input. Raises RequestError naming the place in it that is wrong."""
    if isinstance(value, str):
        if not value.strip():
            raise RequestError(f"{path} is empty: give the text to decide about", param=path)
        return Input(value, value)
    if not isinstance(value, list):
        raise wrong(path, value, "it must be a string or a list of messages")
    if not value:
        raise RequestError(f"{path} is an empty list: give at least one message", param=path)
    rows = [read_object(row, f"{path}[{index}]", "a message or a call") for index, row in enumerate(value)]
    pieces = [_item_text(row, f"{path}[{index}]") for index, row in enumerate(rows)]
    has_image = any(_holds_image(row) for row in rows)
    if len(pieces) == 1 and rows[0].get("role") == "user":
        return Input(pieces[0][1], value, has_image)
    return Input("\n".join(f"{speaker}: {text}" for speaker, text in pieces), value, has_image)


def _item_text(row: JsonObject, path: str) -> tuple[str, str]:
    """Who speaks, and what."""
    kind = row.get("type", "message")
    if kind == "message":
        role = row.get("role")
        if role not in _ROLES:
            raise wrong(f"{path}.role", role, f"it must be one of {', '.join(_ROLES)}")
        return str(role), _content_text(row.get("content"), f"{path}.content")
    if kind in _OUTPUTS:
        return "tool", _content_text(row.get("output"), f"{path}.output")
    if not isinstance(kind, str) or kind not in _CALLS:
        raise wrong(f"{path}.type", kind, f"it must be message, {', '.join((*_CALLS, *_OUTPUTS))}")
    field = _CALLS[kind]
    for name in ("name", field):
        if not isinstance(row.get(name), str):
            raise wrong(f"{path}.{name}", row.get(name), "it must be a string")
    return "assistant", f"{row['name']}({row[field]})"


def _content_text(content: object, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise wrong(path, content, "it must be a string or a list of parts")
    return "\n".join(read_part_text(part, f"{path}[{index}]") for index, part in enumerate(content))


def _holds_image(row: JsonObject) -> bool:
    parts = row.get("output") if "output" in row else row.get("content")
    return isinstance(parts, list) and any(part.get("type") == "input_image" for part in parts)
