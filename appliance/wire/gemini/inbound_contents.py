"""Contents and parts of Gemini's API as the messages of a chat."""

import base64
import binascii
from typing import Final

from appliance.core.json_types import JsonObject
from appliance.errors import RequestError, Unsupported
from appliance.wire.chat_ir import (
    MAX_MESSAGES,
    ChatMessage,
    ContentPart,
    ToolCall,
    function_call,
    image_part,
    join_parts,
    json_text,
    text_part,
)
from appliance.wire.gemini.reply import signed_content
from appliance.wire.media import check_web_address, make_data_url, plain_base64
from appliance.wire.opaque_state import restore_state, unpack_state
from appliance.wire.strict_fields import StrictFields, check_tool_name, missing, wrong

_KINDS: Final = ("text", "inlineData", "fileData", "functionCall", "functionResponse")
_KNOWN: Final = ", ".join(_KINDS)


def read_contents(given: object, system: object) -> list[ChatMessage]:
    """The chat that `contents` and `systemInstruction` are. Raises RequestError naming the part that is wrong."""
    made: list[ChatMessage] = []
    if system is not None:
        made.append({"role": "system", "content": _system(system)})
    if given is None:
        raise missing("contents", 'it must be a list such as [{"role": "user", "parts": [{"text": "Hello"}]}]')
    if not isinstance(given, list):
        raise wrong("contents", given, "it must be a list of contents")
    if not 1 <= len(given) <= MAX_MESSAGES:
        raise RequestError(f"contents has {len(given)} contents: it must have 1 to {MAX_MESSAGES}", param="contents")
    calls = _Calls()
    for index, row in enumerate(given):
        made += _content(StrictFields(row, f"contents[{index}]", snake=True), calls)
    if made[-1]["role"] == "assistant":
        place = f"contents[{len(given) - 1}]"
        raise Unsupported(
            f"{place} is the model's: an answer cannot be begun for it here; end with the user's content", param=place
        )
    return made


class _Calls:
    """Which function calls wait for their response. This API knows them by name, chats by an id."""

    def __init__(self) -> None:
        self._waiting: list[tuple[str, str]] = []
        self._count = 0

    def begin(self, name: str, given: str | None) -> str:
        self._count += 1
        call_id = given or f"call_{self._count}"
        self._waiting.append((call_id, name))
        return call_id

    def end(self, name: str, given: str | None, path: str) -> str:
        """The id of the call that this is the response to. Raises RequestError where there is none."""
        for position, (call_id, called) in enumerate(self._waiting):
            if call_id == given or (given is None and called == name):
                del self._waiting[position]
                return call_id
        place = f"{path}.{'name' if given is None else 'id'}"
        said = name if given is None else given
        raise RequestError(f"{place} is {said[:100]!r}, which no functionCall before it waits for", param=place)


def _system(given: object) -> str | list[ContentPart]:
    if isinstance(given, str):
        return given
    content = StrictFields(given, "systemInstruction", snake=True)
    content.accept("role")
    parts = []
    for part in _parts(content):
        parts.append(text_part(part.required_text("text")))
        _finish(part)
    content.finish()
    return join_parts(parts)


def _content(content: StrictFields, calls: _Calls) -> list[ChatMessage]:
    role = content.one_of("role", ("user", "model", "function")) or "user"
    parts = _parts(content)
    content.finish()
    return [_model_turn(parts, calls)] if role == "model" else _user_turn(parts, calls)


def _parts(content: StrictFields) -> list[StrictFields]:
    rows = content.rows("parts", 1, MAX_MESSAGES, "parts")
    if rows is None:
        raise missing(content.at("parts"), "it must be a list of parts")
    return [StrictFields(row, f"{content.at('parts')}[{index}]", snake=True) for index, row in enumerate(rows)]


def _user_turn(parts: list[StrictFields], calls: _Calls) -> list[ChatMessage]:
    """Function responses as messages of their own, right behind the calls, then all else."""
    results: list[ChatMessage] = []
    said: list[ContentPart] = []
    for part in parts:
        response = part.object("functionResponse")
        if response is not None:
            results.append(_function_response(response, calls))
        elif part.get("text") is not None:
            said.append(text_part(part.required_text("text")))
            part.refuse("thought", "thoughts are the model's", allowed=(False,))
        elif part.get("inlineData") is not None or part.get("fileData") is not None:
            said.append(_media(part))
        else:
            raise _unknown(part)
        part.accept("thoughtSignature")
        _finish(part)
    return [*results, {"role": "user", "content": join_parts(said)}] if said else results


