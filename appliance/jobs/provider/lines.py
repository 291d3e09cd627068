"""Lines of jobs that leave in providers' own batches: made into requests as any line is, and read as any answer is."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from appliance.core import Request, ResponseMetadata, TaskCall
from appliance.errors import ApplianceError
from appliance.jobs.lines.answers import make_answer
from appliance.jobs.lines.requests import LineRequests, make_request_id
from appliance.jobs.models import BatchLine, BatchTerms, LineAnswer, ProviderBatch
from appliance.router.provider_batches import PreparedLine, ProviderBatchSubmitter
from appliance.upstream.batch_client import BatchResult
from appliance.wire.usage import read_payload_usage


class ProviderBatchPipeline(Protocol):
    @property
    def provider_batches(self) -> ProviderBatchSubmitter: ...

    async def prepare_batch_line(self, request: Request, call: TaskCall) -> PreparedLine | None: ...


class ProviderLines:
    """`pipeline` is called anew for each step: reloads replace it."""

    def __init__(self, requests: LineRequests, pipeline: Callable[[], ProviderBatchPipeline]) -> None:
        self._requests, self._pipeline = requests, pipeline

    @property
    def submitter(self) -> ProviderBatchSubmitter:
        """Of the pipeline in force: not kept for longer than a step."""
        return self._pipeline().provider_batches

    async def prepare_lines(self, lines: Sequence[BatchLine], terms: BatchTerms) -> Sequence[PreparedLine | None]:
        """Each line ready to be sent; None where it is to be asked the usual way. Raises Unauthorized."""
        self._requests.find_caller(terms)
        return [await self._prepare(line, terms) for line in lines]

    async def _prepare(self, line: BatchLine, terms: BatchTerms) -> PreparedLine | None:
        await asyncio.sleep(0)  # a decision takes a fraction of a millisecond: others are not to wait for all
        try:
            request, call = await self._make_request(line, terms)
            return None if call is None else await self._pipeline().prepare_batch_line(request, call)
        except ApplianceError:
            return None  # asked the usual way, its answer says what is the matter

    async def read_answers(
        self, rows: Sequence[tuple[BatchLine, str, BatchResult]], terms: BatchTerms, provider_batch: ProviderBatch
    ) -> Sequence[LineAnswer | None]:
        """For a line, its record and its row: the answer, settled and recorded; None: to be asked again."""
        return [await self._read_answer(line, record, row, terms, provider_batch) for line, record, row in rows]

    async def _read_answer(
        self, line: BatchLine, record: str, row: BatchResult, terms: BatchTerms, provider_batch: ProviderBatch
    ) -> LineAnswer | None:
        await asyncio.sleep(0)
        request, call = await self._make_request(line, terms)
        if call is None:
            return None
        found = self.submitter.read(request, call, record, provider_batch.remote_id or "", row)
        if found.error is not None:
            return None
        payload = self._requests.make_payload(line, [found.result], [call])
        name = make_request_id(line, terms)
        metadata = ResponseMetadata(
            name, found.decision_id, provider_batch.target, "hosted", "", "", "", found.cost_usd, True
        )
        return make_answer(payload, name, metadata, read_payload_usage(payload), found.cost_usd)

    async def _make_request(self, line: BatchLine, terms: BatchTerms) -> tuple[Request, TaskCall | None]:
        """The request, and its call where it is a single one."""
        caller = self._requests.find_caller(terms)
        parsed, calls = await self._requests.read_calls(line, caller)
        request = self._requests.make_request(parsed, make_request_id(line, terms), caller, terms)
        return request, calls[0] if len(calls) == 1 else None


def read_line_number(request_id: str) -> int | None:
    """The number of the line that a request was made from."""
    number = request_id.rpartition("-")[2]
    return int(number) if number.isdecimal() and len(number) < 10 else None
