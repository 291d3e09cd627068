"""Content blocks of Anthropic's messages as parts, calls and results of a chat."""

from collections.abc import Sequence
from typing import Final

from appliance.core.json_types import JsonObject
from appliance.errors import RequestError, Unsupported
from appliance.wire.chat_ir import (
    ChatMessage,
    ContentPart,
    ToolCall,
    function_call,
    image_part,
    join_parts,
    text_part,
)
from appliance.wire.media import IMAGE_TYPES, check_web_address, make_data_url
from appliance.wire.opaque_state import restore_state, unpack_state
from appliance.wire.strict_fields import StrictFields, check_tool_name, missing, wrong

MAX_BLOCKS: Final = 100_000
_USER_BLOCKS: Final = "text, image, document or tool_result"
_ASSISTANT_BLOCKS: Final = "text, tool_use, thinking or redacted_thinking"


def read_user_messages(content: object, path: str, called: set[str]) -> list[ChatMessage]:
    """One user turn: its tool results as messages of their own, right behind the calls, then all else it says.

    `called`: ids of the tool uses so far; a result must answer one of them.
    """
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    results: list[ChatMessage] = []
    parts: list[ContentPart] = []
    for block in _blocks(content, path):
        if block.get("type") == "tool_result":
            results.append(_tool_result(block, called))
        else:
            parts.append(_part(block, _USER_BLOCKS))
    return [*results, {"role": "user", "content": join_parts(parts)}] if parts else results


def read_assistant_message(content: object, path: str, called: set[str]) -> ChatMessage:
    """One assistant turn. `called` is given the ids of its tool uses."""
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    parts: list[ContentPart] = []
    calls: list[ToolCall] = []
    thinking: list[JsonObject] = []
    carried: list[JsonObject] = []
    for block in _blocks(content, path):
        kind = block.get("type")
        if kind == "tool_use":
            calls.append(_tool_use(block, called))
        elif kind in ("thinking", "redacted_thinking"):
            kept = _thinking(block)
            foreign = unpack_state(kept.get("data", ""))
            thinking += [kept] if foreign is None else []
            carried += [foreign] if foreign is not None else []
        elif kind == "text":
            parts.append(_part(block, _ASSISTANT_BLOCKS))
        else:
            raise _unknown(block, _ASSISTANT_BLOCKS)
    message: ChatMessage = {"role": "assistant", "content": join_parts(parts) if parts else None}
    if calls:
        message["tool_calls"] = calls
    if thinking:
        message["thinking_blocks"] = thinking
        text = "".join(block.get("thinking", "") for block in thinking)
        if text:
            message["reasoning_content"] = text
    for foreign in carried:
        restore_state(message, foreign)
    return message


def read_system_message(content: object, path: str) -> ChatMessage:
    if isinstance(content, str):
        return {"role": "system", "content": content}
    parts = []
    for block in _blocks(content, path):
        if block.get("type") != "text":
            raise _unknown(block, "text")
        parts.append(_part(block, "text"))
    return {"role": "system", "content": join_parts(parts)}


def read_cache_mark(block: StrictFields) -> JsonObject | None:
    """A checked `cache_control`; targets that keep no such cache leave it be, since it changes no answer."""
    mark = block.object("cache_control")
    if mark is None:
        return None
    if mark.one_of("type", ("ephemeral",)) is None:
        raise missing(mark.at("type"), "it must be ephemeral")
    mark.one_of("ttl", ("5m", "1h"))
    mark.accept("scope")
    mark.finish()
    return block.mapping("cache_control")


def _blocks(content: object, path: str) -> Sequence[StrictFields]:
    if not isinstance(content, list):
        raise wrong(path, content, "it must be a string or a list of content blocks")
    if not 1 <= len(content) <= MAX_BLOCKS:
        raise RequestError(f"{path} has {len(content)} blocks: it must have 1 to {MAX_BLOCKS}", param=path)
    return [StrictFields(block, f"{path}[{index}]") for index, block in enumerate(content)]


def _unknown(block: StrictFields, known: str) -> RequestError:
    kind = block.get("type")
    if not isinstance(kind, str):
        return block.wrong("type", f"it must be {known}")
    return Unsupported(f"{block.at('type')} is {kind[:80]!r}: only {known} is supported here", param=block.at("type"))


