"""One batch, from validating to its end. Read `run` first.

Its state is what the store has: a run that is cut off at any moment begins again from there and asks what still waits.
"""

import asyncio
import contextlib
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Final

import structlog

from appliance.errors import StorageFull, Unauthorized
from appliance.jobs.deps import JobDeps, JobProgress, JobStopped
from appliance.jobs.dispatcher import Dispatcher
from appliance.jobs.finalize import end_batch_early, finalize_batch, publish_results
from appliance.jobs.lines.queue import LineQueue
from appliance.jobs.lines.validation import UnusableInput, describe_problem, validate_batch
from appliance.jobs.models import Batch, BatchLine, Ending
from appliance.jobs.planner import is_within_hours
from appliance.jobs.provider.runner import GATHERING_SECONDS, ProviderBatchRunner
from appliance.jobs.storage.batch_state import LOOK_SECONDS, BatchState

_DISK_SECONDS: Final = 5.0

_log = structlog.stdlib.get_logger(__name__)


class BatchRun:
    """`run` it once. `stop` ends it early, `wake` makes it look around at once.

    Its parts: `batch_state` (what is on disk), `queue` (what is to be asked), `dispatcher` (calls), `provider` (what
    leaves in providers' batches).
    """

    def __init__(self, batch: Batch, deps: JobDeps) -> None:
        self._deps = deps
        self._queue = LineQueue(deps)
        self._batch_state = BatchState(batch, deps, self._queue.mark_done)
        self._dispatcher = Dispatcher(deps, self._batch_state, self._queue)
        self._provider = ProviderBatchRunner(deps, self._batch_state, self._queue, self._dispatcher.make_terms)
        self._stopped: JobStopped | None = None
        self._disk_looked = float("-inf")

    @property
    def batch(self) -> Batch:
        return self._batch_state.batch

    @property
    def progress(self) -> JobProgress:
        batch_state, dispatcher, at_providers = self._batch_state, self._dispatcher, self._provider.lines
        rate = dispatcher.lines_per_second
        # A provider does not say when it will be done.
        seconds = None if at_providers or rate is None or rate <= 0 else self.batch.counts.left / rate
        return JobProgress(
            batch_state.run_state,
            batch_state.reason,
            rate,
            seconds,
            dispatcher.forecast.late_lines,
            dispatcher.lines_in_flight,
            at_providers,
        )

    def wake(self) -> None:
        self._batch_state.wake()
        self._provider.wake()

    async def stop(self, ending: Ending, code: str, message: str) -> None:
        """Ask for its end; `cancelling` is on disk when this returns."""
        async with self._batch_state.lock:
            if self.batch.status in ("validating", "in_progress"):
                await self._batch_state.save(self._batch_state.with_status(self.batch, "cancelling"))
                self._stopped = self._stopped or JobStopped(ending, code, message)
        self.wake()

    async def run(self) -> None:
        """To the end of the batch. Cancelled, it leaves everything so that the next run goes on."""
        try:
            if self.batch.status == "validating":
                await self._validate()
            if self.batch.status == "in_progress":
                await self._answer_all()
            if self.batch.status == "cancelling":
                await self._provider.resume()
                await self._end_early(
                    JobStopped("cancelled", "batch_cancelled", "the batch was cancelled before this line")
                )
            if self.batch.status == "finalizing":
                await self._batch_state.retry_storage(partial(publish_results, self._batch_state, self._deps))
        finally:
            await self._dispatcher.stop()
            await self._provider.stop()
            with contextlib.suppress(Exception):
                await self._batch_state.commit()
            self._batch_state.results.close()
            self._deps.alerts.clear("jobs_paused", self.batch.id)
            self._dispatcher.release_slots()

    # Stages.

    async def _validate(self) -> None:
        batch_state = self._batch_state
        try:
            found = await batch_state.retry_storage(self._validated)
        except UnusableInput as error:
            problems = (error.problem, *self.batch.problems)
            _log.warning("batch cannot be worked with", batch=self.batch.id, reason=describe_problem(problems))
            await finalize_batch(batch_state, replace(self.batch, problems=problems), "failed")
            return
        if found.counts.left:
            await batch_state.retry_storage(partial(batch_state.set_status, found, "in_progress"))
        else:
            await finalize_batch(batch_state, found, "failed")

    async def _validated(self) -> Batch:
        deps, config, results = self._deps, self._deps.config, self._batch_state.results
        async with deps.validation_slots:
            results.reset()
            return await validate_batch(
                self.batch,
                results,
                deps.folder,
                deps.store,
                max_lines=config.max_lines,
                max_line_bytes=config.max_line_bytes,
            )

    async def _answer_all(self) -> None:
        batch_state = self._batch_state
        self._dispatcher.restart_pace()
        duplicates = await batch_state.retry_storage(partial(self._deps.store.has_duplicates, self.batch.id))
        try:
            await self._provider.resume()
            while True:
                await self._allowed()
                self._dispatcher.update_forecast(self._provider.lines)
                group = await self._queue.next_group(batch_state, self._select_lines)
                if group:
                    await self._ask_when_free(group)
                elif group is None or await self._waits():
                    pass
                elif not (duplicates and await batch_state.retry_storage(batch_state.results.copy_duplicates)):
                    self._check_end()  # a last call may have found that the key is no more
                    if not self.batch.counts.left:
                        break
                    await batch_state.wait_until_woken(0.05)  # what came back meanwhile is fetched
                await batch_state.commit_if_due()
        except JobStopped as stopped:
            await self._dispatcher.stop()
            await batch_state.retry_storage(batch_state.commit)
            await self._end_early(stopped)
            return
        await finalize_batch(batch_state, self.batch, "completed")

    async def _end_early(self, stopped: JobStopped) -> None:
        self._batch_state.set_run_state("ending", stopped.message)
        await self._provider.withdraw()
        await end_batch_early(self._batch_state, self._deps, stopped)

    # Asking.

    async def _waits(self) -> bool:
        """Where no line is ready: whether some are on their way, or to be asked again or committed. Waits a moment."""
        batch_state = self._batch_state
        self._provider.send_gathered()
        if self._dispatcher.is_busy or self._queue.has_retries or self._provider.is_busy:
            due = min(self._queue.next_retry_at, batch_state.commit_due) - self._deps.clock()
            await batch_state.wait_until_woken(max(0.01, due))
            return True
        if batch_state.uncommitted:
            await batch_state.retry_storage(batch_state.commit)
            return True
        return False

    async def _select_lines(self, lines: list[BatchLine]) -> list[BatchLine]:
        return await self._provider.select_lines(lines, self._dispatcher.late_lines)

    async def _ask_when_free(self, group: list[BatchLine]) -> None:
        # What a provider still has the time to do in a batch does not leave singly, for more.
        while not self._dispatcher.try_dispatch(group, may_leave=not self._provider.has_time()):
            await self._batch_state.wait_until_woken(LOOK_SECONDS)
            await self._batch_state.commit_if_due()
            await self._allowed()
            self._provider.send_gathered(GATHERING_SECONDS)
            self._dispatcher.update_forecast(self._provider.lines)
            if self._provider.would_take(self._queue.ready_lines(group), self._dispatcher.late_lines):
                self._queue.refetch_group(group)
                return

    async def _allowed(self) -> None:
        """Wait while the disk is nearly full or it is not the time for jobs. Raises JobStopped."""
        while True:
            self._check_end()
            reason = await self._pause_reason()
            if reason is None:
                if self._batch_state.run_state != "running":
                    self._deps.alerts.clear("jobs_paused", self.batch.id)
                    self._batch_state.set_run_state("running", "")
                    self._dispatcher.restart_pace()
                return
            self._batch_state.set_run_state("paused", reason)
            await self._batch_state.wait_until_woken(LOOK_SECONDS)
            await self._batch_state.commit_if_due()

    async def _pause_reason(self) -> str | None:
        if not is_within_hours(self._deps.config.hours, datetime.fromtimestamp(self._deps.wall_clock())):
            return f"jobs run at {', '.join(self._deps.config.hours)} here (jobs.hours)"
        now = self._deps.clock()
        if self._batch_state.run_state == "paused" or now - self._disk_looked >= _DISK_SECONDS:
            self._disk_looked = now
            try:
                await asyncio.to_thread(self._deps.folder.check_space)
            except StorageFull as error:
                self._deps.alerts.warn("jobs_paused", f"batch {self.batch.id}: {error.message}", self.batch.id)
                return error.message
        return None

    def _check_end(self) -> None:
        stopped = self._stopped or self._dispatcher.stopped
        if stopped is not None:
            raise stopped
        error = self._provider.error
        if isinstance(error, Unauthorized):
            raise JobStopped("failed", error.code, error.message)
        if error is not None:
            raise error
        if self._deps.wall_clock() >= self.batch.expires_at:
            text = f"the batch was not done within its completion window of {self.batch.completion_window}"
            raise JobStopped("expired", "batch_expired", text)
