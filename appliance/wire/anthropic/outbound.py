"""The Anthropic dialect: the Messages API, as the official SDK types it. Chat only."""

from typing import Any

from appliance.core import Target, UpstreamCall, Usage
from appliance.errors import Unsupported
from appliance.wire.anthropic.outbound_reply import AnthropicStreamTranslator, read_message
from appliance.wire.anthropic.outbound_request import JSON_TOOL, message_request
from appliance.wire.chat_fields import body_bytes
from appliance.wire.dialect import StreamTranslator, WireRequest, most_output_tokens
from appliance.wire.stream_translator import wants_usage

__all__ = ["AnthropicDialect"]


class AnthropicDialect:
    def write(self, target: Target, outgoing: UpstreamCall, *, stream: bool, salt: str) -> WireRequest:
        if outgoing.path != "/chat/completions":
            raise Unsupported(
                f"{target.name} speaks Anthropic's Messages API, which has no {outgoing.path}", param="model"
            )
        body = message_request(target, outgoing.body)
        if stream:
            body["stream"] = True
        query = f"?{target.wire.query}" if target.wire.query else ""
        most = most_output_tokens(target, outgoing, body)
        headers = dict(target.wire.headers)
        return WireRequest(target, outgoing, f"/messages{query}", body_bytes(target, body), headers, most)

    def read(self, letter: WireRequest, payload: dict[str, Any]) -> tuple[dict[str, Any], Usage]:
        return read_message(letter.target, payload, _answer_tool(letter))

    def passage(self, letter: WireRequest) -> StreamTranslator:
        body = letter.outgoing.body
        return AnthropicStreamTranslator(
            letter.target.model, keep_usage=wants_usage(body), answer_tool=_answer_tool(letter)
        )


def _answer_tool(letter: WireRequest) -> str | None:
    """The tool whose input is the answer, where JSON without a schema was asked for."""
    format = letter.outgoing.body.get("response_format")
    is_json = isinstance(format, dict) and format.get("type") == "json_object"
    return JSON_TOOL if is_json else None
