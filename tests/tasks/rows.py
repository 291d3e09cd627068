"""Targets and replies that the tasks' tests share."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from appliance.core import Ability, Target, UpstreamReply, Usage
from appliance.errors import RequestError

LOCAL = Target(
    name="onsite/small",
    location="onsite",
    dialect="openai",
    address="unix:/nowhere",
    model="small",
    abilities=frozenset({"chat", "completions", "labels", "json_schema", "logprobs", "tools"}),
)


def hosted(*abilities: Ability) -> Target:
    return Target(
        name="acme/large",
        location="hosted",
        dialect="openai",
        address="https://acme.example/v1",
        model="large",
        abilities=frozenset(abilities),
        provider="acme",
    )


def reply(payload: Any, usage: Usage | None = None) -> UpstreamReply:
    return UpstreamReply(payload, usage or Usage(), 0.1, 0.2)


def chat_payload(content: str | None, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **more.pop("message", {})}
    return {"id": "c", "model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "stop", **more}]}


def refusal(read: Callable[[Mapping[str, Any]], Any], body: Mapping[str, Any]) -> RequestError:
    """The error a reader refuses `body` with."""
    with pytest.raises(RequestError) as caught:
        read(body)
    assert caught.value.status < 500
    return caught.value
