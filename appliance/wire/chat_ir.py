"""The language between dialects: OpenAI's chat completions, with a few fields more.

Readers of other dialects make such a body, writers make the caller's reply of such a payload or stream. Beyond OpenAI's
own fields there are: `reasoning_content` on messages and deltas (the text of a model's thinking), `thinking_blocks` on
assistant messages and deltas (a provider's thinking as blocks of the form {type: thinking, thinking, signature} or
{type: redacted_thinking, data}, to be given back unchanged), `cache_control` on content parts, messages, tool calls and
tools, `is_error` on tool messages, `extra_content` on tool calls (signatures of Gemini), and `stop_reason` on choices
(the stop string that ended it).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from appliance.errors import RequestError

MAX_CHOICES: Final = 128
MAX_TOP_LOGPROBS: Final = 20
MAX_STOPS: Final = 16
REASONING_EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

Message = dict[str, Any]
ChatBody = dict[str, Any]


def content_of(parts: Sequence[Mapping[str, Any]]) -> str | list[Mapping[str, Any]]:
    """A message's content; a lone text is written as such, which every server understands."""
    if len(parts) == 1 and set(parts[0]) == {"type", "text"}:
        return str(parts[0]["text"])
    return list(parts)


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def image_part(address: str, detail: str | None = None) -> dict[str, Any]:
    image = {"url": address} if detail is None else {"url": address, "detail": detail}
    return {"type": "image_url", "image_url": image}


def function_call(call_id: str, name: str, arguments: Mapping[str, Any] | str) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json_text(arguments)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}


def json_text(value: Any) -> str:
    return orjson.dumps(value).decode()


def function_tool(
    name: str, description: str | None, parameters: Mapping[str, Any] | None, *, strict: bool | None = None
) -> dict[str, Any]:
    function: dict[str, Any] = {"name": name}
    if description is not None:
        function["description"] = description
    if parameters is not None:
        function["parameters"] = parameters
    if strict is not None:
        function["strict"] = strict
    return {"type": "function", "function": function}


def json_format(
    schema: Mapping[str, Any], *, name: str = "answer", strict: bool | None = None, description: str | None = None
) -> dict[str, Any]:
    inner: dict[str, Any] = {"name": name, "schema": schema}
    if strict is not None:
        inner["strict"] = strict
    if description is not None:
        inner["description"] = description
    return {"type": "json_schema", "json_schema": inner}


def offered(name: str, tools: Sequence[Mapping[str, Any]], path: str) -> str:
    """Raise RequestError where no tool of that name was given."""
    names = [tool["function"]["name"] for tool in tools]
    if name not in names:
        given = f"there are {', '.join(names[:20])}" if names else "there are none"
        raise RequestError(f"{path} is {name[:100]!r}, which is not the name of a tool: {given}", param=path)
    return name
