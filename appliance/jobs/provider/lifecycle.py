"""One provider's batch from its reservation to its end. Read `follow` first.

It is on disk before it is sent, under a name that stands in the provider's metadata: after a crash it is looked for
there, and adopted, before any of its lines is asked again. Whatever a provider does not answer waits again.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

import structlog

from appliance.errors import (
    ApplianceError,
    BackendAuth,
    BackendRefused,
    BackendUnreachable,
    RequestError,
    ResidencyRefused,
    Unauthorized,
    Unavailable,
)
from appliance.jobs.deps import JobDeps
from appliance.jobs.lines.queue import LineQueue
from appliance.jobs.models import BatchLine, BatchTerms, LineAnswer, ProviderBatch
from appliance.jobs.provider.lines import ProviderLines, read_line_number
from appliance.jobs.storage.batch_state import BatchState
from appliance.router.provider_batches import PreparedLine, ProviderConnection
from appliance.upstream.batch_client import BatchResult, BatchStatus

SPARE_SHARE: Final = 0.1
"""Of the time a provider may take: what is left for asking singly whatever it did not answer."""
_RESERVED_AT_ONCE: Final = 64
_READ_AT_ONCE: Final = 64
_FIRST_LOOK_SECONDS: Final = 5.0
_LAST_LOOK_SECONDS: Final = 120.0
_WITHDRAWING_SECONDS: Final = 900.0
"""How long a provider may take to cancel: OpenAI says up to ten minutes."""
_REFUSED_SECONDS: Final = 60.0
"""After a batch could not be sent none is tried for so long."""

Result = TypeVar("Result")

_log = structlog.stdlib.get_logger(__name__)


class _ProviderLost(Exception):
    """The provider does not know the batch, or could not be reached until the end."""


class ProviderBatchLifecycle:
    """Of all provider batches of one run."""

    def __init__(
        self, deps: JobDeps, batch_state: BatchState, queue: LineQueue, make_terms: Callable[[bool], BatchTerms]
    ) -> None:
        self._deps, self._batch_state, self._queue, self._make_terms = deps, batch_state, queue, make_terms
        self._woken = asyncio.Event()
        self.asked_singly: set[int] = set()
        """Lines that came back once: they are asked the usual way."""
        self.is_withdrawing = False
        self.paused_until = float("-inf")
        """Until when none is sent, because a provider refused one."""
        self.lines = 0
        """On their way, or gathered for one."""
        self.error: Exception | None = None
        """Why its lines cannot come back; the run is to end with it."""

    def wake(self) -> None:
        self._woken.set()

    async def begin(self, provider_batch: ProviderBatch, prepared: Mapping[int, PreparedLine]) -> None:
        """Money first, then the intent on disk, then the provider."""
        records = dict[int, str]()
        try:
            await self._reserve(prepared, records)
            if records and not self.is_withdrawing:
                await self._batch_state.retry_storage(
                    partial(self._deps.store.add_provider_batch, provider_batch, records)
                )
        except BaseException:
            self._release(records)
            raise
        if self.is_withdrawing:
            self._release(records)
            return
        self._return_lines([number for number in prepared if number not in records])
        if records:
            self._queue.mark_done(records)
            await self._send(provider_batch, [line for number, line in prepared.items() if number in records])

    async def _send(self, provider_batch: ProviderBatch, prepared: Sequence[PreparedLine]) -> None:
        name, target = provider_batch.name, provider_batch.target
        _log.info("lines leave in a provider's batch", provider_batch=name, target=target, lines=len(prepared))

        async def note_upload(uploaded: str) -> None:
            nonlocal provider_batch
            provider_batch = await self._save(replace(provider_batch, uploaded=uploaded))

        try:
            remote_id = await self._provider_lines.submitter.send(name, prepared, note_upload)
            provider_batch = await self._save(replace(provider_batch, remote_id=remote_id))
        except ApplianceError as error:
            self.paused_until = self._deps.clock() + _REFUSED_SECONDS
            self._batch_state.reason = f"a provider's batch was not made: {error.message}"
            _log.warning("a provider's batch was not made", provider_batch=name, reason=error.message)
            if _was_not_made(error):
                await self._delete_remote(provider_batch, None)
                await self._end(provider_batch, bills_nothing=True)
                return
        await self.follow(provider_batch)

    async def follow(self, provider_batch: ProviderBatch, *, is_resumed: bool = False) -> None:
        """From wherever it stands to its end. `is_resumed`: a restart may have kept it from being sent."""
        if provider_batch.remote_id is None:
            try:
                remote_id, can_tell = await self._retry_provider(partial(self._find, provider_batch))
            except _ProviderLost:
                remote_id, can_tell = None, False
            if remote_id is None:
                await self._end(provider_batch, bills_nothing=can_tell, singly=not (is_resumed and can_tell))
                return
            provider_batch = await self._save(replace(provider_batch, remote_id=remote_id))
        if not await self._batch_state.retry_storage(partial(self._deps.store.count_unanswered, provider_batch)):
            await self._delete_remote(provider_batch, await self._try_look(provider_batch))
            await self._end(provider_batch, bills_nothing=True)
            return
        status = await self._watch(provider_batch)
        is_read = False
        if status is not None:
            with contextlib.suppress(_ProviderLost):
                await self._retry_provider(partial(self._collect, provider_batch, status))
                is_read = True
        if is_read:
            await self._delete_remote(provider_batch, status)
        await self._end(provider_batch, bills_nothing=is_read and self.error is None)

    async def _find(self, provider_batch: ProviderBatch) -> tuple[str | None, bool]:
        """The provider's id of it, and whether None means that there is none."""
        connection = self._connect(provider_batch)
        return await connection.api.find(connection.client, provider_batch.name), connection.api.finds

    def _connect(self, provider_batch: ProviderBatch) -> ProviderConnection:
        return self._provider_lines.submitter.connect(provider_batch.target, provider_batch.name)

    async def _save(self, provider_batch: ProviderBatch) -> ProviderBatch:
        await self._batch_state.retry_storage(partial(self._deps.store.save_provider_batch, provider_batch))
        return provider_batch

    async def _delete_remote(self, provider_batch: ProviderBatch, status: BatchStatus | None) -> None:
        """Have what the provider keeps of it deleted, where that works."""
        batch_id, uploaded = provider_batch.remote_id, provider_batch.uploaded
        if batch_id is None and uploaded is None:
            return
        with contextlib.suppress(ApplianceError):
            connection = self._connect(provider_batch)
            await connection.api.forget(connection.client, batch_id or "", uploaded, status)

    async def _look(self, provider_batch: ProviderBatch) -> BatchStatus:
        connection = self._connect(provider_batch)
        return await connection.api.look(connection.client, provider_batch.remote_id or "")

    async def _try_look(self, provider_batch: ProviderBatch) -> BatchStatus | None:
        try:
            return await self._look(provider_batch)
        except ApplianceError:
            return None

    async def _watch(self, provider_batch: ProviderBatch) -> BatchStatus | None:
        """Its status when it was over; None where the provider did not say so in time."""
        pause, cancelled_at = _FIRST_LOOK_SECONDS, None
        give_up_at = self._batch_state.batch.expires_at - SPARE_SHARE * self._deps.config.provider_batch_seconds
        while True:
            now = self._deps.wall_clock()
            try:
                status = await self._look(provider_batch)
                if status.is_over:
                    if status.said:
                        self._batch_state.reason = f"{provider_batch.target}: {status.said}"
                    return status
                if cancelled_at is None and (self.is_withdrawing or now >= give_up_at):
                    await self._cancel(provider_batch)
                    cancelled_at, pause = now, _FIRST_LOOK_SECONDS
            except BackendRefused as error:
                _log.warning(
                    "a provider does not know its batch", provider_batch=provider_batch.name, reason=error.message
                )
                return None
            except ApplianceError as error:  # it is looked at again
                _log.info("a provider's batch cannot be seen", provider_batch=provider_batch.name, reason=error.message)
            since = cancelled_at if cancelled_at is not None else (now if self.is_withdrawing else give_up_at)
            if now >= since + _WITHDRAWING_SECONDS:
                return None
            await self._wait_until_woken(pause)
            pause = min(_LAST_LOOK_SECONDS, pause * 1.5)

    async def _cancel(self, provider_batch: ProviderBatch) -> None:
        connection = self._connect(provider_batch)
        await connection.api.cancel(connection.client, provider_batch.remote_id or "")

    async def _collect(self, provider_batch: ProviderBatch, status: BatchStatus) -> None:
        """Its rows as answers. Those that were committed before a crash are passed over."""
        rows: dict[int, BatchResult] = {}
        connection = self._connect(provider_batch)
        async for row in connection.api.rows(connection.client, provider_batch.remote_id or "", status):
            number = read_line_number(row.request_id)
            if number is not None and row.status == 200:
                rows[number] = row
            if len(rows) >= _READ_AT_ONCE:
                await self._take_rows(provider_batch, rows)
                rows = {}
        await self._take_rows(provider_batch, rows)

    async def _take_rows(self, provider_batch: ProviderBatch, rows: Mapping[int, BatchResult]) -> None:
        if not rows:
            return
        store = self._deps.store
        known = await self._batch_state.retry_storage(partial(store.list_line_records, provider_batch, tuple(rows)))
        lines = await self._batch_state.results.read_lines([position for position, _ in known])
        asked = [(line, record, rows[line.number]) for line, (_, record) in zip(lines, known, strict=True)]
        try:
            answers = await self._provider_lines.read_answers(asked, self._make_terms(False), provider_batch)
        except Unauthorized as error:  # nobody is there any more to give them to
            self.error = error
            return
        good: list[tuple[BatchLine, LineAnswer]] = [
            (line, answer) for (line, _, _), answer in zip(asked, answers, strict=True) if answer is not None
        ]
        if good:
            await self._batch_state.retry_storage(partial(self._batch_state.commit_answers, good))
            self.lines -= len(good)
            self._batch_state.wake()

    async def _end(self, provider_batch: ProviderBatch, *, bills_nothing: bool, singly: bool = True) -> None:
        """What is left of it waits again, to be asked singly or not. What may have been billed stays reserved."""
        end = partial(self._deps.store.end_provider_batch, provider_batch)
        records = await self._batch_state.retry_storage(end)
        if bills_nothing:
            self._release(records)  # of a line that was settled by its row this changes nothing
        self._return_lines(list(records), singly=singly)
        _log.info("a provider's batch ended", provider_batch=provider_batch.name, back=len(records))

    def _release(self, records: Mapping[int, str]) -> None:
        for record in records.values():
            self._provider_lines.submitter.release(record)

    def _return_lines(self, numbers: Sequence[int], *, singly: bool = True) -> None:
        self.lines -= len(numbers)
        if singly:
            self.asked_singly.update(numbers)
        self._queue.requeue(numbers)
        self._batch_state.wake()

    async def _reserve(self, prepared: Mapping[int, PreparedLine], records: dict[int, str]) -> None:
        """Add the records of those lines that there is money for."""
        numbers, submitter = list(prepared), self._provider_lines.submitter
        for at in range(0, len(numbers), _RESERVED_AT_ONCE):
            part = numbers[at : at + _RESERVED_AT_ONCE]
            work = (submitter.reserve(prepared[number]) for number in part)
            found = await asyncio.gather(*work, return_exceptions=True)
            records |= {number: one for number, one in zip(part, found, strict=True) if isinstance(one, str)}
            failed = [one for one in found if isinstance(one, BaseException)]
            for error in failed:
                if not isinstance(error, ApplianceError):
                    raise error
                self._batch_state.reason = error.message
            if failed:  # the budget is spent: what is not reserved waits
                break

    async def _retry_provider(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Do it, however long the provider cannot be reached. Raises _ProviderLost where that lasts to the end."""
        pause = _FIRST_LOOK_SECONDS
        while True:
            try:
                return await work()
            except ApplianceError as error:
                _log.info("a provider's batch cannot be seen", reason=error.message)
                is_over = self._deps.wall_clock() >= self._batch_state.batch.expires_at or self.is_withdrawing
                if is_over or isinstance(error, BackendRefused):  # it knows nothing of it, or not any more
                    raise _ProviderLost from error
            await self._wait_until_woken(pause)
            pause = min(_LAST_LOOK_SECONDS, pause * 1.5)

    async def _wait_until_woken(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        self._woken.clear()

    @property
    def _provider_lines(self) -> ProviderLines:
        assert self._deps.provider_lines is not None
        return self._deps.provider_lines


def _was_not_made(error: ApplianceError) -> bool:
    """Whether the provider surely did not take the batch; where that is not sure, it is asked."""
    if isinstance(error, BackendUnreachable):
        return not error.may_have_cost
    return isinstance(error, BackendRefused | BackendAuth | RequestError | ResidencyRefused | Unavailable)
