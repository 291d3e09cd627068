"""OpenAI's Responses, kept nowhere: each request brings its whole conversation."""

from starlette.requests import Request as Http
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.replies import json_response
from appliance.api.rim import Rim
from appliance.api.translated import translated
from appliance.tasks.responses.events import ResponseWriter
from appliance.tasks.responses.read import read, read_count
from appliance.tasks.responses.reply import response_of


class Responses:
    def __init__(self, rim: Rim) -> None:
        self._rim = rim

    async def create(self, http: Http) -> ASGIApp:
        opened = await self._rim.open(http, read)
        original = opened.calls[0].original or {}
        answer = await self._rim.answer(http, opened)
        return await translated(
            answer,
            opened,
            whole=lambda payload: response_of(payload, original),
            writer=lambda: ResponseWriter(original),
        )

    async def count(self, http: Http) -> Response:
        opened = await self._rim.open(http, read_count)
        counted = await self._rim.count(http, opened)
        payload = {"object": "response.input_tokens", "input_tokens": counted.tokens}
        return json_response(payload, headers=counted.headers())
