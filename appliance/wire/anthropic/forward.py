"""Requests of the Messages API to a target that speaks it: as they came."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from appliance.core import Target, UpstreamCall
from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.wire.anthropic.reply import ANTHROPIC_USAGE
from appliance.wire.dialect import WireRequest, add_query, make_wire_request
from appliance.wire.forward import ForwardedStream, has_quirks, read_limit, set_stream
from appliance.wire.opaque_state import unpack_state

_ASK_FOR_NOTHING: Final = frozenset(
    {
        "container",
        "context_management",
        "diagnostics",
        "inference_geo",
        "mcp_servers",
        "speed",
        "user_profile_id",
        "workspace_id",
    }
)
"""Fields that callers may send only with values that ask for nothing. Some are errors without a beta header."""

_MIN_BUDGET_TOKENS: Final = 1_024
_NOT_IN_AN_ID: Final = re.compile(r"[^a-zA-Z0-9_-]")


def forward_anthropic_request(target: Target, outgoing: UpstreamCall, *, stream: bool) -> WireRequest | None:
    """None where ids or thinking of another provider have to be rewritten, or for a field the target cannot take."""
    assert outgoing.original is not None
    given = outgoing.original.body
    messages = _own_messages(given["messages"])
    if messages is None or has_quirks(target, outgoing):
        return None
    body = {name: value for name, value in given.items() if name not in _ASK_FOR_NOTHING}
    body |= {"model": target.model, "messages": messages}
    older_format = body.pop("output_format", None)
    if older_format is not None:
        body["output_config"] = {"format": older_format, **(body.get("output_config") or {})}
    if target.wire.thinking == "budget" and (body.get("output_config") or {}).get("effort"):
        return None
    _lower_limit(body, read_limit(outgoing))
    set_stream(body, stream=stream)
    return make_wire_request(target, outgoing, add_query(target, "/messages"), body, is_forwarded=True)


def _lower_limit(body: MutableJsonObject, limit: int | None) -> None:
    """What is thought counts as part of the answer, so a thinking budget must stay below the limit."""
    if limit is None or limit >= body["max_tokens"]:
        return
    body["max_tokens"] = limit
    thinking = body.get("thinking")
    budget = thinking.get("budget_tokens") if isinstance(thinking, Mapping) else None
    if isinstance(thinking, Mapping) and isinstance(budget, int) and budget >= limit:
        smaller = {**thinking, "budget_tokens": limit // 2}
        body["thinking"] = smaller if limit // 2 >= _MIN_BUDGET_TOKENS else {"type": "disabled"}


def _own_messages(messages: Sequence[JsonObject]) -> Sequence[JsonObject] | None:
    """The messages without what other providers thought; the same list where nobody else had a say."""
    kept = []
    for message in messages:
        content = message.get("content")
        if not isinstance(content, list):
            kept.append(message)
            continue
        if any(_has_odd_id(block) for block in content):
            return None
        own = [block for block in content if not _is_foreign(block)]
        if not own:
            return None
        kept.append(message if len(own) == len(content) else {**message, "content": own})
    return kept


def _has_odd_id(block: JsonObject) -> bool:
    name = {"tool_use": "id", "tool_result": "tool_use_id"}.get(str(block.get("type")))
    return name is not None and _NOT_IN_AN_ID.search(block[name]) is not None


def _is_foreign(block: JsonObject) -> bool:
    """Thinking that Anthropic did not sign, and what we have packed for its provider."""
    if block.get("type") == "thinking":
        return not block.get("signature")
    return block.get("type") == "redacted_thinking" and unpack_state(block["data"]) is not None


class AnthropicForwardedStream(ForwardedStream):
    """Counts in `message_delta` are totals, and complete those of `message_start`."""

    __slots__ = ("_counts",)
    notable = re.compile(rb'"type"\s*:\s*"(?:message_start|message_delta|message_stop|error)"')

    def __init__(self, request: WireRequest) -> None:
        super().__init__(request)
        self._counts: MutableJsonObject = {}

    def read_event(self, event: JsonObject) -> bool:
        match event.get("type"):
            case "message_start":
                self._count((event.get("message") or {}).get("usage"))
            case "message_delta":
                self._count(event.get("usage"))
                self.finished_choices = 1 if (event.get("delta") or {}).get("stop_reason") else 0
            case "message_stop":
                self.done = True
            case "error":
                self.error = event.get("error") or event
        return True

    def _count(self, counts: Any) -> None:
        if isinstance(counts, Mapping):
            self._counts |= {name: value for name, value in counts.items() if value is not None}
            self.usage = ANTHROPIC_USAGE.read(self._counts)
