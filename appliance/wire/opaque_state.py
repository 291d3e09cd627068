"""What a provider wants back with the next request, carried through a dialect that has no place for it.

Clients of every dialect give back what they were given without looking into it, so it travels as a text in the field
that the dialect has for its own such state. It is readable, not secret: its holder may know what it says.
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Final

import orjson

from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.wire.chat_ir import ChatDelta, ChatMessage, thinking_blocks

MARK: Final = "appliance1."


def pack_state(value: JsonObject) -> str:
    return MARK + base64.urlsafe_b64encode(orjson.dumps(value)).decode()


def unpack_state(text: str) -> JsonObject | None:
    """What `pack_state` was given; None for texts that were not made here."""
    if not text.startswith(MARK):
        return None
    try:
        value = orjson.loads(base64.urlsafe_b64decode(text[len(MARK) :]))
    except (binascii.Error, ValueError):
        return None
    return value if isinstance(value, dict) else None


def foreign_state(message: ChatDelta, own_blocks: frozenset[str] = frozenset()) -> MutableJsonObject:
    """What of a message or delta other dialects than the caller's want back: their blocks, and their extra content."""
    foreign: MutableJsonObject = {}
    others = [block for block in thinking_blocks(message) if block.get("type") not in own_blocks]
    if others:
        foreign["thinking_blocks"] = others
    if isinstance(message.get("extra_content"), Mapping):
        foreign["extra_content"] = message["extra_content"]
    calls = {
        str(call.get("id")): call["extra_content"]
        for call in message.get("tool_calls") or ()
        if isinstance(call, Mapping) and isinstance(call.get("extra_content"), Mapping)
    }
    if calls:
        foreign["calls"] = calls
    return foreign


def restore_state(message: ChatMessage, foreign: JsonObject) -> None:
    """Put into a message what `foreign_state` took of it. What was changed in between is left out."""
    blocks = foreign.get("thinking_blocks")
    if isinstance(blocks, list):
        kept = [block for block in blocks if isinstance(block, Mapping)]
        message["thinking_blocks"] = [*message.get("thinking_blocks", ()), *kept]
    extra = foreign.get("extra_content")
    if isinstance(extra, Mapping):
        message["extra_content"] = extra
    calls = foreign.get("calls")
    for call in message.get("tool_calls") or () if isinstance(calls, Mapping) else ():
        if isinstance(calls, Mapping) and isinstance(calls.get(call["id"]), Mapping):
            call["extra_content"] = calls[call["id"]]
