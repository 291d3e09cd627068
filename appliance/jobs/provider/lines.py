"""Lines of jobs that leave in providers' own batches: made into requests as any line is, and read as any answer is."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol, cast

from appliance.core import Request, ResponseMetadata, Target, TaskCall
from appliance.errors import ApplianceError
from appliance.jobs.lines.executor import LineExecutor, make_answer, make_request_id, read_usage
from appliance.jobs.models import BatchLine, BatchTerms, LineAnswer
from appliance.jobs.provider.models import ProviderBatch, SealedLine
from appliance.router.provider_batches import PreparedLine, ProviderBatchSubmitter
from appliance.upstream.provider_batches import BatchResult, BatchStatus


class ProviderBatchPipeline(Protocol):
    @property
    def provider_batches(self) -> ProviderBatchSubmitter: ...

    async def prepare_batch_line(self, request: Request, call: TaskCall) -> PreparedLine | None: ...


class ProviderLines:
    """`pipeline` is asked for anew for each step: reloads replace it."""

    def __init__(self, lines: LineExecutor, pipeline: Callable[[], ProviderBatchPipeline]) -> None:
        self._lines, self._pipeline = lines, pipeline

    def takes(self, target: Target) -> bool:
        return self._pipeline().provider_batches.takes(target)

    async def made_ready(self, lines: Sequence[BatchLine], terms: BatchTerms) -> Sequence[SealedLine | None]:
        self._lines.find_caller(terms)
        return [await self._seal(line, terms) for line in lines]

    async def _seal(self, line: BatchLine, terms: BatchTerms) -> PreparedLine | None:
        await asyncio.sleep(0)  # a decision takes a fraction of a millisecond: others are not to wait for all
        try:
            request, call = await self._made(line, terms)
            return None if call is None else await self._pipeline().prepare_batch_line(request, call)
        except ApplianceError:
            return None  # asked the usual way it is told what is the matter

    async def reserve(self, sealed: SealedLine) -> str:
        return await self._pipeline().provider_batches.reserve(cast(PreparedLine, sealed))

    def release(self, ticket: str) -> None:
        self._pipeline().provider_batches.release(ticket)

    async def send(
        self, provider_batch: ProviderBatch, sealed: Sequence[SealedLine], note: Callable[[str], Awaitable[None]]
    ) -> str:
        return await self._pipeline().provider_batches.send(
            provider_batch.name, cast(Sequence[PreparedLine], sealed), note
        )

    async def find(self, provider_batch: ProviderBatch) -> str | None:
        batches = self._pipeline().provider_batches
        return await batches.find(batches.target(provider_batch.target), provider_batch.name)

    def finds(self, provider_batch: ProviderBatch) -> bool:
        batches = self._pipeline().provider_batches
        return batches.finds(batches.target(provider_batch.target))

    async def look(self, provider_batch: ProviderBatch) -> BatchStatus:
        batches = self._pipeline().provider_batches
        return await batches.look(
            batches.target(provider_batch.target), provider_batch.name, provider_batch.remote_id or ""
        )

    def rows(self, provider_batch: ProviderBatch, status: BatchStatus) -> AsyncIterator[BatchResult]:
        batches = self._pipeline().provider_batches
        return batches.rows(
            batches.target(provider_batch.target), provider_batch.name, provider_batch.remote_id or "", status
        )

    async def read(
        self, rows: Sequence[tuple[BatchLine, str, BatchResult]], terms: BatchTerms, provider_batch: ProviderBatch
    ) -> Sequence[LineAnswer | None]:
        return [await self._answer(line, ticket, row, terms, provider_batch) for line, ticket, row in rows]

    async def _answer(
        self, line: BatchLine, ticket: str, row: BatchResult, terms: BatchTerms, provider_batch: ProviderBatch
    ) -> LineAnswer | None:
        await asyncio.sleep(0)
        request, call = await self._made(line, terms)
        batches = self._pipeline().provider_batches
        if call is None:
            return None
        found = batches.read(
            request, call, batches.target(provider_batch.target), ticket, provider_batch.remote_id or "", row
        )
        if found.error is not None:
            return None
        payload = self._lines.line_endpoints[line.url].payload([found.payload], [call])
        name = make_request_id(line, terms)
        metadata = ResponseMetadata(
            name, found.decision_id, provider_batch.target, "hosted", "", "", "", found.cost_usd, True
        )
        return make_answer(payload, name, metadata, read_usage(payload), found.cost_usd)

    async def cancel(self, provider_batch: ProviderBatch) -> None:
        batches = self._pipeline().provider_batches
        await batches.cancel(batches.target(provider_batch.target), provider_batch.name, provider_batch.remote_id or "")

    async def forget(self, provider_batch: ProviderBatch, status: BatchStatus | None) -> None:
        batches = self._pipeline().provider_batches
        await batches.forget(
            batches.target(provider_batch.target),
            provider_batch.name,
            provider_batch.remote_id or "",
            provider_batch.uploaded,
            status,
        )

    async def _made(self, line: BatchLine, terms: BatchTerms) -> tuple[Request, TaskCall | None]:
        """The request, and its call where it is a single one."""
        caller = self._lines.find_caller(terms)
        asked, calls = await self._lines.read_calls(line, caller)
        request = self._lines.make_request(asked, make_request_id(line, terms), caller, terms)
        return request, calls[0] if len(calls) == 1 else None
