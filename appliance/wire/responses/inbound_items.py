"""Input items of OpenAI's Responses as the messages of a chat."""

from collections.abc import Sequence
from typing import Final

from appliance.core.json_types import JsonObject
from appliance.errors import RequestError, Unsupported
from appliance.wire.chat_ir import (
    MAX_MESSAGES,
    ChatMessage,
    ContentPart,
    function_call,
    image_part,
    join_parts,
    text_part,
)
from appliance.wire.media import is_web_address
from appliance.wire.opaque_state import restore_state, unpack_state
from appliance.wire.strict_fields import StrictFields, check_tool_name, missing, wrong

_ROLES: Final = ("user", "assistant", "system", "developer")
_STATUSES: Final = ("in_progress", "completed", "incomplete")
_TEXTS: Final = ("input_text", "output_text", "text")
_OWN_STATE: Final = "gAAAAA"
"""How encrypted reasoning begins that OpenAI's API made: a Fernet token of version 128."""

_KNOWN: Final = "message, function_call, function_call_output or reasoning"


def read_items(given: object, instructions: str | None) -> list[ChatMessage]:
    """The chat that `input` and `instructions` are. Raises RequestError naming the item that is wrong."""
    made: list[ChatMessage] = [{"role": "system", "content": instructions}] if instructions else []
    if given is None:
        raise missing("input", "it must be a string or a list of items")
    if isinstance(given, str):
        return [*made, {"role": "user", "content": given}]
    if not isinstance(given, list):
        raise wrong("input", given, "it must be a string or a list of items")
    if not 1 <= len(given) <= MAX_MESSAGES:
        raise RequestError(f"input has {len(given)} items: it must have 1 to {MAX_MESSAGES}", param="input")
    reader = _Reader(made)
    for index, item in enumerate(given):
        reader.take(StrictFields(item, f"input[{index}]"))
    reader.end_turn()
    if not made:
        raise RequestError("input holds nothing that could be answered: give a message", param="input")
    return made


class _Reader:
    """An assistant's turn is several items (reasoning, message, calls) that become one message of a chat."""

    def __init__(self, made: list[ChatMessage]) -> None:
        self._made = made
        self._called: set[str] = set()
        self._turn: ChatMessage | None = None
        self._reasoning: list[str] = []
        self._carried: list[JsonObject] = []

    def take(self, item: StrictFields) -> None:
        kind = item.get("type")
        if kind is None and item.get("role") is None and item.get("id") is not None:
            kind = "item_reference"
        if kind in (None, "message"):
            self._message(item)
        elif kind == "function_call":
            self._call(item)
        elif kind == "function_call_output":
            self._output(item)
        elif kind == "reasoning":
            self._think(item)
        else:
            raise _unknown_item(item, kind)

    def end_turn(self) -> None:
        """What the assistant said so far, as one message. Reasoning that led to nothing is left behind with it."""
        turn, self._turn = self._turn, None
        if turn is not None:
            if self._reasoning:
                turn["reasoning_content"] = "\n".join(self._reasoning)
            for foreign in self._carried:
                restore_state(turn, foreign)
            self._made.append(turn)
        self._reasoning, self._carried = [], []

    def _message(self, item: StrictFields) -> None:
        role = item.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise item.wrong("role", f"it must be one of {', '.join(_ROLES)}")
        content = _content(item.get("content"), item.at("content"))
        item.one_of("status", _STATUSES)
        item.accept("id", "phase")
        item.finish()
        if role != "assistant":
            self.end_turn()
            self._made.append({"role": role, "content": content})
            return
        if self._turn is not None:
            self.end_turn()
        self._turn = {"role": "assistant", "content": content}

    def _call(self, item: StrictFields) -> None:
        call_id = item.required_text("call_id")
        name = check_tool_name(item.get("name"), item.at("name"))
        arguments = item.required_text("arguments")
        item.one_of("status", _STATUSES)
        item.refuse("namespace", "tools have no namespaces here")
        item.refuse("async", "calls are answered in their turn", allowed=(False,))
        item.accept("id", "caller", "parsed_arguments")
        item.finish()
        self._called.add(call_id)
        if self._turn is None:
            self._turn = {"role": "assistant", "content": None}
        self._turn.setdefault("tool_calls", []).append(function_call(call_id, name, arguments or "{}"))

    def _output(self, item: StrictFields) -> None:
        call_id = item.required_text("call_id")
        if call_id not in self._called:
            place = item.at("call_id")
            raise RequestError(
                f"{place} is {call_id[:100]!r}, which no function_call item before it has; nothing is kept here, so "
                "send the call along with its output",
                param=place,
            )
        output = item.get("output")
        if output is None:
            raise missing(item.at("output"), "it must be a string or a list of parts")
        item.one_of("status", _STATUSES)
        item.refuse("namespace", "tools have no namespaces here")
        item.accept("id", "name", "caller")
        item.finish()
        self.end_turn()
        self._made.append({"role": "tool", "tool_call_id": call_id, "content": _content(output, item.at("output"))})

    def _think(self, item: StrictFields) -> None:
        """Reasoning as text, or what stood in `encrypted_content` when it left here."""
        content = _reasoning_texts(item, "content", "reasoning_text")
        summary = _reasoning_texts(item, "summary", "summary_text")
        sealed = item.text("encrypted_content")
        item.one_of("status", _STATUSES)
        item.accept("id")
        item.finish()
        if sealed:
            foreign = _own_reasoning(item, sealed) if sealed.startswith(_OWN_STATE) else unpack_state(sealed)
            if foreign is None:
                place = item.at("encrypted_content")
                raise Unsupported(
                    f"{place} was not made here, so nobody here can read it: leave the reasoning item out", param=place
                )
            self._carried.append(foreign)
        self._reasoning += content or summary


