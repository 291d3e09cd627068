"""Targets of each dialect, and requests as they would go to them."""

from typing import Any

from appliance.core import Target, UpstreamCall
from appliance.wire.dialect import CHAT_PATH, WireRequest
from tests.router.scene import hosted_target

CALL = {"id": "call:1.a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
ASKED = {"role": "user", "content": "Weather?"}


def claude(**fields: Any) -> Target:
    return hosted_target(dialect="anthropic", abilities=frozenset({"chat", "tools", "reasoning"}), **fields)


def gem(**fields: Any) -> Target:
    return hosted_target(dialect="gemini", **{"abilities": frozenset({"chat", "tools"}), **fields})


def wire_request(target: Target) -> WireRequest:
    body = {"stream": True, "stream_options": {"include_usage": True}}
    return WireRequest(target, UpstreamCall(CHAT_PATH, body), CHAT_PATH, b"")
