"""A chat as a request of OpenAI's Responses API, for models that speak nothing else. Nothing is stored there."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from appliance.core import Target, UpstreamCall
from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.wire.chat_fields import (
    ChatFields,
    called_function,
    content_parts,
    image_address,
    message_role,
    own_blocks,
    part_text,
    require_object,
    require_text,
    unsupported,
)
from appliance.wire.chat_ir import ChatMessage, ContentPart
from appliance.wire.dialect import WireRequest, add_query, make_wire_request

LOGPROBS: Final = "message.output_text.logprobs"
ENCRYPTED: Final = "reasoning.encrypted_content"
"""What `include` can ask for."""

_SAME: Final = (
    "temperature",
    "top_p",
    "metadata",
    "parallel_tool_calls",
    "safety_identifier",
    "service_tier",
    "user",
)
_CACHING: Final = ("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options")


def write_responses_request(target: Target, outgoing: UpstreamCall, *, stream: bool, salt: str) -> WireRequest:
    """Raises Unsupported for the first field that cannot be carried over, RequestError."""
    body = write_response_body(target, outgoing.body)
    if stream:
        body["stream"] = True
    return make_wire_request(target, outgoing, add_query(target, "/responses"), body)


def write_response_body(target: Target, given: JsonObject) -> MutableJsonObject:
    fields = ChatFields(target, given)
    body: MutableJsonObject = {"model": target.model, "store": False}
    body["input"] = list(_items(target, fields.messages()))
    body |= {name: value for name in _SAME if (value := fields.get(name)) is not None}
    body |= {name: given[name] for name in _CACHING if given.get(name) is not None}
    limit = fields.first("max_completion_tokens", "max_tokens")
    if limit is not None:
        body["max_output_tokens"] = limit
    includes = []
    if "reasoning" in target.abilities:
        body["reasoning"] = {"summary": "auto"}
        includes.append(ENCRYPTED)
    effort = fields.get("reasoning_effort")
    if effort is not None:
        body["reasoning"] = {**body.get("reasoning", {}), "effort": effort}
    if fields.get("logprobs"):
        includes.append(LOGPROBS)
        body["top_logprobs"] = fields.get("top_logprobs") or 0
    if includes:
        body["include"] = includes
    _write_text(fields, body)
    _write_tools(fields, body)
    fields.accept("model", "stream", "stream_options")
    fields.finish()
    return body


def _write_text(fields: ChatFields, body: MutableJsonObject) -> None:
    text: MutableJsonObject = {}
    format = fields.get("response_format")
    if isinstance(format, Mapping):
        inner = format.get("json_schema")
        text["format"] = {"type": "json_schema", **inner} if isinstance(inner, Mapping) else dict(format)
    verbosity = fields.get("verbosity")
    if verbosity is not None:
        text["verbosity"] = verbosity
    if text:
        body["text"] = text


def _write_tools(fields: ChatFields, body: MutableJsonObject) -> None:
    tools, choice = fields.tools(), fields.tool_choice()
    if not tools:
        return
    body["tools"] = [
        {
            "type": "function",
            "name": tool["function"]["name"],
            "description": tool["function"].get("description"),
            "parameters": tool["function"].get("parameters") or {"type": "object", "properties": {}},
            "strict": bool(tool["function"].get("strict")),
        }
        for tool in tools
    ]
    if choice is None:
        return
    if choice.mode == "named":
        body["tool_choice"] = {"type": "function", "name": choice.names[0]}
    elif choice.names:
        names = [{"type": "function", "name": name} for name in choice.names]
        body["tool_choice"] = {"type": "allowed_tools", "mode": choice.mode, "tools": names}
    else:
        body["tool_choice"] = choice.mode


def _items(target: Target, messages: Sequence[ChatMessage]) -> Iterator[JsonObject]:
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        match role := message_role(target, message, path):
            case "assistant":
                yield from _assistant(target, message, path)
            case "tool":
                output = [_input_part(target, part, f"{path}.content") for part in content_parts(message)]
                plain = "".join(part["text"] for part in output if part["type"] == "input_text")
                is_text = all(part["type"] == "input_text" for part in output)
                yield {
                    "type": "function_call_output",
                    "call_id": message.get("tool_call_id"),
                    "output": plain if is_text else output,
                }
            case "user" | "system" | "developer":
                parts = [
                    _input_part(target, part, f"{path}.content[{position}]")
                    for position, part in enumerate(content_parts(message))
                ]
                yield {"type": "message", "role": role, "content": parts}
            case _:
                raise unsupported(target, f"{path}.role", f"there is no role {role!r}")


def _assistant(target: Target, message: ChatMessage, path: str) -> Iterator[JsonObject]:
    yield from own_blocks(message, frozenset({"reasoning"}))
    said = "".join(_said(target, message, path))
    if said:
        yield {"type": "message", "role": "assistant", "content": said}
    for index, call in enumerate(message.get("tool_calls") or ()):
        function = called_function(target, call, f"{path}.tool_calls[{index}]")
        yield {
            "type": "function_call",
            "call_id": call.get("id"),
            "name": function["name"],
            "arguments": function.get("arguments") or "{}",
        }


def _said(target: Target, message: ChatMessage, path: str) -> Iterator[str]:
    """As plain text: the items that the API itself makes of an answer have ids, and those were not kept."""
    for part in content_parts(message):
        text = part_text(part)
        if text is None:
            raise unsupported(target, f"{path}.content", "only text can stand here")
        yield text
    refusal = require_text(message.get("refusal"), f"{path}.refusal")
    if refusal:
        yield refusal


def _input_part(target: Target, part: ContentPart, where: str) -> JsonObject:
    text = part_text(part)
    if text is not None:
        written: MutableJsonObject = {"type": "input_text", "text": text}
    elif part.get("type") == "image_url":
        image: object = part.get("image_url")
        detail = image.get("detail") if isinstance(image, Mapping) else None
        written = {"type": "input_image", "image_url": image_address(part, where), "detail": detail or "auto"}
    elif part.get("type") == "file":
        written = {"type": "input_file", **(require_object(part.get("file"), f"{where}.file") or {})}
    else:
        raise unsupported(target, where, f"there are no parts of type {part.get('type')!r}")
    breakpoint_ = part.get("prompt_cache_breakpoint")
    return {**written, "prompt_cache_breakpoint": breakpoint_} if breakpoint_ else written
