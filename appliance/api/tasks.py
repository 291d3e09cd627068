"""The task endpoints: decisions in both wire formats, in batches, and extraction."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request as Http
from starlette.responses import Response

from appliance.api.openai import whole
from appliance.api.parts import Many
from appliance.api.replies import json_response
from appliance.api.rim import Rim
from appliance.errors import ApplianceError
from appliance.tasks import decisions, extract, systemone

DECISION_CALLS_AT_ONCE = 4
"""Calls of a batch under way together; each holds thousands of tokens, so a few keep an engine busy."""
EXTRACT_CALLS_AT_ONCE = 16
"""Texts of one extract request under way together; what an engine cannot take yet waits in its turn."""


class Tasks:
    def __init__(self, rim: Rim) -> None:
        self._rim = rim

    async def decisions(self, http: Http) -> Response:
        opened = await self._rim.open(http, decisions.read)
        answer = await self._rim.answer(http, opened)
        return await whole(answer, answer.payload)

    async def systemone(self, http: Http) -> Response:
        opened = await self._rim.open(http, systemone.read)
        answer = await self._rim.answer(http, opened)
        return await whole(answer, answer.payload)

    async def batch(self, http: Http) -> Response:
        opened = await self._rim.open(http, decisions.read_batch)
        many = await self._rim.answer_many(http, opened, concurrency=DECISION_CALLS_AT_ONCE)
        return _rows(many, decisions.batch_payload(_some(many), opened.calls))

    async def extract(self, http: Http) -> Response:
        opened = await self._rim.open(http, extract.read)
        is_single = "texts" not in opened.request.body
        if is_single and len(opened.calls) == 1:
            answer = await self._rim.answer(http, opened)
            return await whole(answer, extract.payload([answer.payload], opened.calls))
        many = await self._rim.answer_many(http, opened, concurrency=EXTRACT_CALLS_AT_ONCE)
        results = _some(many)
        if not is_single:
            return _rows(many, extract.texts_payload(results, opened.calls))
        try:
            return _rows(many, extract.payload(results, opened.calls))
        except ApplianceError as error:
            error.headers = {**many.facts.headers(), **error.headers}
            raise


def _some(many: Many) -> Sequence[Any]:
    """The results, unless every call failed: then the request failed, and says so with its status."""
    failed = [result for result in many.results if isinstance(result, ApplianceError)]
    if failed and len(failed) == len(many.results):
        failed[0].headers = {**many.facts.headers(), **failed[0].headers}
        raise failed[0]
    return many.results


def _rows(many: Many, payload: Mapping[str, Any]) -> Response:
    return json_response(payload, headers=many.facts.headers())
