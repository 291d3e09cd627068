"""Anthropic's endpoints: messages, the counting of their tokens, and the list of models in its shape."""

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from starlette.requests import Request as Http
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.dialect_response import respond_in_dialect
from appliance.api.intake import RequestIntake
from appliance.api.json_responses import json_response
from appliance.api.model_list import AUTO, found
from appliance.core import Target
from appliance.tasks.chat import read_translated_chat, read_translated_count
from appliance.wire.registry import INBOUND

_ANTHROPIC: Final = INBOUND["messages"]


class MessagesEndpoints:
    def __init__(self, rim: RequestIntake) -> None:
        self._rim = rim
        self._started_at = datetime.fromtimestamp(rim.wall_clock(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    async def create(self, http: Http) -> ASGIApp:
        opened = await self._rim.open(http, partial(read_translated_chat, _ANTHROPIC))
        answer = await self._rim.answer(http, opened)
        return await respond_in_dialect(answer, opened, _ANTHROPIC)

    async def count(self, http: Http) -> Response:
        opened = await self._rim.open(http, partial(read_translated_count, _ANTHROPIC))
        counted = await self._rim.count(http, opened)
        return json_response({"input_tokens": counted.tokens}, headers=counted.headers())

    async def models(self, http: Http) -> Response:
        """All on one page."""
        caller = self._rim.auth.caller(http.headers)
        targets = self._rim.pipeline.list_models(caller)
        rows = [self._row(AUTO, None), *(self._row(one.name, one) for one in targets)]
        return json_response({"data": rows, "has_more": False, "first_id": rows[0]["id"], "last_id": rows[-1]["id"]})

    async def model(self, http: Http) -> Response:
        caller, name = self._rim.auth.caller(http.headers), http.path_params["name"]
        return json_response(self._row(name, found(self._rim.pipeline, caller, name)))

    def _row(self, name: str, target: Target | None) -> Mapping[str, Any]:
        """`created_at` is when this node started."""
        return {
            "type": "model",
            "id": name,
            "display_name": name,
            "created_at": self._started_at,
            "lifecycle": "active",
            "max_input_tokens": None if target is None else target.context_tokens,
            "max_tokens": None if target is None else target.context_tokens,
        }
