"""Answers lines of jobs by the normal pipeline, on behalf of the key that made the batch."""

import hashlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

import orjson

from appliance.core import Caller, Request, ResponseMetadata
from appliance.errors import ApplianceError
from appliance.jobs.lines.answers import make_answer, make_refusal
from appliance.jobs.lines.decision_groups import DecisionGroups
from appliance.jobs.lines.requests import DECISIONS, LineRequests, make_request_id
from appliance.jobs.models import BatchLine, BatchTerms, LineAnswer
from appliance.router.protocols import RequestPipeline
from appliance.wire.usage import read_payload_usage

_CALLS_AT_ONCE: Final = 16
"""Of one line: a long document is extracted from piece by piece."""


class LineExecutor:
    """`pipeline` is called anew for each line: reloads replace it."""

    def __init__(self, requests: LineRequests, pipeline: Callable[[], RequestPipeline]) -> None:
        self.requests, self._pipeline = requests, pipeline
        self._groups = DecisionGroups(requests, pipeline, self._execute_one)

    @property
    def endpoints(self) -> Sequence[str]:
        return tuple(self.requests.endpoints)

    def group_key(self, line: BatchLine) -> Hashable | None:
        """Decisions that ask the same of different texts: an engine computes the question once for all of them."""
        if line.url != DECISIONS or not isinstance(line.body.get("input"), str):
            return None
        rest = {name: value for name, value in line.body.items() if name != "input"}
        return hashlib.blake2b(orjson.dumps(rest, option=orjson.OPT_SORT_KEYS), digest_size=16).digest()

    async def execute(self, lines: Sequence[BatchLine], terms: BatchTerms) -> Sequence[LineAnswer]:
        """One answer for each line, in order. Raises Unauthorized where the key is no more."""
        caller = self.requests.find_caller(terms)
        if len(lines) == 1:
            return [await self._execute_one(lines[0], caller, terms)]
        return await self._groups.execute(lines, caller, terms)

    async def _execute_one(self, line: BatchLine, caller: Caller, terms: BatchTerms) -> LineAnswer:
        name = make_request_id(line, terms)
        try:
            parsed, calls = await self.requests.read_calls(line, caller)
            request = self.requests.make_request(parsed, name, caller, terms)
            results, metadata = await self._answer_calls(request, calls)
            payload = self.requests.make_payload(line, results, calls)
        except ApplianceError as error:
            return make_refusal(error, name)
        return make_answer(payload, name, metadata, read_payload_usage(payload), metadata.cost_usd)

    async def _answer_calls(self, request: Request, calls: Sequence[Any]) -> tuple[Sequence[Any], ResponseMetadata]:
        """What every call came to. Raises the first error where none succeeded."""
        if len(calls) == 1:
            answer = await self._pipeline().answer(request, calls[0])
            try:
                return [answer.result], answer.metadata
            finally:
                await answer.aclose()
        many = await self._pipeline().answer_many(request, calls, concurrency=_CALLS_AT_ONCE)
        failed = [result for result in many.results if isinstance(result, ApplianceError)]
        if len(failed) == len(many.results):
            failed[0].headers = many.metadata.headers()
            raise failed[0]
        return many.results, many.metadata
