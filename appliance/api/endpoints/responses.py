"""OpenAI's Responses, kept nowhere: each request brings its whole conversation."""

from starlette.requests import Request as Http
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.dialect_response import translated
from appliance.api.intake import RequestIntake
from appliance.api.json_responses import json_response
from appliance.tasks.chat import read_translated_chat, read_translated_count
from appliance.wire.responses.inbound import read_responses_chat, read_responses_count
from appliance.wire.responses.inbound_reply import response_of
from appliance.wire.responses.inbound_stream import ResponsesStreamWriter


class ResponsesEndpoints:
    def __init__(self, rim: RequestIntake) -> None:
        self._rim = rim

    async def create(self, http: Http) -> ASGIApp:
        opened = await self._rim.open(
            http, lambda body: read_translated_chat("responses", body, read_responses_chat(body))
        )
        original = opened.calls[0].original or {}
        answer = await self._rim.answer(http, opened)
        return await translated(
            answer,
            opened,
            whole=lambda payload: response_of(payload, original),
            writer=lambda: ResponsesStreamWriter(original),
        )

    async def count(self, http: Http) -> Response:
        opened = await self._rim.open(
            http, lambda body: read_translated_count("responses", body, read_responses_count(body))
        )
        counted = await self._rim.count(http, opened)
        payload = {"object": "response.input_tokens", "input_tokens": counted.tokens}
        return json_response(payload, headers=counted.headers())
