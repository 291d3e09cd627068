"""OpenAI's Responses, kept nowhere: each request brings its whole conversation."""

from functools import partial
from typing import Final

from starlette.requests import Request as Http
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.dialect_response import respond_in_dialect
from appliance.api.intake import RequestIntake
from appliance.api.json_responses import json_response
from appliance.tasks.chat import read_translated_chat, read_translated_count
from appliance.wire.registry import INBOUND

_RESPONSES: Final = INBOUND["responses"]


class ResponsesEndpoints:
    def __init__(self, rim: RequestIntake) -> None:
        self._rim = rim

    async def create(self, http: Http) -> ASGIApp:
        opened = await self._rim.open(http, partial(read_translated_chat, _RESPONSES))
        answer = await self._rim.answer(http, opened)
        return await respond_in_dialect(answer, opened, _RESPONSES)

    async def count(self, http: Http) -> Response:
        opened = await self._rim.open(http, partial(read_translated_count, _RESPONSES))
        counted = await self._rim.count(http, opened)
        payload = {"object": "response.input_tokens", "input_tokens": counted.tokens}
        return json_response(payload, headers=counted.headers())
