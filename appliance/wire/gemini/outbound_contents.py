"""The messages of a chat as Gemini's: an instruction, and contents of parts."""

import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit

import orjson

from appliance.core import Target
from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.errors import RequestError
from appliance.wire.chat_fields import (
    INSTRUCTING_ROLES,
    call_arguments,
    called_function,
    content_parts,
    image_address,
    message_role,
    part_text,
    require_object,
    require_text,
    unsupported,
)
from appliance.wire.chat_ir import ChatMessage, ContentPart
from appliance.wire.gemini.reply import Part, read_signature
from appliance.wire.media import AUDIO_TYPES, MediaData, read_data_url

_UNSIGNED: Final = "skip_thought_signature_validator"
"""What Google's documentation names for calls that another model made: models that think want every turn's first call
signed."""


def write_contents(target: Target, messages: Sequence[ChatMessage]) -> MutableJsonObject:
    """`systemInstruction` (where there is one) and `contents`. Neighbours of one role become one content."""
    system: list[Part] = []
    contents: list[MutableJsonObject] = []
    names = _names_of_calls(messages)
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        role = message.get("role")
        if role in INSTRUCTING_ROLES:
            if contents:
                raise unsupported(target, f"{path}.role", "instructions can only stand before all else")
            system += _content(target, message, path, may_see=False)
            continue
        parts = list(_parts(target, message, path, names))
        role = "model" if role == "assistant" else "user"
        if contents and contents[-1]["role"] == role:
            contents[-1]["parts"] += parts
        elif parts:
            contents.append({"role": role, "parts": parts})
    if not contents:
        raise RequestError(f"messages holds instructions alone, and {target.name} needs a question", param="messages")
    return {**({"systemInstruction": {"parts": system}} if system else {}), "contents": contents}


def _names_of_calls(messages: Sequence[ChatMessage]) -> Mapping[str, str]:
    """Id of a call -> the tool's name, which Gemini wants with the result."""
    return {
        call["id"]: str(call["function"].get("name") or "")
        for message in messages
        for call in message.get("tool_calls") or ()
        if isinstance(call.get("id"), str) and isinstance(call.get("function"), Mapping)
    }


def _parts(target: Target, message: ChatMessage, path: str, names: Mapping[str, str]) -> Iterator[Part]:
    match role := message_role(target, message, path):
        case "tool":
            yield _tool_result(target, message, path, names)
        case "assistant":
            yield from _assistant(target, message, path)
        case "user":
            yield from _content(target, message, path, may_see=True)
        case _:
            raise unsupported(target, f"{path}.role", f"there is no role {role!r}")


def _content(target: Target, message: ChatMessage, path: str, *, may_see: bool) -> Iterator[Part]:
    for index, part in enumerate(content_parts(message)):
        where = f"{path}.content[{index}]"
        text = part_text(part)
        if text is not None:
            if text:
                yield {"text": text}
        elif not may_see:
            raise unsupported(target, where, "only text can stand here")
        else:
            yield _media(target, part, where)


def _media(target: Target, part: ContentPart, where: str) -> Part:
    match part.get("type"):
        case "image_url":
            return _image(target, image_address(part, where), where)
        case "input_audio":
            audio = require_object(part.get("input_audio"), f"{where}.input_audio") or {}
            kind = AUDIO_TYPES.get(str(audio.get("format")))
            if kind is None:
                raise unsupported(target, where, f"audio is {' or '.join(AUDIO_TYPES)}")
            return {"inlineData": {"mimeType": kind, "data": audio.get("data")}}
        case "file":
            file = require_object(part.get("file"), f"{where}.file") or {}
            if not isinstance(file.get("file_data"), str):
                raise unsupported(target, f"{where}.file", "a file must come along, as file_data")
            media = read_data_url(file["file_data"], f"{where}.file.file_data")
            return _inline(media)
        case kind:
            raise unsupported(target, where, f"there are no parts of type {kind!r}")


def _inline(media: MediaData) -> Part:
    return {"inlineData": {"mimeType": media.media_type, "data": media.data}}


def _image(target: Target, url: str, where: str) -> Part:
    if url.startswith("data:"):
        media = read_data_url(url, f"{where}.image_url.url")
        return _inline(media)
    kind, _ = mimetypes.guess_type(urlsplit(url).path)
    if kind is None or not kind.startswith("image/"):
        raise unsupported(target, f"{where}.image_url", "its address does not tell what kind of image it is")
    return {"fileData": {"mimeType": kind, "fileUri": url}}


def _assistant(target: Target, message: ChatMessage, path: str) -> Iterator[Part]:
    texts = list(_content(target, message, path, may_see=False))
    refusal = require_text(message.get("refusal"), f"{path}.refusal")
    if refusal:
        texts.append({"text": refusal})
    signature = read_signature(message)
    if texts and signature:
        texts[-1]["thoughtSignature"] = signature
    yield from texts
    for index, call in enumerate(message.get("tool_calls") or ()):
        where = f"{path}.tool_calls[{index}]"
        function = called_function(target, call, where)
        part: Part = {"functionCall": {"name": function["name"], "args": call_arguments(function, where)}}
        if call.get("id"):
            part["functionCall"]["id"] = call["id"]
        signature = read_signature(call)
        if signature is None and index == 0 and "reasoning" in target.abilities:
            signature = _UNSIGNED
        yield {**part, "thoughtSignature": signature} if signature else part


def _tool_result(target: Target, message: ChatMessage, path: str, names: Mapping[str, str]) -> Part:
    identity = message.get("tool_call_id")
    name = names.get(str(identity)) or message.get("name")
    if not name:
        raise RequestError(f"{path}.tool_call_id is {identity!r}, and no call before it has that id", param=path)
    parts = _content(target, message, path, may_see=True)
    texts: list[Part] = []
    media: list[Part] = []
    for part in parts:
        (texts if "text" in part else media).append(part)
    text = "".join(part["text"] for part in texts)
    written: Part = {"name": name, "response": _response(text, is_error=bool(message.get("is_error")))}
    if identity:
        written["id"] = identity
    if media:
        written["parts"] = media
    return {"functionResponse": written}


def _response(text: str, *, is_error: bool) -> JsonObject:
    """An object, as Gemini wants it: the tool's own where it gave one, else its text."""
    if is_error:
        return {"error": text}
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = None
    return {"output": value if isinstance(value, dict | list) else text}
