"""The messages of a chat as Anthropic's: a system prompt, and turns of content blocks."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, TypeAlias

from appliance.core import Target
from appliance.core.json_types import MutableJsonObject
from appliance.errors import RequestError
from appliance.wire.chat_fields import (
    INSTRUCTING_ROLES,
    call_arguments,
    called_function,
    content_parts,
    image_address,
    message_role,
    own_blocks,
    part_text,
    require_text,
    unsupported,
)
from appliance.wire.chat_ir import ChatMessage, ContentPart
from appliance.wire.media import IMAGE_TYPES, PDF, is_web_address, read_data_url

_NOT_IN_AN_ID: Final = re.compile(r"[^a-zA-Z0-9_-]")
_OWN_BLOCKS: Final = frozenset({"thinking", "redacted_thinking"})

Block: TypeAlias = MutableJsonObject


def write_messages(target: Target, messages: Sequence[ChatMessage]) -> MutableJsonObject:
    """`system` (where there is one) and `messages`. Neighbours of one role become one turn."""
    system: list[Block] = []
    turns: list[MutableJsonObject] = []
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        role = message.get("role")
        blocks = list(_blocks(target, message, path))
        if role in INSTRUCTING_ROLES and not turns:
            system += blocks
            continue
        role = {"developer": "system", "tool": "user"}.get(str(role), role)
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        elif blocks:
            turns.append({"role": role, "content": blocks})
    if not turns:
        raise RequestError(f"messages holds instructions alone, and {target.name} needs a question", param="messages")
    return {**({"system": system} if system else {}), "messages": turns}


def _blocks(target: Target, message: ChatMessage, path: str) -> Iterator[Block]:
    match role := message_role(target, message, path):
        case "tool":
            yield _tool_result(target, message, path)
        case "assistant":
            yield from _assistant(target, message, path)
        case "user" | "system" | "developer":
            yield from _marked(list(_content(target, message, path, may_see=role == "user")), message)
        case _:
            raise unsupported(target, f"{path}.role", f"there is no role {role!r}")


def _marked(blocks: list[Block], message: ChatMessage) -> list[Block]:
    """A cache hint on a message stands for one on its last block."""
    if message.get("cache_control") and blocks:
        blocks[-1]["cache_control"] = message["cache_control"]
    return blocks


def _content(target: Target, message: ChatMessage, path: str, *, may_see: bool) -> Iterator[Block]:
    for index, part in enumerate(content_parts(message)):
        where = f"{path}.content[{index}]"
        text = part_text(part)
        if text is not None:
            if not text:
                continue
            block: Block = {"type": "text", "text": text}
        elif not may_see:
            raise unsupported(target, where, "only text can stand here")
        else:
            block = _media(target, part, where)
        hint = part.get("cache_control") or (part.get("prompt_cache_breakpoint") and {"type": "ephemeral"})
        yield {**block, "cache_control": hint} if hint else block


def _media(target: Target, part: ContentPart, where: str) -> Block:
    match part.get("type"):
        case "image_url":
            return _image(target, image_address(part, where), where)
        case "file":
            return _document(target, part.get("file"), where)
        case kind:
            raise unsupported(target, where, f"there are no parts of type {kind!r}")


def _image(target: Target, url: str, where: str) -> Block:
    if is_web_address(url):
        return {"type": "image", "source": {"type": "url", "url": url}}
    media = read_data_url(url, f"{where}.image_url.url")
    kind = "image/jpeg" if media.media_type == "image/jpg" else media.media_type
    if kind not in IMAGE_TYPES:
        raise unsupported(target, where, f"{media.media_type} is none of {', '.join(sorted(IMAGE_TYPES))}")
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": media.data}}


def _document(target: Target, file: object, where: str) -> Block:
    data = file.get("file_data") if isinstance(file, Mapping) else None
    if not isinstance(data, str):
        raise unsupported(target, f"{where}.file", "a file must come along, as file_data")
    media = read_data_url(data, f"{where}.file.file_data")
    if media.media_type != PDF:
        raise unsupported(target, f"{where}.file", f"documents are PDF, not {media.media_type}")
    block: Block = {
        "type": "document",
        "source": {"type": "base64", "media_type": media.media_type, "data": media.data},
    }
    name = file.get("filename") if isinstance(file, Mapping) else None
    return {**block, "title": name} if name else block


def _assistant(target: Target, message: ChatMessage, path: str) -> Iterator[Block]:
    """What it thought first, as it came: Anthropic checks that against its signature."""
    yield from own_blocks(message, _OWN_BLOCKS)
    yield from _marked(list(_content(target, message, path, may_see=False)), message)
    refusal = require_text(message.get("refusal"), f"{path}.refusal")
    if refusal:
        yield {"type": "text", "text": refusal}
    for index, call in enumerate(message.get("tool_calls") or ()):
        where = f"{path}.tool_calls[{index}]"
        function = called_function(target, call, where)
        used: Block = {"type": "tool_use", "id": _tool_id(call.get("id"), where), "name": function["name"]}
        used["input"] = call_arguments(function, where)
        hint = call.get("cache_control")
        yield {**used, "cache_control": hint} if hint else used


def _tool_result(target: Target, message: ChatMessage, path: str) -> Block:
    blocks = list(_content(target, message, path, may_see=True))
    plain = blocks[0]["text"] if len(blocks) == 1 and blocks[0].keys() == {"type", "text"} else blocks
    block: Block = {"type": "tool_result", "tool_use_id": _tool_id(message.get("tool_call_id"), path), "content": plain}
    if message.get("is_error"):
        block["is_error"] = True
    if message.get("cache_control"):
        block["cache_control"] = message["cache_control"]
    return block


def _tool_id(value: object, where: str) -> str:
    """Anthropic takes letters, digits, `_` and `-`; others are replaced, in calls and results alike."""
    if not isinstance(value, str) or not value:
        raise RequestError(f"{where} has no id that joins a tool's call and its result", param=where)
    return _NOT_IN_AN_ID.sub("_", value)
