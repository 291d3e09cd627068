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
from appliance.jobs.finalize import end_early, finalize, publish
from appliance.jobs.lines.queue import LineQueue
from appliance.jobs.lines.validation import UnusableLine, told, validate
from appliance.jobs.models import Batch, BatchLine, Ending
from appliance.jobs.planner import is_open
from appliance.jobs.provider.provider_batch import GATHERING_SECONDS, ProviderBatchRunner
from appliance.jobs.storage.batch_state import LOOK_SECONDS, BatchState

_DISK_SECONDS: Final = 5.0

_log = structlog.stdlib.get_logger(__name__)


class BatchRun:
    """`run` it once. `stop` ends it early, `nudge` makes it look around at once.

    Its parts: `keeper` (what is on disk), `queue` (what is to be asked), `asker` (calls), `upstream` (what leaves in
    providers' batches).
    """

    def __init__(self, batch: Batch, means: JobDeps) -> None:
        self._means = means
        self._queue = LineQueue(means)
        self._keeper = BatchState(batch, means, self._queue.done)
        self._asker = Dispatcher(means, self._keeper, self._queue)
        self._upstream = ProviderBatchRunner(means, self._keeper, self._queue, self._asker.terms)
        self._stopped: JobStopped | None = None
        self._disk_looked = float("-inf")

    @property
    def batch(self) -> Batch:
        return self._keeper.batch

    @property
    def progress(self) -> JobProgress:
        keeper, asker, posted = self._keeper, self._asker, self._upstream.lines
        rate = asker.per_second
        # A provider does not tell when it will be done.
        seconds = None if posted or rate is None or rate <= 0 else self.batch.counts.left / rate
        return JobProgress(
            keeper.state, keeper.reason, rate, seconds, asker.forecast.late, asker.lines_under_way, posted
        )

    def nudge(self) -> None:
        self._keeper.nudge()
        self._upstream.nudge()

    async def stop(self, ending: Ending, code: str, message: str) -> None:
        """Ask for its end; `cancelling` is on disk when this returns."""
        async with self._keeper.lock:
            if self.batch.status in ("validating", "in_progress"):
                await self._keeper.save(self._keeper.in_status(self.batch, "cancelling"))
                self._stopped = self._stopped or JobStopped(ending, code, message)
        self.nudge()

    async def run(self) -> None:
        """To the end of the batch. Cancelled, it leaves everything so that the next run goes on."""
        try:
            if self.batch.status == "validating":
                await self._validate()
            if self.batch.status == "in_progress":
                await self._answer_all()
            if self.batch.status == "cancelling":
                await self._upstream.resume()
                await self._end_early(
                    JobStopped("cancelled", "batch_cancelled", "the batch was cancelled before this line")
                )
            if self.batch.status == "finalizing":
                await self._keeper.patiently(partial(publish, self._keeper, self._means))
        finally:
            await self._asker.stop()
            await self._upstream.stop()
            with contextlib.suppress(Exception):
                await self._keeper.commit()
            self._keeper.results.close()
            self._means.alerts.clear("jobs_paused", self.batch.id)
            self._asker.part()

    # Stages.

    async def _validate(self) -> None:
        keeper = self._keeper
        try:
            found = await keeper.patiently(self._validated)
        except UnusableLine as error:
            problems = (error.problem, *self.batch.problems)
            _log.warning("batch cannot be worked with", batch=self.batch.id, reason=told(problems))
            await finalize(keeper, replace(self.batch, problems=problems), "failed")
            return
        if found.counts.left:
            await keeper.patiently(partial(keeper.change, found, "in_progress"))
        else:
            await finalize(keeper, found, "failed")

    async def _validated(self) -> Batch:
        means, config, results = self._means, self._means.config, self._keeper.results
        async with means.validating:
            results.begin()
            return await validate(
                self.batch,
                results,
                means.folder,
                means.store,
                max_lines=config.max_lines,
                max_line_bytes=config.max_line_bytes,
            )

    async def _answer_all(self) -> None:
        keeper = self._keeper
        self._asker.begin()
        twins = await keeper.patiently(partial(self._means.store.has_twins, self.batch.id))
        try:
            await self._upstream.resume()
            while True:
                await self._allowed()
                self._asker.look_ahead(self._upstream.lines)
                group = await self._queue.next_group(keeper, self._sift)
                if group:
                    await self._ask_when_free(group)
                elif group is None or await self._waits():
                    pass
                elif not (twins and await keeper.patiently(keeper.results.copy)):
                    self._check_end()  # a last call may have found that there is nobody to ask for any more
                    if not self.batch.counts.left:
                        break
                    await keeper.rest(0.05)  # what came back meanwhile is fetched
                await keeper.commit_in_time()
        except JobStopped as stopped:
            await self._asker.stop()
            await keeper.patiently(keeper.commit)
            await self._end_early(stopped)
            return
        await finalize(keeper, self.batch, "completed")

    async def _end_early(self, stopped: JobStopped) -> None:
        self._keeper.say("ending", stopped.message)
        await self._upstream.wind_up()
        await end_early(self._keeper, self._means, stopped)

    # Asking.

    async def _waits(self) -> bool:
        """Where no line is ready: whether some are on their way, or to be asked again or committed. Waits a moment."""
        keeper = self._keeper
        self._upstream.close()
        if self._asker.is_busy or self._queue.has_again or self._upstream.is_busy:
            due = min(self._queue.soonest, keeper.commit_due) - self._means.clock()
            await keeper.rest(max(0.01, due))
            return True
        if keeper.uncommitted:
            await keeper.patiently(keeper.commit)
            return True
        return False

    async def _sift(self, lines: list[BatchLine]) -> list[BatchLine]:
        return await self._upstream.sift(lines, self._asker.late)

    async def _ask_when_free(self, group: list[BatchLine]) -> None:
        # What a provider still has the time to do in a batch does not leave singly, for more.
        while not self._asker.try_ask(group, may_leave=not self._upstream.has_time()):
            await self._keeper.rest(LOOK_SECONDS)
            await self._keeper.commit_in_time()
            await self._allowed()
            self._upstream.close(GATHERING_SECONDS)
            self._asker.look_ahead(self._upstream.lines)
            if self._upstream.wants(self._queue.ready(group), self._asker.late):
                self._queue.put_back(group)
                return

    async def _allowed(self) -> None:
        """Wait while the disk is nearly full or it is not the time for jobs. Raises Stopped."""
        while True:
            self._check_end()
            reason = await self._pause_reason()
            if reason is None:
                if self._keeper.state != "running":
                    self._means.alerts.clear("jobs_paused", self.batch.id)
                    self._keeper.say("running", "")
                    self._asker.begin()
                return
            self._keeper.say("paused", reason)
            await self._keeper.rest(LOOK_SECONDS)
            await self._keeper.commit_in_time()

    async def _pause_reason(self) -> str | None:
        if not is_open(self._means.config.hours, datetime.fromtimestamp(self._means.wall())):
            return f"jobs run at {', '.join(self._means.config.hours)} here (jobs.hours)"
        now = self._means.clock()
        if self._keeper.state == "paused" or now - self._disk_looked >= _DISK_SECONDS:
            self._disk_looked = now
            try:
                await asyncio.to_thread(self._means.folder.check_space)
            except StorageFull as error:
                self._means.alerts.warn("jobs_paused", f"batch {self.batch.id}: {error.message}", self.batch.id)
                return error.message
        return None

    def _check_end(self) -> None:
        stopped = self._stopped or self._asker.stopped
        if stopped is not None:
            raise stopped
        error = self._upstream.error
        if isinstance(error, Unauthorized):
            raise JobStopped("failed", error.code, error.message)
        if error is not None:
            raise error
        if self._means.wall() >= self.batch.expires_at:
            text = f"the batch was not done within its completion window of {self.batch.completion_window}"
            raise JobStopped("expired", "batch_expired", text)