def _part(block: StrictFields, known: str) -> ContentPart:
    kind = block.get("type")
    if kind == "text":
        part = text_part(block.required_text("text"))
        block.refuse("citations", "nothing here cites; leave it out", allowed=([],))
    elif kind == "image" and known != _ASSISTANT_BLOCKS:
        part = _image(block)
    elif kind == "document" and known != _ASSISTANT_BLOCKS:
        part = _document(block)
    else:
        raise _unknown(block, known)
    mark = read_cache_mark(block)
    block.finish()
    return part if mark is None else {**part, "cache_control": mark}


def _image(block: StrictFields) -> ContentPart:
    source = block.object("source")
    if source is None:
        raise missing(block.at("source"), "it must be a base64 or url source")
    block.refuse("transformations", "the image is passed on as it is")
    kind = source.one_of("type", ("base64", "url", "file"))
    if kind == "base64":
        if source.one_of("media_type", IMAGE_TYPES) is None:
            raise missing(source.at("media_type"), f"it must be one of {', '.join(IMAGE_TYPES)}")
        data, media = source.get("data"), source.get("media_type")
        address = make_data_url(media, data, source.at("data"), source.at("media_type"))
    elif kind == "url":
        address = check_web_address(source.get("url"), source.at("url"))
    elif kind == "file":
        raise Unsupported(
            f"{source.at('type')} is 'file': no files are kept here; send the image as base64", param=source.at("type")
        )
    else:
        raise missing(source.at("type"), "it must be base64 or url")
    source.finish()
    return image_part(address)


def _document(block: StrictFields) -> ContentPart:
    """A document of plain text, its title and context before it."""
    source = block.object("source")
    if source is None:
        raise missing(block.at("source"), "it must be a text source")
    citations = block.object("citations")
    if citations is not None:
        citations.refuse("enabled", "nothing here cites", allowed=(False,))
        citations.finish()
    kind = source.get("type")
    if kind == "text":
        source.one_of("media_type", ("text/plain",))
        text = source.required_text("data")
    elif kind == "content":
        text = _text_of(source.get("content"), source.at("content"))
    else:
        raise Unsupported(
            f"{source.at('type')} is {str(kind)[:40]!r}: only documents of plain text are read here; "
            "send the text of the document",
            param=source.at("type"),
        )
    source.finish()
    return text_part("\n\n".join(one for one in (block.text("title"), block.text("context"), text) if one))


def _text_of(content: object, path: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for block in _blocks(content, path):
        if block.get("type") != "text":
            raise _unknown(block, "text")
        texts.append(_part(block, "text")["text"])
    return "\n".join(texts)


def _tool_use(block: StrictFields, called: set[str]) -> ToolCall:
    call_id = block.required_text("id")
    name = check_tool_name(block.get("name"), block.at("name"))
    arguments = block.mapping("input")
    if arguments is None:
        raise missing(block.at("input"), "it must be an object")
    _direct_caller(block)
    block.refuse("toolset_name", "toolsets are not run here", allowed=("",))
    mark = read_cache_mark(block)
    block.finish()
    called.add(call_id)
    call = function_call(call_id, name, arguments)
    return call if mark is None else {**call, "cache_control": mark}


def _direct_caller(block: StrictFields) -> None:
    caller = block.object("caller")
    if caller is not None:
        caller.refuse("type", "tools are called by the model alone", allowed=("direct",))
        caller.finish()


def _tool_result(block: StrictFields, called: set[str]) -> ChatMessage:
    call_id = block.required_text("tool_use_id")
    if call_id not in called:
        place = block.at("tool_use_id")
        raise RequestError(
            f"{place} is {call_id[:100]!r}, which no tool_use block before it has as its id", param=place
        )
    message: ChatMessage = {"role": "tool", "tool_call_id": call_id, "content": _result_content(block)}
    if block.flag("is_error"):
        message["is_error"] = True
    block.refuse("toolset_name", "toolsets are not run here", allowed=("",))
    mark = read_cache_mark(block)
    block.finish()
    return message if mark is None else {**message, "cache_control": mark}


def _result_content(block: StrictFields) -> str | list[ContentPart]:
    content = block.get("content")
    if content is None or content == []:
        return ""
    if isinstance(content, str):
        return content
    known = "text, image or document"
    return join_parts([_part(inner, known) for inner in _blocks(content, block.at("content"))])


def _thinking(block: StrictFields) -> JsonObject:
    """As it came: the provider checks its signature."""
    if block.get("type") == "thinking":
        text, signature = block.required_text("thinking"), block.text("signature")
        kept: JsonObject = {"type": "thinking", "thinking": text, "signature": signature or ""}
    else:
        kept = {"type": "redacted_thinking", "data": block.required_text("data")}
    block.finish()
    return kept
