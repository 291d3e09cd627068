"""One run's calls: when lines are asked, how many at once, who is sent off because on-site it would be late."""

import asyncio
from collections.abc import Sequence
from datetime import datetime

import structlog

from appliance.core import Residency
from appliance.errors import ApplianceError, Unauthorized
from appliance.jobs.deps import JobDeps, JobStopped
from appliance.jobs.fair_share import SlotRequest
from appliance.jobs.lines.queue import LineQueue
from appliance.jobs.models import BatchLine, BatchTerms, LineAnswer
from appliance.jobs.planner import BatchPace, Forecast, count_open_seconds, make_forecast, make_pace
from appliance.jobs.storage.batch_state import BatchState

_log = structlog.stdlib.get_logger(__name__)


class Dispatcher:
    """`try_dispatch` lines when a slot is free, `stop` what is in flight. `stopped` is set once the key is no more."""

    def __init__(self, deps: JobDeps, batch_state: BatchState, queue: LineQueue) -> None:
        self._deps, self._batch_state, self._queue = deps, batch_state, queue
        self.slot_request: SlotRequest = deps.slots.register(batch_state.batch.owner, batch_state.wake)
        self.stopped: JobStopped | None = None
        self.forecast = Forecast(None, 0)
        self.lines_in_flight = 0
        self._pace = BatchPace()
        self._pace_onsite = make_pace(batch_state.batch.expires_at - batch_state.batch.created_at)
        self._tasks: set[asyncio.Task[None]] = set()
        self._hosted_in_flight = 0

    @property
    def is_busy(self) -> bool:
        return bool(self._tasks)

    @property
    def late_lines(self) -> int:
        """Lines that should leave the site, and are not on their way."""
        return max(0, self.forecast.late_lines - self._hosted_in_flight)

    @property
    def lines_per_second(self) -> float | None:
        return self._pace.lines_per_second(self._deps.clock())

    def restart_pace(self) -> None:
        """Work begins, or goes on after a pause."""
        self._pace.start(self._deps.clock())
        self._pace_onsite.start(self._deps.clock())

    def update_forecast(self, elsewhere: int) -> None:
        """What would be late at this pace, of what is neither done nor on its way. `elsewhere`: lines that left."""
        deps, wall, batch = self._deps, self._deps.wall_clock(), self._batch_state.batch
        left = count_open_seconds(deps.config.hours, datetime.fromtimestamp(wall), batch.expires_at - wall)
        rate = self._pace_onsite.lines_per_second(deps.clock())
        self.forecast = make_forecast(batch.counts.left - self._batch_state.uncommitted - elsewhere, rate, left)
        self.slot_request.is_urgent = self.forecast.late_lines > 0

    def try_dispatch(self, group: list[BatchLine], *, may_leave: bool) -> bool:
        """Whether the lines are in flight now. `may_leave`: those that would be late may be sent off one by one."""
        if may_leave and self._can_leave():
            for line in group:
                self._spawn([line], hosted=True)
            return True
        if self._deps.slots.try_acquire(self.slot_request):
            self._spawn(group, hosted=False)
            return True
        return False

    def make_terms(self, late: bool) -> BatchTerms:
        batch = self._batch_state.batch
        patience = 0.0 if late else max(1.0, batch.expires_at - self._deps.wall_clock())
        return BatchTerms(batch.id, batch.owner, batch.residency, batch.tag, patience)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def release_slots(self) -> None:
        """No more calls."""
        self._deps.slots.unregister(self.slot_request)

    def _can_leave(self) -> bool:
        """Whether lines are sent to hosted targets at once because they would be late on-site.

        Residency-bound lines are never sent: the router decides that anew for each line."""
        if not self.late_lines or self._hosted_in_flight >= self._deps.config.hosted_concurrency:
            return False
        residency = Residency.parse(self._batch_state.batch.residency)
        hosted = [target for target in self._deps.state.snapshot.targets if target.location == "hosted"]
        return any(residency.allows(target) for target in hosted)

    def _spawn(self, group: list[BatchLine], *, hosted: bool) -> None:
        self.lines_in_flight += len(group)
        self._hosted_in_flight += hosted
        task = asyncio.create_task(self._ask(group, hosted=hosted), name=f"jobs {self._batch_state.batch.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, group: list[BatchLine], *, hosted: bool) -> None:
        batch = self._batch_state.batch
        try:
            answers = await self._deps.line_handler.execute(group, self.make_terms(hosted))
            self._record_answers(group, answers)
        except Unauthorized as error:
            self.stopped = self.stopped or JobStopped("failed", error.code, error.message)
        except Exception:  # a defect harms the lines that meet it
            _log.exception("lines failed unexpectedly", batch=batch.id, lines=[line.number for line in group])
            text = "the appliance failed unexpectedly; its log has the details under the batch's id"
            self._record_answers(group, [LineAnswer(500, ApplianceError(text).to_openai(), batch.id)] * len(group))
        finally:
            self.lines_in_flight -= len(group)
            self._hosted_in_flight -= hosted
            if not hosted:
                self._deps.slots.release(self.slot_request)
            self._batch_state.wake()

    def _record_answers(self, group: Sequence[BatchLine], answers: Sequence[LineAnswer]) -> None:
        now, batch_state = self._deps.clock(), self._batch_state
        for line, answer in zip(group, answers, strict=True):
            if self._queue.retry_later(line, answer):
                batch_state.reason = f"asked again: {_message(answer)}"
            else:
                batch_state.add_answer(line, answer)
        onsite = sum(answer.location == "onsite" for answer in answers)
        good = sum(answer.is_good for answer in answers)
        if onsite:
            self._pace_onsite.add_lines(onsite, now)
        if good:
            self._pace.add_lines(good, now)
            batch_state.reason = "" if batch_state.run_state == "running" else batch_state.reason


def _message(answer: LineAnswer) -> str:
    error = answer.body.get("error")
    return str(error.get("message", "")) if isinstance(error, dict) else ""
