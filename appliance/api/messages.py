"""Anthropic's endpoints: messages, and the counting of their tokens. Models are listed beside OpenAI's."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request as Http
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.replies import json_response
from appliance.api.rim import Rim
from appliance.api.translated import translated
from appliance.core import Target
from appliance.tasks.anthropic.events import MessageWriter
from appliance.tasks.anthropic.read import read, read_count
from appliance.tasks.anthropic.reply import message_of


class Messages:
    def __init__(self, rim: Rim) -> None:
        self._rim = rim

    async def create(self, http: Http) -> ASGIApp:
        opened = await self._rim.open(http, read)
        original = opened.calls[0].original or {}
        answer = await self._rim.answer(http, opened)
        return await translated(
            answer,
            opened,
            whole=lambda payload: message_of(payload, original),
            writer=lambda: MessageWriter(original, opened.prompt_tokens),
        )

    async def count(self, http: Http) -> Response:
        opened = await self._rim.open(http, read_count)
        counted = await self._rim.count(http, opened)
        return json_response({"input_tokens": counted.tokens}, headers=counted.headers())


def models_page(targets: Sequence[Target], auto: str, started_at: int) -> Mapping[str, Any]:
    """`GET /v1/models` as Anthropic's API gives it, all on one page."""
    rows = [model_row(auto, None, started_at), *(model_row(one.name, one, started_at) for one in targets)]
    return {"data": rows, "has_more": False, "first_id": rows[0]["id"], "last_id": rows[-1]["id"]}


def model_row(name: str, target: Target | None, started_at: int) -> Mapping[str, Any]:
    created = datetime.fromtimestamp(started_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": created,
        "lifecycle": "active",
        "max_input_tokens": None if target is None else target.context_tokens,
        "max_tokens": None if target is None else target.context_tokens,
    }
