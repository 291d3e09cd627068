"""The Gemini dialect: generateContent and streamGenerateContent, as the official SDK types them. Chat only."""

from typing import Any
from urllib.parse import quote

from appliance.core import Target, UpstreamCall, Usage
from appliance.errors import Unsupported
from appliance.wire.chat_fields import body_bytes
from appliance.wire.dialect import StreamTranslator, WireRequest, most_output_tokens
from appliance.wire.gemini.outbound_reply import GeminiStreamTranslator, read_content
from appliance.wire.gemini.outbound_request import content_request
from appliance.wire.stream_translator import wants_usage

__all__ = ["GeminiDialect"]


class GeminiDialect:
    def write(self, target: Target, outgoing: UpstreamCall, *, stream: bool, salt: str) -> WireRequest:
        if outgoing.path != "/chat/completions":
            raise Unsupported(
                f"{target.name} speaks Gemini's generateContent, which has no {outgoing.path}", param="model"
            )
        body = content_request(target, outgoing.body)
        verb = "streamGenerateContent" if stream else "generateContent"
        query = "&".join(part for part in ("alt=sse" if stream else "", target.wire.query) if part)
        name = quote(target.model.removeprefix("models/"), safe="/")
        path = f"/models/{name}:{verb}" + (f"?{query}" if query else "")
        most = most_output_tokens(target, outgoing, body)
        headers = dict(target.wire.headers)
        return WireRequest(target, outgoing, path, body_bytes(target, body), headers, most)

    def read(self, letter: WireRequest, payload: dict[str, Any]) -> tuple[dict[str, Any], Usage]:
        return read_content(letter.target, payload)

    def passage(self, letter: WireRequest) -> StreamTranslator:
        body = letter.outgoing.body
        choices = body.get("n")
        return GeminiStreamTranslator(
            letter.target.model,
            keep_usage=wants_usage(body),
            choices=choices if isinstance(choices, int) else 1,
        )
