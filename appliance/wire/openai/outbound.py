"""A chat as a request of OpenAI's own API: as it came, but for what a provider does differently."""

from collections.abc import Mapping
from typing import Final
from urllib.parse import quote

from appliance.core import PLAIN, Target, UpstreamCall, Usage
from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.wire.chat_fields import drop_left_out, is_harmless, unsupported
from appliance.wire.chat_ir import wants_usage
from appliance.wire.dialect import CHAT_PATH, WireRequest, add_query, make_wire_request
from appliance.wire.openai import vllm
from appliance.wire.openai.stream import ChatStreamPassthrough
from appliance.wire.usage import read_usage

_LIMITS: Final = ("max_completion_tokens", "max_tokens")
_STREAMED: Final = frozenset({CHAT_PATH, "/completions"})


def write_openai_request(target: Target, outgoing: UpstreamCall, *, stream: bool, salt: str) -> WireRequest:
    """Any of OpenAI's paths. Raises Unsupported naming the field that the provider does not take."""
    wire = target.wire
    body: MutableJsonObject = {**outgoing.body, "model": target.model}
    if wire is not PLAIN:
        body = _adapt(target, outgoing.path, body)
    if vllm.is_vllm(target):
        body = vllm.check_fields(target, outgoing.path, body)
    if stream:
        body["stream"] = True
        options = body.pop("stream_options", None)
        if wire.stream_usage:
            body["stream_options"] = {**(options if isinstance(options, Mapping) else {}), "include_usage": True}
    if target.provider is None:
        body["cache_salt"] = salt
    return make_wire_request(target, outgoing, _path(target, outgoing.path), body)


def read_openai_reply(request: WireRequest, payload: JsonObject) -> tuple[JsonObject, Usage]:
    """The payload as it came. Raises RejectedReply where vLLM answered with none of the texts it was given."""
    if vllm.is_vllm(request.target):
        vllm.check_choices(request.outgoing.body, payload)
    return payload, read_usage(payload.get("usage")) or Usage()


def pass_openai_stream(request: WireRequest) -> ChatStreamPassthrough:
    return ChatStreamPassthrough(keep_usage=wants_usage(request.outgoing.body))


def _path(target: Target, path: str) -> str:
    if target.wire.deployments:
        path = f"/deployments/{quote(target.model, safe='')}{path}"
    return add_query(target, path)


def _adapt(target: Target, path: str, body: JsonObject) -> MutableJsonObject:
    """The body with the provider's own names, without what it does not need. Raises Unsupported."""
    wire = target.wire
    adapted = drop_left_out(target, body)
    for name in wire.refuses:
        value = adapted.pop(name, None)
        if value is not None and not is_harmless(name, value):
            raise unsupported(target, name)
    for ours, theirs in wire.renames:
        if ours in adapted:
            adapted[theirs] = adapted.pop(ours)
    if path in _STREAMED and wire.token_limit != "as_given":
        limits = [adapted.pop(name, None) for name in _LIMITS]
        limit = next((limit for limit in limits if limit is not None), None)
        if limit is not None:
            adapted[wire.token_limit if path == CHAT_PATH else "max_tokens"] = limit
    if wire.strips and isinstance(adapted.get("messages"), list):
        adapted["messages"] = [_strip(message, wire.strips) for message in adapted["messages"]]
    return adapted


def _strip(message: object, names: frozenset[str]) -> object:
    if not isinstance(message, Mapping):
        return message
    calls = message.get("tool_calls")
    if "extra_content" in names and isinstance(calls, list) and any("extra_content" in call for call in calls):
        message = {**message, "tool_calls": [_without(call, frozenset({"extra_content"})) for call in calls]}
    return message if names.isdisjoint(message) else _without(message, names)


def _without(value: JsonObject, names: frozenset[str]) -> JsonObject:
    return {name: part for name, part in value.items() if name not in names}
