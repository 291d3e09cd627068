"""The messages of a chat as Gemini's: an instruction, and contents of parts. Pure."""

import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import orjson

from appliance.core import Target
from appliance.errors import RequestError
from appliance.wire.chat_fields import (
    arguments_of,
    called_function,
    image_url_of,
    mapping_of,
    parts_of,
    read_data_url,
    role_of,
    text_of,
    unsupported,
    word_of,
)

_INSTRUCTING: Final = frozenset({"system", "developer"})
_SOUNDS: Final[Mapping[str, str]] = {"wav": "audio/wav", "mp3": "audio/mp3"}

UNSIGNED: Final = "skip_thought_signature_validator"
"""What Google's documentation names for calls that another model made: models that think want every turn's first call
signed."""

Part = dict[str, Any]


def written_contents(target: Target, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`systemInstruction` (where there is one) and `contents`. Neighbours of one role become one content."""
    system: list[Part] = []
    contents: list[dict[str, Any]] = []
    names = _names_of_calls(messages)
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        role = message.get("role")
        if role in _INSTRUCTING:
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


def _names_of_calls(messages: Sequence[Mapping[str, Any]]) -> Mapping[str, str]:
    """Id of a call -> the tool's name, which Gemini wants with the result."""
    return {
        call["id"]: str(call["function"].get("name") or "")
        for message in messages
        for call in message.get("tool_calls") or ()
        if isinstance(call.get("id"), str) and isinstance(call.get("function"), Mapping)
    }


def _parts(target: Target, message: Mapping[str, Any], path: str, names: Mapping[str, str]) -> Iterator[Part]:
    match role := role_of(target, message, path):
        case "tool":
            yield _tool_result(target, message, path, names)
        case "assistant":
            yield from _assistant(target, message, path)
        case "user":
            yield from _content(target, message, path, may_see=True)
        case _:
            raise unsupported(target, f"{path}.role", f"there is no role {role!r}")


def _content(target: Target, message: Mapping[str, Any], path: str, *, may_see: bool) -> Iterator[Part]:
    for index, part in enumerate(parts_of(message.get("content"))):
        where = f"{path}.content[{index}]"
        text = text_of(part)
        if text is not None:
            if text:
                yield {"text": text}
        elif not may_see:
            raise unsupported(target, where, "only text can stand here")
        else:
            yield _media(target, part, where)


def _media(target: Target, part: Mapping[str, Any], where: str) -> Part:
    match part.get("type"):
        case "image_url":
            return _image(target, image_url_of(part, where), where)
        case "input_audio":
            audio = mapping_of(part.get("input_audio"), f"{where}.input_audio") or {}
            kind = _SOUNDS.get(str(audio.get("format")))
            if kind is None:
                raise unsupported(target, where, f"audio is {' or '.join(_SOUNDS)}")
            return {"inlineData": {"mimeType": kind, "data": audio.get("data")}}
        case "file":
            file = mapping_of(part.get("file"), f"{where}.file") or {}
            if not isinstance(file.get("file_data"), str):
                raise unsupported(target, f"{where}.file", "a file must come along, as file_data")
            media = read_data_url(file["file_data"], f"{where}.file.file_data")
            return {"inlineData": {"mimeType": media.kind, "data": media.data}}
        case kind:
            raise unsupported(target, where, f"there are no parts of type {kind!r}")


def _image(target: Target, url: str, where: str) -> Part:
    if url.startswith("data:"):
        media = read_data_url(url, f"{where}.image_url.url")
        return {"inlineData": {"mimeType": media.kind, "data": media.data}}
    kind, _ = mimetypes.guess_type(urlsplit(url).path)
    if kind is None or not kind.startswith("image/"):
        raise unsupported(target, f"{where}.image_url", "its address does not tell what kind of image it is")
    return {"fileData": {"mimeType": kind, "fileUri": url}}


def _assistant(target: Target, message: Mapping[str, Any], path: str) -> Iterator[Part]:
    texts = list(_content(target, message, path, may_see=False))
    refusal = word_of(message.get("refusal"), f"{path}.refusal")
    if refusal:
        texts.append({"text": refusal})
    signature = _signature(message)
    if texts and signature:
        texts[-1]["thoughtSignature"] = signature
    yield from texts
    for index, call in enumerate(message.get("tool_calls") or ()):
        where = f"{path}.tool_calls[{index}]"
        function = called_function(target, call, where)
        part: Part = {"functionCall": {"name": function["name"], "args": arguments_of(function, where)}}
        if call.get("id"):
            part["functionCall"]["id"] = call["id"]
        signature = _signature(call)
        if signature is None and index == 0 and "reasoning" in target.abilities:
            signature = UNSIGNED
        yield {**part, "thoughtSignature": signature} if signature else part


def _signature(value: Mapping[str, Any]) -> str | None:
    extra = value.get("extra_content")
    google = extra.get("google") if isinstance(extra, Mapping) else None
    signature = google.get("thought_signature") if isinstance(google, Mapping) else None
    return signature if isinstance(signature, str) and signature else None


def _tool_result(target: Target, message: Mapping[str, Any], path: str, names: Mapping[str, str]) -> Part:
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


def _response(text: str, *, is_error: bool) -> dict[str, Any]:
    """An object, as Gemini wants it: the tool's own where it gave one, else its text."""
    if is_error:
        return {"error": text}
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = None
    return {"output": value if isinstance(value, dict | list) else text}