def _model_turn(parts: list[StrictFields], calls: _Calls) -> ChatMessage:
    texts: list[ContentPart] = []
    thoughts: list[str] = []
    made: list[ToolCall] = []
    message: ChatMessage = {"role": "assistant", "content": None}
    carried: list[JsonObject] = []
    for part in parts:
        foreign, signature = _signature(part)
        carried += [foreign] if foreign is not None else []
        call = part.object("functionCall")
        if call is not None:
            made.append(_function_call(call, calls))
            if signature is not None:
                made[-1]["extra_content"] = signed_content(signature)
        elif part.get("text") is not None:
            text = part.required_text("text")
            (thoughts.append(text) if part.flag("thought") else texts.append(text_part(text)))
            if signature is not None:
                message["extra_content"] = signed_content(signature)
        else:
            raise _unknown(part)
        _finish(part)
    texts = [part for part in texts if part["text"]] or texts[:1]
    message["content"] = join_parts(texts) if texts else None
    if made:
        message["tool_calls"] = made
    if any(thoughts):
        message["reasoning_content"] = "".join(thoughts)
    for foreign in carried:
        restore_state(message, foreign)
    return message


def _finish(part: StrictFields) -> None:
    part.refuse("videoMetadata", "videos are not read here")
    part.refuse("mediaResolution", "images are passed on as they are")
    part.accept("partMetadata")
    part.finish()


def _unknown(part: StrictFields) -> RequestError:
    return Unsupported(
        f"{part.path} holds nothing that is known here: only {_KNOWN} are supported, one in each part", param=part.path
    )


def _signature(part: StrictFields) -> tuple[JsonObject | None, str | None]:
    """A part's thought signature: what another dialect wants back, or Google's own."""
    text = part.text("thoughtSignature")
    if not text:
        return None, None
    plain = plain_base64(text)
    try:
        inside = base64.b64decode(plain, validate=True)
    except (binascii.Error, ValueError) as error:
        raise part.wrong("thoughtSignature", "it must be base64, as it was given") from error
    foreign = unpack_state(inside.decode("ascii", "replace"))
    return (foreign, None) if foreign is not None else (None, plain)


def _media(part: StrictFields) -> ContentPart:
    inline = part.object("inlineData")
    if inline is not None:
        kind, data = inline.get("mimeType"), inline.get("data")
        _check_image(kind, inline)
        address = make_data_url(kind, data, inline.at("data"), inline.at("mimeType"))
        media = inline
    else:
        file = part.object("fileData")
        assert file is not None
        _check_image(file.get("mimeType") or "image/*", file)
        address = check_web_address(file.get("fileUri"), file.at("fileUri"))
        media = file
    media.accept("displayName")
    media.finish()
    return image_part(address)


def _check_image(kind: object, media: StrictFields) -> None:
    if not isinstance(kind, str):
        raise media.wrong("mimeType", "it must be a media type such as image/png")
    if not kind.startswith("image/"):
        place = media.at("mimeType")
        raise Unsupported(f"{place} is {kind[:80]!r}: only text and images are supported here", param=place)


def _function_call(call: StrictFields, calls: _Calls) -> ToolCall:
    name = check_tool_name(call.get("name"), call.at("name"))
    arguments = call.mapping("args") or {}
    call_id = calls.begin(name, call.text("id"))
    call.refuse("willContinue", "calls are given whole", allowed=(False,))
    call.refuse("partialArgs", "calls are given whole", allowed=([],))
    call.finish()
    return function_call(call_id, name, arguments)


def _function_response(response: StrictFields, calls: _Calls) -> ChatMessage:
    name = check_tool_name(response.get("name"), response.at("name"))
    value = response.mapping("response")
    if value is None:
        raise missing(response.at("response"), "it must be an object")
    call_id = calls.end(name, response.text("id"), response.path)
    response.refuse("willContinue", "responses are given whole", allowed=(False,))
    response.refuse("scheduling", "responses are read at once")
    response.refuse("parts", "put the response into `response`", allowed=([],))
    response.finish()
    return {"role": "tool", "tool_call_id": call_id, "content": _response_text(value)}


def _response_text(value: JsonObject) -> str:
    """A function's result as the model reads it; the SDKs wrap plain ones as {"result": ...}."""
    only = value.get("result", value.get("output")) if len(value) == 1 else None
    return only if isinstance(only, str) else json_text(value)
