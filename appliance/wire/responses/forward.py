"""Requests of OpenAI's Responses API to a target that speaks it: as they came, and stored nowhere."""

import re
from collections.abc import Mapping, Sequence
from typing import Final

from appliance.core import Target, UpstreamCall
from appliance.core.json_types import JsonObject
from appliance.wire.dialect import WireRequest, add_query, make_wire_request
from appliance.wire.forward import ForwardedStream, has_quirks, read_limit, set_stream
from appliance.wire.opaque_state import unpack_state
from appliance.wire.responses.outbound import ENCRYPTED
from appliance.wire.usage import read_usage

_ASK_FOR_NOTHING: Final = frozenset(
    {
        "access_programs",
        "background",
        "context_management",
        "conversation",
        "image",
        "max_tool_calls",
        "moderation",
        "previous_response_id",
        "prompt",
    }
)
"""Fields that callers may send only with values that ask for nothing."""


def forward_responses_request(target: Target, outgoing: UpstreamCall, *, stream: bool) -> WireRequest | None:
    """None for a field that the target cannot take."""
    assert outgoing.original is not None
    given, reasons = outgoing.original.body, "reasoning" in target.abilities
    if has_quirks(target, outgoing) or (given.get("reasoning") and not reasons):
        return None
    body = {name: value for name, value in given.items() if name not in _ASK_FOR_NOTHING}
    # as nothing is stored, a conversation can go on only with what the model thought, in the items themselves
    body |= {"model": target.model, "store": False}
    if isinstance(given["input"], list):
        body["input"] = _own_items(given["input"])
    if reasons and ENCRYPTED not in (given.get("include") or ()):
        body["include"] = [*(given.get("include") or ()), ENCRYPTED]
    limit = read_limit(outgoing)
    if limit is not None:
        body["max_output_tokens"] = limit
    set_stream(body, stream=stream)
    return make_wire_request(target, outgoing, add_query(target, "/responses"), body, is_forwarded=True)


def _own_items(items: Sequence[JsonObject]) -> Sequence[JsonObject]:
    """The items without what other providers thought. What we have packed of this API's own reasoning is unpacked."""
    kept: list[JsonObject] = []
    is_changed = False
    for item in items:
        if item.get("type") != "reasoning":
            kept.append(item)
            continue
        sealed = item.get("encrypted_content")
        foreign = unpack_state(sealed) if sealed else {}
        if foreign is None:
            kept.append(item)
        else:
            is_changed = True
            kept += _own_reasoning(foreign)
    # the API misses the reasoning that belongs to an item by its id
    return [_without_id(item) for item in kept] if is_changed else kept


def _own_reasoning(foreign: JsonObject) -> list[JsonObject]:
    blocks = foreign.get("thinking_blocks")
    return [
        {name: value for name, value in block.items() if name != "index"}
        for block in (blocks if isinstance(blocks, list) else ())
        if isinstance(block, Mapping) and block.get("type") == "reasoning"
    ]


def _without_id(item: JsonObject) -> JsonObject:
    if item.get("type") == "reasoning":
        return item
    return {name: value for name, value in item.items() if name != "id"}


class ResponsesForwardedStream(ForwardedStream):
    """The last event holds the whole response, with its usage."""

    __slots__ = ()
    notable = re.compile(rb'"type"\s*:\s*"(?:response\.(?:completed|incomplete|failed)|error)"')

    def read_event(self, event: JsonObject) -> bool:
        response = event.get("response") or {}
        match event.get("type"):
            case "response.completed" | "response.incomplete":
                self.usage = read_usage(response.get("usage"))
                self.finished_choices, self.done = 1, True
            case "response.failed":
                self.error = response.get("error") or {"message": "the response failed"}
            case "error":
                self.error = {name: event.get(name) for name in ("message", "code", "param")}
        return True
