"""The OpenAI dialect. Replies and streams go through as they are; a provider's differences are applied to requests."""

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from appliance.core import PLAIN, Target, UpstreamCall, Usage
from appliance.wire.chat_fields import body_bytes, is_harmless, left_out, unsupported
from appliance.wire.dialect import StreamTranslator, WireRequest, most_output_tokens
from appliance.wire.openai import vllm
from appliance.wire.responses import outbound
from appliance.wire.sse import SseReader, read_usage
from appliance.wire.stream_translator import wants_usage

_LIMITS: Final = ("max_completion_tokens", "max_tokens")
_CHAT: Final = "/chat/completions"
_STREAMED: Final = frozenset({_CHAT, "/completions"})


class OpenaiDialect:
    def write(self, target: Target, outgoing: UpstreamCall, *, stream: bool, salt: str) -> WireRequest:
        wire = target.wire
        if wire.api == "responses" and outgoing.path == _CHAT:
            return outbound.write(target, outgoing, stream=stream)
        body: dict[str, Any] = {**outgoing.body, "model": target.model}
        if wire is not PLAIN:
            body = _adapted(target, outgoing.path, body)
        if vllm.is_vllm(target):
            body = vllm.checked(target, outgoing.path, body)
        if stream:
            body["stream"] = True
            options = body.pop("stream_options", None)
            if wire.stream_usage:
                body["stream_options"] = {**(options if isinstance(options, Mapping) else {}), "include_usage": True}
        if target.provider is None:
            body["cache_salt"] = salt
        most = most_output_tokens(target, outgoing, body)
        headers = dict(wire.headers)
        return WireRequest(target, outgoing, _path(target, outgoing.path), body_bytes(target, body), headers, most)

    def read(self, letter: WireRequest, payload: dict[str, Any]) -> tuple[dict[str, Any], Usage]:
        if _is_response(letter):
            return outbound.read(letter, payload)
        if vllm.is_vllm(letter.target):
            vllm.check_choices(letter.outgoing.body, payload)
        return payload, read_usage(payload.get("usage")) or Usage()

    def passage(self, letter: WireRequest) -> StreamTranslator:
        if _is_response(letter):
            return outbound.ResponsesStreamTranslator(letter)
        return SseReader(keep_usage=wants_usage(letter.outgoing.body))


def _is_response(letter: WireRequest) -> bool:
    return letter.target.wire.api == "responses" and letter.outgoing.path == _CHAT


def _path(target: Target, path: str) -> str:
    wire = target.wire
    if wire.deployments:
        path = f"/deployments/{quote(target.model, safe='')}{path}"
    return f"{path}?{wire.query}" if wire.query else path


def _adapted(target: Target, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The body with the provider's own names, without what it does not need. Raises Unsupported."""
    wire = target.wire
    body = left_out(target, body)
    for name in wire.refuses:
        value = body.pop(name, None)
        if value is not None and not is_harmless(name, value):
            raise unsupported(target, name)
    for ours, theirs in wire.renames:
        if ours in body:
            body[theirs] = body.pop(ours)
    if path in _STREAMED and wire.token_limit != "as_given":
        limits = [body.pop(name, None) for name in _LIMITS]
        limit = next((limit for limit in limits if limit is not None), None)
        if limit is not None:
            body[wire.token_limit if path == _CHAT else "max_tokens"] = limit
    if wire.strips and isinstance(body.get("messages"), list):
        body["messages"] = [_stripped(message, wire.strips) for message in body["messages"]]
    return body


def _stripped(message: Any, names: frozenset[str]) -> Any:
    if not isinstance(message, Mapping):
        return message
    calls = message.get("tool_calls")
    if "extra_content" in names and isinstance(calls, list) and any("extra_content" in call for call in calls):
        message = {**message, "tool_calls": [_without(call, frozenset({"extra_content"})) for call in calls]}
    return message if names.isdisjoint(message) else _without(message, names)


def _without(value: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: part for name, part in value.items() if name not in names}
