"""Gemini's endpoints: `models/{model}:generateContent` and its relatives, and the list of models."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from starlette.requests import Request as Http
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.caller_dialect import GEMINI_ACTIONS
from appliance.api.dialect_response import respond_in_dialect
from appliance.api.intake import RequestIntake
from appliance.api.json_responses import respond_json
from appliance.api.model_list import AUTO, find_model
from appliance.core import Target
from appliance.errors import NotFound, RequestError
from appliance.tasks.chat import read_translated_chat, read_translated_count
from appliance.wire.gemini.inbound import read_gemini_chat, read_gemini_count
from appliance.wire.registry import INBOUND

_GEMINI: Final = INBOUND["generate_content"]
_PREFIX: Final = "models/"


class GeminiEndpoints:
    def __init__(self, intake: RequestIntake) -> None:
        self._intake = intake

    async def run_action(self, http: Http) -> ASGIApp:
        """`POST .../models/{model}:{action}`; a model's name may hold slashes and colons."""
        name, _, action = http.path_params["name"].rpartition(":")
        if f":{action}" not in GEMINI_ACTIONS or not name:
            raise NotFound(f"{http.url.path[:200]!r} does not exist here: it must end in {', '.join(GEMINI_ACTIONS)}")
        if action == "countTokens":
            return await self._count(http, name)
        return await self._generate(http, name, stream=action == "streamGenerateContent")

    async def list_models(self, http: Http) -> Response:
        caller = self._intake.auth.authenticate(http.headers)
        rows = [
            _model_row(AUTO, None),
            *(_model_row(one.name, one) for one in self._intake.pipeline.list_models(caller)),
        ]
        return respond_json({"models": rows})

    async def get_model(self, http: Http) -> Response:
        caller = self._intake.auth.authenticate(http.headers)
        name = http.path_params["name"]
        return respond_json(_model_row(name, find_model(self._intake.pipeline, caller, name)))

    async def _generate(self, http: Http, name: str, *, stream: bool) -> ASGIApp:
        alt = http.query_params.get("alt", "json")
        if alt not in ("json", "sse") or (alt == "sse" and not stream):
            raise RequestError(f"alt is {alt[:40]!r}: it must be json, or sse for a stream", param="alt")
        inbound = await self._intake.read_request(
            http,
            partial(
                read_translated_chat,
                replace(_GEMINI, read_chat=partial(read_gemini_chat, model=name, stream=stream)),
                # targets stream events, and a caller without alt=sse wants a list that grows
                forwards=alt == "sse" or not stream,
            ),
        )
        answer = await self._intake.answer(http, inbound)
        content_type = None if alt == "sse" else "application/json; charset=utf-8"
        return await respond_in_dialect(answer, inbound, _GEMINI, as_events=alt == "sse", content_type=content_type)

    async def _count(self, http: Http, name: str) -> Response:
        inbound = await self._intake.read_request(
            http, partial(read_translated_count, replace(_GEMINI, read_count=partial(read_gemini_count, model=name)))
        )
        counted = await self._intake.count_tokens(http, inbound)
        return respond_json({"totalTokens": counted.tokens}, headers=counted.headers())


def _model_row(name: str, target: Target | None) -> Mapping[str, Any]:
    row: dict[str, Any] = {
        "name": _PREFIX + name,
        "baseModelId": name,
        "version": "1",
        "displayName": name,
        "supportedGenerationMethods": _methods(target),
    }
    if target is not None and target.context_tokens is not None:
        row |= {"inputTokenLimit": target.context_tokens, "outputTokenLimit": target.context_tokens}
    return row


def _methods(target: Target | None) -> Sequence[str]:
    can_chat = target is None or "chat" in target.abilities
    return [action.removeprefix(":") for action in GEMINI_ACTIONS] if can_chat else []
