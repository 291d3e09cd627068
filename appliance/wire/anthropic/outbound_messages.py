"""The messages of a chat as Anthropic's: a system prompt, and turns of content blocks. Pure."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from appliance.core import Target
from appliance.errors import RequestError
from appliance.wire.chat_fields import (
    arguments_of,
    called_function,
    image_url_of,
    own_blocks,
    parts_of,
    read_data_url,
    role_of,
    text_of,
    unsupported,
    word_of,
)

IMAGES: Final = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp"})
_NOT_IN_AN_ID: Final = re.compile(r"[^a-zA-Z0-9_-]")
_OWN_BLOCKS: Final = frozenset({"thinking", "redacted_thinking"})
_INSTRUCTING: Final = frozenset({"system", "developer"})

Block = dict[str, Any]


def written_messages(target: Target, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`system` (where there is one) and `messages`. Neighbours of one role become one turn."""
    system: list[Block] = []
    turns: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        role = message.get("role")
        blocks = list(_blocks(target, message, path))
        if role in _INSTRUCTING and not turns:
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


def _blocks(target: Target, message: Mapping[str, Any], path: str) -> Iterator[Block]:
    match role := role_of(target, message, path):
        case "tool":
            yield _tool_result(target, message, path)
        case "assistant":
            yield from _assistant(target, message, path)
        case "user" | "system" | "developer":
            yield from _marked(list(_content(target, message, path, may_see=role == "user")), message)
        case _:
            raise unsupported(target, f"{path}.role", f"there is no role {role!r}")


def _marked(blocks: list[Block], message: Mapping[str, Any]) -> list[Block]:
    """A cache hint on a message stands for one on its last block."""
    if message.get("cache_control") and blocks:
        blocks[-1]["cache_control"] = message["cache_control"]
    return blocks


def _content(target: Target, message: Mapping[str, Any], path: str, *, may_see: bool) -> Iterator[Block]:
    for index, part in enumerate(parts_of(message.get("content"))):
        where = f"{path}.content[{index}]"
        text = text_of(part)
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


def _media(target: Target, part: Mapping[str, Any], where: str) -> Block:
    match part.get("type"):
        case "image_url":
            return _image(target, image_url_of(part, where), where)
        case "file":
            return _document(target, part.get("file"), where)
        case kind:
            raise unsupported(target, where, f"there are no parts of type {kind!r}")


def _image(target: Target, url: str, where: str) -> Block:
    if url.startswith(("https://", "http://")):
        return {"type": "image", "source": {"type": "url", "url": url}}
    media = read_data_url(url, f"{where}.image_url.url")
    kind = "image/jpeg" if media.kind == "image/jpg" else media.kind
    if kind not in IMAGES:
        raise unsupported(target, where, f"{media.kind} is none of {', '.join(sorted(IMAGES))}")
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": media.data}}


def _document(target: Target, file: Any, where: str) -> Block:
    data = file.get("file_data") if isinstance(file, Mapping) else None
    if not isinstance(data, str):
        raise unsupported(target, f"{where}.file", "a file must come along, as file_data")
    media = read_data_url(data, f"{where}.file.file_data")
    if media.kind != "application/pdf":
        raise unsupported(target, f"{where}.file", f"documents are PDF, not {media.kind}")
    block: Block = {"type": "document", "source": {"type": "base64", "media_type": media.kind, "data": media.data}}
    name = file.get("filename")
    return {**block, "title": name} if name else block


def _assistant(target: Target, message: Mapping[str, Any], path: str) -> Iterator[Block]:
    """What it thought first, as it came: Anthropic checks that against its signature."""
    yield from own_blocks(message, _OWN_BLOCKS)
    yield from _marked(list(_content(target, message, path, may_see=False)), message)
    refusal = word_of(message.get("refusal"), f"{path}.refusal")
    if refusal:
        yield {"type": "text", "text": refusal}
    for index, call in enumerate(message.get("tool_calls") or ()):
        where = f"{path}.tool_calls[{index}]"
        function = called_function(target, call, where)
        used: Block = {"type": "tool_use", "id": tool_id(call.get("id"), where), "name": function["name"]}
        used["input"] = arguments_of(function, where)
        hint = call.get("cache_control")
        yield {**used, "cache_control": hint} if hint else used


def _tool_result(target: Target, message: Mapping[str, Any], path: str) -> Block:
    blocks = list(_content(target, message, path, may_see=True))
    plain = blocks[0]["text"] if len(blocks) == 1 and blocks[0].keys() == {"type", "text"} else blocks
    block: Block = {"type": "tool_result", "tool_use_id": tool_id(message.get("tool_call_id"), path), "content": plain}
    if message.get("is_error"):
        block["is_error"] = True
    if message.get("cache_control"):
        block["cache_control"] = message["cache_control"]
    return block


def tool_id(value: Any, where: str) -> str:
    """Anthropic takes letters, digits, `_` and `-`; others are replaced, in calls and results alike."""
    if not isinstance(value, str) or not value:
        raise RequestError(f"{where} has no id that joins a tool's call and its result", param=where)
    return _NOT_IN_AN_ID.sub("_", value)
