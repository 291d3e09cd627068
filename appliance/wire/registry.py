"""The table of dialects. A new one is a package beside the others and a row here."""

from collections.abc import Mapping
from typing import Final

from appliance.core import Endpoint, Target, UpstreamCall
from appliance.core.json_types import JsonObject
from appliance.errors import ApplianceError
from appliance.wire.anthropic.forward import AnthropicForwardedStream, forward_anthropic_request
from appliance.wire.anthropic.inbound import read_anthropic_chat, read_anthropic_count
from appliance.wire.anthropic.outbound import write_anthropic_request
from appliance.wire.anthropic.reply import (
    anthropic_error_status,
    read_anthropic_reply,
    write_anthropic_error,
    write_anthropic_reply,
)
from appliance.wire.anthropic.stream import AnthropicStreamTranslator, AnthropicStreamWriter
from appliance.wire.dialect import CHAT_PATH, InboundDialect, OutboundDialect, WireDialect
from appliance.wire.forward import Forwarder
from appliance.wire.gemini.forward import GeminiForwardedStream, forward_gemini_request
from appliance.wire.gemini.inbound import read_gemini_chat, read_gemini_count
from appliance.wire.gemini.outbound import write_gemini_request
from appliance.wire.gemini.reply import read_gemini_reply, write_gemini_error, write_gemini_reply
from appliance.wire.gemini.stream import GeminiStreamTranslator, GeminiStreamWriter
from appliance.wire.openai.outbound import pass_openai_stream, read_openai_reply, write_openai_request
from appliance.wire.responses.forward import ResponsesForwardedStream, forward_responses_request
from appliance.wire.responses.inbound import read_responses_chat, read_responses_count
from appliance.wire.responses.outbound import write_responses_request
from appliance.wire.responses.reply import read_responses_reply, write_responses_reply
from appliance.wire.responses.stream import ResponsesStreamTranslator, ResponsesStreamWriter


def write_openai_error(error: ApplianceError, request_id: str | None = None) -> JsonObject:
    """OpenAI's errors carry no request id."""
    return error.to_openai()


def _own_status(error: ApplianceError) -> int:
    return error.status


OPENAI: Final = WireDialect(
    name="openai",
    inbound=None,
    outbound=OutboundDialect(write_openai_request, read_openai_reply, pass_openai_stream),
    write_error=write_openai_error,
    error_status=_own_status,
)
ANTHROPIC: Final = WireDialect(
    name="anthropic",
    inbound=InboundDialect(
        endpoint="messages",
        path="/v1/messages",
        read_chat=read_anthropic_chat,
        read_count=read_anthropic_count,
        write_reply=write_anthropic_reply,
        write_stream=AnthropicStreamWriter,
    ),
    outbound=OutboundDialect(write_anthropic_request, read_anthropic_reply, AnthropicStreamTranslator),
    write_error=write_anthropic_error,
    error_status=anthropic_error_status,
)
RESPONSES: Final = WireDialect(
    name="responses",
    inbound=InboundDialect(
        endpoint="responses",
        path="/v1/responses",
        read_chat=read_responses_chat,
        read_count=read_responses_count,
        write_reply=write_responses_reply,
        write_stream=ResponsesStreamWriter,
    ),
    outbound=OutboundDialect(write_responses_request, read_responses_reply, ResponsesStreamTranslator),
    write_error=write_openai_error,
    error_status=_own_status,
)
GEMINI: Final = WireDialect(
    name="gemini",
    inbound=InboundDialect(
        endpoint="generate_content",
        path=None,
        read_chat=read_gemini_chat,
        read_count=read_gemini_count,
        write_reply=write_gemini_reply,
        write_stream=GeminiStreamWriter,
    ),
    outbound=OutboundDialect(write_gemini_request, read_gemini_reply, GeminiStreamTranslator),
    write_error=write_gemini_error,
    error_status=_own_status,
)

DIALECTS: Final[Mapping[str, WireDialect]] = {one.name: one for one in (OPENAI, ANTHROPIC, RESPONSES, GEMINI)}
INBOUND: Final[Mapping[Endpoint, InboundDialect]] = {
    one.inbound.endpoint: one.inbound for one in DIALECTS.values() if one.inbound is not None
}
"""Dialects that callers speak and that are translated, by their endpoint."""


FORWARDERS: Final[Mapping[str, Forwarder]] = {
    "anthropic": Forwarder(forward_anthropic_request, AnthropicForwardedStream),
    "responses": Forwarder(forward_responses_request, ResponsesForwardedStream),
    "gemini": Forwarder(forward_gemini_request, GeminiForwardedStream),
}
"""By the dialect's name. Chats are not here: their translation changes nothing but what a provider's quirks ask for."""


def find_forwarder(target: Target, outgoing: UpstreamCall) -> Forwarder | None:
    """How the caller's own body is written for `target`; None where it does not speak the caller's dialect."""
    if outgoing.original is None or target.provider is None:
        return None
    spoken = find_dialect(target, outgoing)
    is_same = spoken.inbound is not None and spoken.inbound.endpoint == outgoing.original.endpoint
    return FORWARDERS[spoken.name] if is_same else None


def find_outbound(target: Target, outgoing: UpstreamCall) -> OutboundDialect:
    return find_dialect(target, outgoing).outbound


def find_dialect(target: Target, outgoing: UpstreamCall) -> WireDialect:
    """What `target` speaks. Models that know OpenAI's newer API alone speak that for chats."""
    if target.dialect == "openai" and target.wire.api == "responses" and outgoing.path == CHAT_PATH:
        return RESPONSES
    return DIALECTS[target.dialect]
