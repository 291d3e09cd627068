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
from appliance.api.json_responses import respond_json
from appliance.api.model_list import AUTO, find_model
from appliance.core import Target
from appliance.tasks.chat import read_translated_chat, read_translated_count
from appliance.wire.registry import INBOUND

_ANTHROPIC: Final = INBOUND["messages"]


class MessagesEndpoints:
    def __init__(self, intake: RequestIntake) -> None:
        self._intake = intake
        self._started_at = datetime.fromtimestamp(intake.wall_clock(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    async def create_message(self, http: Http) -> ASGIApp:
        inbound = await self._intake.read_request(http, partial(read_translated_chat, _ANTHROPIC))
        answer = await self._intake.answer(http, inbound)
        return await respond_in_dialect(answer, inbound, _ANTHROPIC)

    async def count_tokens(self, http: Http) -> Response:
        inbound = await self._intake.read_request(http, partial(read_translated_count, _ANTHROPIC))
        counted = await self._intake.count_tokens(http, inbound)
        return respond_json({"input_tokens": counted.tokens}, headers=counted.headers())

    async def list_models(self, http: Http) -> Response:
        """All on one page."""
        caller = self._intake.auth.authenticate(http.headers)
        targets = self._intake.pipeline.list_models(caller)
        rows = [self._row(AUTO, None), *(self._row(one.name, one) for one in targets)]
        return respond_json({"data": rows, "has_more": False, "first_id": rows[0]["id"], "last_id": rows[-1]["id"]})

    async def get_model(self, http: Http) -> Response:
        caller, name = self._intake.auth.authenticate(http.headers), http.path_params["name"]
        return respond_json(self._row(name, find_model(self._intake.pipeline, caller, name)))

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
