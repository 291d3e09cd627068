"""What a provider wants back with the next request, carried through a dialect that has no place for it.

Clients of every dialect give back what they were given without looking into it, so it travels as a text in the field
that the dialect has for its own such things. It is readable, not secret: whoever has it may know what it says.
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Any, Final

import orjson

from appliance.wire.chat_stream import thinking_blocks_of

_MARK: Final = "appliance1."


def pack(value: Mapping[str, Any]) -> str:
    return _MARK + base64.urlsafe_b64encode(orjson.dumps(value)).decode()


def unpack(text: str) -> Mapping[str, Any] | None:
    """What `pack` was given; None for texts that were not made here."""
    if not text.startswith(_MARK):
        return None
    try:
        value = orjson.loads(base64.urlsafe_b64decode(text[len(_MARK) :]))
    except (binascii.Error, ValueError):
        return None
    return value if isinstance(value, dict) else None


def foreign_of(message: Mapping[str, Any], own_blocks: frozenset[str]) -> dict[str, Any]:
    """What of a message or delta other dialects than the caller's want back: their blocks, and their extra content."""
    foreign: dict[str, Any] = {}
    others = [one for one in thinking_blocks_of(message) if one.get("type") not in own_blocks]
    if others:
        foreign["thinking_blocks"] = others
    if isinstance(message.get("extra_content"), dict):
        foreign["extra_content"] = message["extra_content"]
    calls = {
        str(call.get("id")): call["extra_content"]
        for call in message.get("tool_calls") or ()
        if isinstance(call, dict) and isinstance(call.get("extra_content"), dict)
    }
    if calls:
        foreign["calls"] = calls
    return foreign


def give_back(message: dict[str, Any], foreign: Mapping[str, Any]) -> None:
    """Put into a message what `foreign_of` took of it. What somebody changed in between is left out."""
    blocks = foreign.get("thinking_blocks")
    if isinstance(blocks, list):
        kept = [block for block in blocks if isinstance(block, dict)]
        message["thinking_blocks"] = [*message.get("thinking_blocks", ()), *kept]
    if isinstance(foreign.get("extra_content"), dict):
        message["extra_content"] = foreign["extra_content"]
    calls = foreign.get("calls")
    for call in message.get("tool_calls") or () if isinstance(calls, dict) else ():
        if isinstance(calls, dict) and isinstance(calls.get(call["id"]), dict):
            call["extra_content"] = calls[call["id"]]