def _own_reasoning(item: StrictFields, sealed: str) -> JsonObject:
    """What came from OpenAI's API itself, for that API alone to read."""
    block = {"type": "reasoning", "summary": item.get("summary") or [], "encrypted_content": sealed}
    given = item.get("id")
    return {"thinking_blocks": [{**block, "id": given} if given else block]}


def _unknown_item(item: StrictFields, kind: object) -> RequestError:
    place = item.at("type")
    if kind == "item_reference":
        return Unsupported(
            f"{item.path} names an item by its id, and no items are kept here: send the item itself",
            param=item.path,
        )
    if not isinstance(kind, str):
        return item.wrong("type", f"it must be {_KNOWN}")
    return Unsupported(f"{place} is {kind[:80]!r}: only {_KNOWN} is supported here", param=place)


def _content(content: object, path: str) -> str | list[ContentPart]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(path, content, "it must be a string or a list of parts")
    return (
        join_parts([_part(StrictFields(part, f"{path}[{index}]")) for index, part in enumerate(content)])
        if content
        else ""
    )


def _part(part: StrictFields) -> ContentPart:
    kind = part.get("type")
    if kind in _TEXTS:
        made = text_part(part.required_text("text"))
        part.accept("annotations", "logprobs", "parsed")
    elif kind == "refusal":
        made = text_part(part.required_text("refusal"))
    elif kind == "input_image":
        made = _image(part)
    elif isinstance(kind, str):
        raise Unsupported(
            f"{part.at('type')} is {kind[:80]!r}: only text and images are supported here", param=part.at("type")
        )
    else:
        raise part.wrong("type", "it must be input_text, output_text or input_image")
    part.accept("prompt_cache_breakpoint")
    part.finish()
    return made


def _image(part: StrictFields) -> ContentPart:
    part.refuse("file_id", "no files are kept here; send the image in image_url")
    address = part.required_text("image_url")
    if not address.startswith("data:image/") and not is_web_address(address):
        raise part.wrong("image_url", "it must be an address (https) or the image itself (data:image/png;base64,...)")
    return image_part(address, part.one_of("detail", ("auto", "low", "high", "original")))


def _reasoning_texts(item: StrictFields, name: str, kind: str) -> Sequence[str]:
    texts = []
    for index, row in enumerate(item.rows(name, 0, MAX_MESSAGES, "parts") or ()):
        part = StrictFields(row, f"{item.at(name)}[{index}]")
        part.one_of("type", (kind,))
        texts.append(part.required_text("text"))
        part.finish()
    return texts
