"""The task endpoints: decisions in both wire formats, in batches, their calibration, and extraction."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog
from starlette.requests import Request as Http
from starlette.responses import Response

from appliance.api.intake import Reader, RequestIntake
from appliance.api.json_responses import respond_json, respond_whole
from appliance.errors import ApplianceError
from appliance.router.protocols import PipelineBatchAnswer
from appliance.tasks.decisions import calibration, openai_shape, systemone
from appliance.tasks.decisions.decision_options import Priors
from appliance.tasks.decisions.openai_shape import DecisionsCall
from appliance.tasks.extract import extract_payload, extraction
from appliance.tasks.extract.extraction import ExtractCall, Extracted
from appliance.tasks.saved_tasks import Shape
from appliance.tasks.store import KnownTasks

DECISION_CALLS_AT_ONCE = 4
"""Calls of a batch under way together; each holds thousands of tokens, so a few keep an engine busy."""
EXTRACT_CALLS_AT_ONCE = 16
"""Texts of one extract request under way together; what an engine cannot take yet waits in its turn."""

_log = structlog.get_logger(__name__)


class TaskEndpoints:
    def __init__(self, intake: RequestIntake, known: KnownTasks) -> None:
        self._intake = intake
        self._known = known
        self._priors = Priors()

    async def create_decision(self, http: Http) -> Response:
        return await self._decide(http, openai_shape.read_decision_request, "decisions")

    async def create_systemone_decision(self, http: Http) -> Response:
        return await self._decide(http, systemone.read_systemone_request, "systemone")

    async def _decide(self, http: Http, read: Callable[..., Any], shape: Shape) -> Response:
        inbound = await self._intake.read_request(http, self._decision_reader(http, read, shape))
        answer = await self._intake.answer(http, inbound)
        return await respond_whole(answer)

    async def create_decision_batch(self, http: Http) -> Response:
        inbound = await self._intake.read_request(
            http, self._decision_reader(http, openai_shape.read_decision_batch, "decisions")
        )
        many = await self._intake.answer_many(http, inbound, concurrency=DECISION_CALLS_AT_ONCE)
        # In a thread: 10,000 inputs with 77 options make 44 MB of JSON, and streams go on.
        return await asyncio.to_thread(lambda: _rows(many, openai_shape.make_batch_payload(_some(many), inbound.calls)))

    async def calibrate_task(self, http: Http) -> Response:
        """Changes the answers of every caller that names the task, so it takes the scope admin."""
        caller = self._intake.auth.authenticate(http.headers, "admin")
        inbound = await self._intake.read_request(
            http, self._known.reading(calibration.read_calibration_request, "calibrate", caller, priors=self._priors)
        )
        many = await self._intake.answer_many(http, inbound, concurrency=DECISION_CALLS_AT_ONCE)
        learnt = await asyncio.to_thread(calibration.fit_task, inbound.request.body, inbound.calls, _some(many))
        await asyncio.to_thread(self._known.fits.put, learnt.fit)
        _log.info("task calibrated", task=learnt.fit.task, target=learnt.fit.target, key=caller.key_id)
        return _rows(many, learnt.report)

    async def extract_fields(self, http: Http) -> Response:
        caller = self._intake.auth.authenticate(http.headers)
        reader: Reader[ExtractCall] = self._known.reading(extraction.read_extract_request, "extract", caller)
        inbound = await self._intake.read_request(http, reader)
        is_single = "texts" not in inbound.request.body
        # In threads: looking for every value of a long text takes tens of milliseconds, and streams go on.
        if is_single and len(inbound.calls) == 1:
            answer = await self._intake.answer(http, inbound)
            try:
                assert isinstance(answer.result, Extracted)
                payload = await asyncio.to_thread(extract_payload.make_extract_payload, [answer.result], inbound.calls)
            except BaseException:
                await answer.aclose()
                raise
            return await respond_whole(answer, lambda _: payload)
        many = await self._intake.answer_many(http, inbound, concurrency=EXTRACT_CALLS_AT_ONCE)
        results = _some(many)
        if not is_single:
            return _rows(many, await asyncio.to_thread(extract_payload.make_texts_payload, results, inbound.calls))
        try:
            return _rows(many, await asyncio.to_thread(extract_payload.make_extract_payload, results, inbound.calls))
        except ApplianceError as error:
            error.headers = {**many.metadata.headers(), **error.headers}
            raise

    def _decision_reader(self, http: Http, read: Callable[..., Any], shape: Shape) -> Reader[DecisionsCall]:
        """A reader of decisions that knows the tasks saved and calibrated here."""
        caller = self._intake.auth.authenticate(http.headers)
        return self._known.reading(read, shape, caller, tasks=self._known.fits.tasks, priors=self._priors)


def _some(many: PipelineBatchAnswer) -> Sequence[Any]:
    """The results, unless every call failed: then the request failed, and says so with its status."""
    failed = [result for result in many.results if isinstance(result, ApplianceError)]
    if failed and len(failed) == len(many.results):
        failed[0].headers = {**many.metadata.headers(), **failed[0].headers}
        raise failed[0]
    return many.results


def _rows(many: PipelineBatchAnswer, payload: Mapping[str, Any]) -> Response:
    return respond_json(payload, headers=many.metadata.headers())
