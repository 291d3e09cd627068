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
from appliance.jobs.planner import BatchPace, Forecast, forecast, open_seconds, pace_of
from appliance.jobs.storage.batch_state import BatchState

_log = structlog.stdlib.get_logger(__name__)


class Dispatcher:
    """`ask` what has a place, and `stop` what is under way. `stopped` is set once nobody may be asked for any more."""

    def __init__(self, means: JobDeps, keeper: BatchState, queue: LineQueue) -> None:
        self._means, self._keeper, self._queue = means, keeper, queue
        self.claim: SlotRequest = means.places.join(keeper.batch.owner, keeper.nudge)
        self.stopped: JobStopped | None = None
        self.forecast = Forecast(None, 0)
        self.lines_under_way = 0
        self._pace = BatchPace()
        self._pace_onsite = pace_of(keeper.batch.expires_at - keeper.batch.created_at)
        self._tasks: set[asyncio.Task[None]] = set()
        self._hosted_lane = 0

    @property
    def is_busy(self) -> bool:
        return bool(self._tasks)

    @property
    def late(self) -> int:
        """Lines that should leave the site, and are not on their way."""
        return max(0, self.forecast.late - self._hosted_lane)

    @property
    def per_second(self) -> float | None:
        return self._pace.per_second(self._means.clock())

    def begin(self) -> None:
        """Work begins, or goes on after a pause."""
        self._pace.begin(self._means.clock())
        self._pace_onsite.begin(self._means.clock())

    def look_ahead(self, elsewhere: int) -> None:
        """What would be late at this pace, of what is neither done nor on its way. `elsewhere`: lines that left."""
        means, wall, batch = self._means, self._means.wall(), self._keeper.batch
        left = open_seconds(means.config.hours, datetime.fromtimestamp(wall), batch.expires_at - wall)
        rate = self._pace_onsite.per_second(means.clock())
        self.forecast = forecast(batch.counts.left - self._keeper.uncommitted - elsewhere, rate, left)
        self.claim.pressing = self.forecast.late > 0

    def try_ask(self, group: list[BatchLine], *, may_leave: bool) -> bool:
        """Whether the lines are under way now. `may_leave`: those that would be late may be sent off one by one."""
        if may_leave and self._leaves():
            for line in group:
                self._spawn([line], hosted=True)
            return True
        if self._means.places.enter(self.claim):
            self._spawn(group, hosted=False)
            return True
        return False

    def terms(self, late: bool) -> BatchTerms:
        batch = self._keeper.batch
        patience = 0.0 if late else max(1.0, batch.expires_at - self._means.wall())
        return BatchTerms(batch.id, batch.owner, batch.residency, batch.tag, patience)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def part(self) -> None:
        """No more calls."""
        self._means.places.part(self.claim)

    def _leaves(self) -> bool:
        """Whether lines are sent off at once because on-site they would be late. Those that are bound are never sent:
        that is decided for each anew where it is asked, whatever is hoped for here."""
        if not self.late or self._hosted_lane >= self._means.config.hosted_concurrency:
            return False
        bound = Residency.parse(self._keeper.batch.residency)
        hosted = [target for target in self._means.state.snapshot.targets if target.location == "hosted"]
        return any(bound.allows(target) for target in hosted)

    def _spawn(self, group: list[BatchLine], *, hosted: bool) -> None:
        self.lines_under_way += len(group)
        self._hosted_lane += hosted
        task = asyncio.create_task(self._ask(group, hosted=hosted), name=f"jobs {self._keeper.batch.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, group: list[BatchLine], *, hosted: bool) -> None:
        batch = self._keeper.batch
        try:
            answers = await self._means.answering.ask(group, self.terms(hosted))
            self._take(group, answers)
        except Unauthorized as error:
            self.stopped = self.stopped or JobStopped("failed", error.code, error.message)
        except Exception:  # a defect harms the lines that meet it
            _log.exception("lines failed unexpectedly", batch=batch.id, lines=[line.number for line in group])
            text = "the appliance failed unexpectedly; its log has the details under the batch's id"
            self._take(group, [LineAnswer(500, ApplianceError(text).to_openai(), batch.id)] * len(group))
        finally:
            self.lines_under_way -= len(group)
            self._hosted_lane -= hosted
            if not hosted:
                self._means.places.leave(self.claim)
            self._keeper.nudge()

    def _take(self, group: Sequence[BatchLine], answers: Sequence[LineAnswer]) -> None:
        now, keeper = self._means.clock(), self._keeper
        for line, answer in zip(group, answers, strict=True):
            if self._queue.again(line, answer):
                keeper.reason = f"asked again: {_message(answer)}"
            else:
                keeper.answered(line, answer)
        onsite = sum(answer.location == "onsite" for answer in answers)
        good = sum(answer.is_good for answer in answers)
        if onsite:
            self._pace_onsite.done(onsite, now)
        if good:
            self._pace.done(good, now)
            keeper.reason = "" if keeper.state == "running" else keeper.reason


def _message(answer: LineAnswer) -> str:
    error = answer.body.get("error")
    return str(error.get("message", "")) if isinstance(error, dict) else ""
