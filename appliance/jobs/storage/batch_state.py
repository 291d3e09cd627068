"""What one run has on disk, and how it says how it is going: one batch's state, saved and committed patiently."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final, TypeVar

import structlog

from appliance.errors import JobsUnavailable, StorageFull
from appliance.jobs.deps import JobDeps, RunState
from appliance.jobs.models import Batch, BatchLine, LineAnswer, Status
from appliance.jobs.storage.results import BatchResults

LOOK_SECONDS: Final = 1.0
"""How often deadline, disk and hours are looked at while nothing else happens."""
_COMMIT_LINES: Final = 256
_COMMIT_SECONDS: Final = 0.5
"""A commit costs two syncs of the disk; a crash costs what was not committed."""

Result = TypeVar("Result")

_log = structlog.stdlib.get_logger(__name__)


class BatchState:
    """Answers wait here until they are committed together. Code that changes the batch holds `lock`."""

    def __init__(self, batch: Batch, deps: JobDeps, committed: Callable[[Sequence[int]], None]) -> None:
        """`committed` is called with the numbers of lines that are done."""
        self._deps, self._committed = deps, committed
        self.results = BatchResults(batch, deps.folder, deps.store)
        self.lock = asyncio.Lock()
        self.run_state: RunState = "validating"
        self.reason = ""
        self._woken = asyncio.Event()
        self._answered: list[tuple[BatchLine, LineAnswer]] = []
        self._answered_since = 0.0

    @property
    def batch(self) -> Batch:
        return self.results.batch

    @property
    def uncommitted(self) -> int:
        return len(self._answered)

    @property
    def commit_due(self) -> float:
        """When the oldest answer wants to be committed; infinite where there is none."""
        return self._answered_since + _COMMIT_SECONDS if self._answered else float("inf")

    def add_answer(self, line: BatchLine, answer: LineAnswer) -> None:
        if not self._answered:
            self._answered_since = self._deps.clock()
        self._answered.append((line, answer))

    async def commit_if_due(self) -> None:
        if self._deps.clock() >= self.commit_due or len(self._answered) >= _COMMIT_LINES:
            await self.retry_storage(self.commit)

    async def commit(self) -> None:
        async with self.lock:
            answered = tuple(self._answered)
            if answered:
                await self.results.commit_answers(answered)
                del self._answered[: len(answered)]
                self._answered_since = self._deps.clock()
                self._committed([line.number for line, _ in answered])

    async def commit_answers(self, answered: Sequence[tuple[BatchLine, LineAnswer]]) -> None:
        """Commit these at once."""
        async with self.lock:
            await self.results.commit_answers(answered)

    async def retry_storage(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Do `work`, and do it again for as long as the disk is full or the store cannot be used."""
        while True:
            try:
                return await work()
            except (StorageFull, JobsUnavailable) as error:
                self._deps.alerts.warn("jobs_paused", f"batch {self.batch.id}: {error.message}", self.batch.id)
                self.set_run_state("paused", error.message)
                await self.wait_until_woken(LOOK_SECONDS)

    async def set_status(self, batch: Batch, status: Status) -> None:
        """To the next stage; where it was cancelled meanwhile it stays so, and only what was found out is kept."""
        async with self.lock:
            if status == "in_progress" and self.batch.status == "cancelling":
                await self.save(replace(batch, status="cancelling", times=self.batch.times))
            else:
                await self.save(self.with_status(batch, status))

    async def save(self, batch: Batch) -> None:
        """The lock is held."""
        await self._deps.store.save_batch(batch)
        self.results.batch = batch

    def with_status(self, batch: Batch, status: Status) -> Batch:
        return replace(batch, status=status, times={**batch.times, status: self._deps.wall_clock()})

    def set_run_state(self, state: RunState, reason: str) -> None:
        if (state, reason) != (self.run_state, self.reason):
            _log.info("batch", batch=self.batch.id, state=state, reason=reason)
        self.run_state, self.reason = state, reason

    def wake(self) -> None:
        self._woken.set()

    async def wait_until_woken(self, seconds: float) -> None:
        """Until something happens, and no longer than that."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, LOOK_SECONDS)):
                await self._woken.wait()
        self._woken.clear()
