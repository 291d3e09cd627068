"""What a model would read of a chat body, and whether its envelope is sound. The body itself is never changed."""

from collections.abc import Iterator, Sequence
from typing import Any

from appliance.core.json_types import JsonObject
from appliance.errors import RequestError, Unsupported
from appliance.wire.chat_ir import AUDIO_PARTS, MAX_MESSAGES, TEXT_PARTS, ChatMessage
from appliance.wire.strict_fields import missing, read_list, wrong

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


def check_messages(body: JsonObject) -> Sequence[ChatMessage]:
    """The messages of a chat body. Raises RequestError naming the first one that is wrong."""
    if body.get("messages") is None:
        raise missing("messages", 'it must be a list such as [{"role": "user", "content": "Hello"}]')
    if body["messages"] == []:
        raise RequestError("messages is empty: give at least one message", param="messages")
    messages: Sequence[Any] = read_list(body["messages"], "messages", 1, MAX_MESSAGES, "messages")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")
    return messages


def _check_message(message: object, path: str) -> None:
    if not isinstance(message, dict):
        raise wrong(path, message, "it must be an object with role and content")
    _check_content(message, path)
    _check_extras(message, path)


def _check_content(message: JsonObject, path: str) -> None:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{path}.role", role, f"it must be one of {', '.join(sorted(ROLES))}")
    content = message.get("content")
    if isinstance(content, list):
        for index, part in enumerate(content):
            _check_part(part, f"{path}.content[{index}]")
    elif content is not None and not isinstance(content, str):
        raise wrong(f"{path}.content", content, "it must be a string, a list of parts, or null")
    elif content is None and role in ("system", "developer", "user"):
        raise missing(f"{path}.content", f"a {role} message needs text")


def _check_extras(message: JsonObject, path: str) -> None:
    for name in ("reasoning_content", "reasoning"):
        if message.get(name) is not None and not isinstance(message[name], str):
            raise wrong(f"{path}.{name}", message[name], "it must be a string")
    for name in ("tool_calls", "thinking_blocks"):
        rows = message.get(name)
        if rows is not None and not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
            raise wrong(f"{path}.{name}", rows, "it must be a list of objects")


def _check_part(part: object, path: str) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise wrong(path, part, 'it must be an object with a type, such as {"type": "text", "text": "Hello"}')
    if part["type"] in AUDIO_PARTS:
        raise Unsupported(f"{path}.type is {part['type']!r}: sound is not supported here", param=f"{path}.type")
    if part["type"] in ("text", "input_text") and not isinstance(part.get("text"), str):
        raise wrong(f"{path}.text", part.get("text"), "it must be a string")


def join_message_text(messages: Sequence[ChatMessage] | Sequence[JsonObject]) -> str:
    """All text of the messages in order, tool calls' arguments included, one line break between pieces."""
    return "\n".join(piece for message in messages for piece in _pieces(message))


def _pieces(message: JsonObject) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            for name in ("text", "refusal"):
                if isinstance(part.get(name), str):
                    yield part[name]
    for name in ("refusal", "reasoning_content", "reasoning"):
        if isinstance(message.get(name), str):
            yield message[name]
    for call in message.get("tool_calls") or ():
        yield from _called(call.get("function") or call.get("custom"))
    yield from _called(message.get("function_call"))


def _called(function: object) -> Iterator[str]:
    if isinstance(function, dict):
        for name in ("name", "arguments", "input"):
            if isinstance(function.get(name), str):
                yield function[name]


def holds_more_than_text(messages: Sequence[ChatMessage]) -> bool:
    """Whether a part is an image, sound or file: only a target that sees can be given those."""
    return any(
        part["type"] not in TEXT_PARTS
        for message in messages
        if isinstance(content := message.get("content"), list)
        for part in content
    )
