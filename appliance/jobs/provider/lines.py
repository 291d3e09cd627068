"""Lines of jobs that leave in providers' own batches: made into requests as any line is, and read as any answer is."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol, cast

from appliance.core import Call, Facts, Request, Target
from appliance.errors import ApplianceError
from appliance.jobs.lines.executor import Lines, good_answer, request_id_of, usage_of
from appliance.jobs.models import Line, LineAnswer, Terms
from appliance.jobs.provider.models import Parcel
from appliance.jobs.provider.models import Sealed as SealedLine
from appliance.router.provider_batches import Bulk, Sealed
from appliance.upstream.provider_batches import Row, Standing


class BulkPipeline(Protocol):
    @property
    def bulk(self) -> Bulk: ...

    async def sealed(self, request: Request, call: Call) -> Sealed | None: ...


class BulkLines:
    """`pipeline` is asked for anew for each step: reloads replace it."""

    def __init__(self, lines: Lines, pipeline: Callable[[], BulkPipeline]) -> None:
        self._lines, self._pipeline = lines, pipeline

    def takes(self, target: Target) -> bool:
        return self._pipeline().bulk.takes(target)

    async def made_ready(self, lines: Sequence[Line], terms: Terms) -> Sequence[SealedLine | None]:
        self._lines.caller(terms)
        return [await self._seal(line, terms) for line in lines]

    async def _seal(self, line: Line, terms: Terms) -> Sealed | None:
        await asyncio.sleep(0)  # a decision takes a fraction of a millisecond: others are not to wait for all
        try:
            request, call = await self._made(line, terms)
            return None if call is None else await self._pipeline().sealed(request, call)
        except ApplianceError:
            return None  # asked the usual way it is told what is the matter

    async def reserve(self, sealed: SealedLine) -> str:
        return await self._pipeline().bulk.reserve(cast(Sealed, sealed))

    def release(self, ticket: str) -> None:
        self._pipeline().bulk.release(ticket)

    async def send(self, parcel: Parcel, sealed: Sequence[SealedLine], note: Callable[[str], Awaitable[None]]) -> str:
        return await self._pipeline().bulk.send(parcel.name, cast(Sequence[Sealed], sealed), note)

    async def find(self, parcel: Parcel) -> str | None:
        bulk = self._pipeline().bulk
        return await bulk.find(bulk.target(parcel.target), parcel.name)

    def finds(self, parcel: Parcel) -> bool:
        bulk = self._pipeline().bulk
        return bulk.finds(bulk.target(parcel.target))

    async def look(self, parcel: Parcel) -> Standing:
        bulk = self._pipeline().bulk
        return await bulk.look(bulk.target(parcel.target), parcel.name, parcel.remote_id or "")

    def rows(self, parcel: Parcel, standing: Standing) -> AsyncIterator[Row]:
        bulk = self._pipeline().bulk
        return bulk.rows(bulk.target(parcel.target), parcel.name, parcel.remote_id or "", standing)

    async def read(
        self, rows: Sequence[tuple[Line, str, Row]], terms: Terms, parcel: Parcel
    ) -> Sequence[LineAnswer | None]:
        return [await self._answer(line, ticket, row, terms, parcel) for line, ticket, row in rows]

    async def _answer(self, line: Line, ticket: str, row: Row, terms: Terms, parcel: Parcel) -> LineAnswer | None:
        await asyncio.sleep(0)
        request, call = await self._made(line, terms)
        bulk = self._pipeline().bulk
        if call is None:
            return None
        found = bulk.read(request, call, bulk.target(parcel.target), ticket, parcel.remote_id or "", row)
        if found.error is not None:
            return None
        payload = self._lines.readings[line.url].payload([found.payload], [call])
        name = request_id_of(line, terms)
        facts = Facts(name, found.decision_id, parcel.target, "hosted", "", "", "", found.cost_usd, True)
        return good_answer(payload, name, facts, usage_of(payload), found.cost_usd)

    async def cancel(self, parcel: Parcel) -> None:
        bulk = self._pipeline().bulk
        await bulk.cancel(bulk.target(parcel.target), parcel.name, parcel.remote_id or "")

    async def forget(self, parcel: Parcel, standing: Standing | None) -> None:
        bulk = self._pipeline().bulk
        await bulk.forget(bulk.target(parcel.target), parcel.name, parcel.remote_id or "", parcel.uploaded, standing)

    async def _made(self, line: Line, terms: Terms) -> tuple[Request, Call | None]:
        """The request, and its call where it is a single one."""
        caller = self._lines.caller(terms)
        asked, calls = await self._lines.read(line, caller)
        request = self._lines.request(asked, request_id_of(line, terms), caller, terms)
        return request, calls[0] if len(calls) == 1 else None
