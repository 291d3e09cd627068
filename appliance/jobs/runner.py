"""One batch, from validating to its end. Read `run` first.

Its state is what the store has: a run that is cut off at any moment begins again from there and asks what still waits.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Final, TypeVar

import structlog

from appliance.core import Residency
from appliance.errors import ApplianceError, JobsUnavailable, StorageFull, Unauthorized
from appliance.jobs.files import new_file_id
from appliance.jobs.nouns import Batch, Ending, Line, LineAnswer, Problem, Status, StoredFile, Terms
from appliance.jobs.parts import Means, Progress, RunState, Stopped, grouped
from appliance.jobs.places import Claim
from appliance.jobs.planner import Forecast, Pace, forecast, is_open, open_seconds, pace_of
from appliance.jobs.results import Results
from appliance.jobs.validating import Unusable, told, validate

_FETCHED_LINES: Final = 128
_FETCHED_BYTES: Final = 4_000_000
_COMMIT_LINES: Final = 256
_COMMIT_SECONDS: Final = 0.5
"""A commit costs two syncs of the disk; a crash costs what was not committed."""
_LOOK_SECONDS: Final = 1.0
"""How often deadline, disk and hours are looked at while nothing else happens."""
_DISK_SECONDS: Final = 5.0
_MOST_AGAIN: Final = 256
"""So many lines may wait to be asked again before new ones are left alone."""
_MOST_TRIES: Final = 4
"""Of a line whose target failed; one that was only busy is tried until the deadline."""
_UNDONE_AT_ONCE: Final = 500

Result = TypeVar("Result")

_log = structlog.stdlib.get_logger(__name__)


@dataclass(slots=True)
class _Again:
    line: Line
    tries: int
    ready: float


class Run:
    """`run` it once. `stop` ends it early, `nudge` makes it look around at once."""

    def __init__(self, batch: Batch, means: Means) -> None:
        self._means = means
        self._results = Results(batch, means.folder, means.store)
        self._claim: Claim = means.places.join(batch.owner, self.nudge)
        self._lock = asyncio.Lock()
        """Held by whoever changes the batch."""
        self._nudged = asyncio.Event()
        self._pace, self._pace_onsite = Pace(), pace_of(batch.expires_at - batch.created_at)
        self._forecast = Forecast(None, 0)
        self._state: RunState = "validating"
        self._reason = ""
        self._stopped: Stopped | None = None
        self._fetched_to = 0
        self._fetched: deque[list[Line]] = deque()
        self._again: list[_Again] = []
        self._tries: dict[int, int] = {}
        self._answered: list[tuple[Line, LineAnswer]] = []
        self._answered_since = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._lines_under_way = 0
        self._hosted_lane = 0
        self._disk_looked = float("-inf")

    @property
    def batch(self) -> Batch:
        return self._results.batch

    @property
    def progress(self) -> Progress:
        left, rate = self.batch.counts.left, self._pace.per_second(self._means.clock())
        seconds = None if rate is None or rate <= 0 else left / rate
        return Progress(self._state, self._reason, rate, seconds, self._forecast.late, self._lines_under_way)

    def nudge(self) -> None:
        self._nudged.set()

    async def stop(self, ending: Ending, code: str, message: str) -> None:
        """Ask for its end; `cancelling` is on disk when this returns."""
        async with self._lock:
            if self.batch.status in ("validating", "in_progress"):
                await self._save(self._in_status(self.batch, "cancelling"))
                self._stopped = self._stopped or Stopped(ending, code, message)
        self.nudge()

    async def run(self) -> None:
        """To the end of the batch. Cancelled, it leaves everything so that the next run goes on."""
        try:
            if self.batch.status == "validating":
                await self._validate()
            if self.batch.status == "in_progress":
                await self._answer_all()
            if self.batch.status == "cancelling":
                await self._end_early(
                    Stopped("cancelled", "batch_cancelled", "the batch was cancelled before this line")
                )
            if self.batch.status == "finalizing":
                await self._patiently(self._publish)
        finally:
            await self._cancel_calls()
            with contextlib.suppress(Exception):
                await self._commit()
            self._results.close()
            self._means.alerts.clear("jobs_paused", self.batch.id)
            self._means.places.part(self._claim)

    # Stages.

    async def _validate(self) -> None:
        try:
            found = await self._patiently(self._validated)
        except Unusable as error:
            problems = (error.problem, *self.batch.problems)
            _log.warning("batch cannot be worked with", batch=self.batch.id, reason=told(problems))
            await self._finalize(replace(self.batch, problems=problems), "failed")
            return
        if found.counts.left:
            await self._patiently(partial(self._change, found, "in_progress"))
        else:
            await self._finalize(found, "failed")

    async def _validated(self) -> Batch:
        means, config = self._means, self._means.config
        self._results.begin()
        return await validate(
            self.batch,
            self._results,
            means.folder,
            means.store,
            max_lines=config.max_lines,
            max_line_bytes=config.max_line_bytes,
        )

    async def _answer_all(self) -> None:
        self._pace.begin(self._means.clock())
        self._pace_onsite.begin(self._means.clock())
        twins = await self._patiently(partial(self._means.store.has_twins, self.batch.id))
        try:
            while True:
                await self._allowed()
                self._look_ahead()
                group = await self._next_group()
                if group:
                    await self._ask_when_free(group)
                elif self._tasks or self._again:
                    await self._rest(self._until_again())
                elif self._answered:
                    await self._patiently(self._commit)
                elif not (twins and await self._patiently(self._results.copy)):
                    self._check_end()  # a last call may have found that there is nobody to ask for any more
                    break
                await self._commit_in_time()
        except Stopped as stopped:
            await self._cancel_calls()
            await self._patiently(self._commit)
            await self._end_early(stopped)
            return
        await self._finalize(self.batch, "completed")

    async def _end_early(self, stopped: Stopped) -> None:
        """Lines that were not answered are named in the error file, so that none is missing from the results."""
        self._say("ending", stopped.message)
        while await self._patiently(self._results.copy):
            pass
        undone = partial(self._means.store.waiting, self.batch.id, 0, _UNDONE_AT_ONCE)
        while places := await self._patiently(undone):
            await self._patiently(partial(self._results.put_undone, places, stopped.code, stopped.message))
        problems = self.batch.problems
        if stopped.ending == "failed":
            problems = (Problem(stopped.code, stopped.message), *problems)
        await self._finalize(replace(self.batch, problems=problems), stopped.ending)

    async def _finalize(self, batch: Batch, ending: Ending) -> None:
        """Which files the results become is decided once, and on disk before they are made."""
        sized = self._results.with_sizes(batch)
        named = replace(
            sized,
            ending=ending,
            output_file_id=new_file_id() if sized.output_bytes else None,
            error_file_id=new_file_id() if sized.error_bytes else None,
        )
        await self._patiently(partial(self._change, named, "finalizing"))

    async def _publish(self) -> None:
        """Twice does no harm: the files' names are on disk, and they are moved, not copied."""
        batch, means, now = self.batch, self._means, self._means.wall()
        self._results.close()
        assert batch.ending is not None
        kept = batch.output_seconds or means.config.retention_days * 86_400.0
        made = []
        for file_id, size, path, name in (
            (batch.output_file_id, batch.output_bytes, means.folder.output_of(batch.id), "output"),
            (batch.error_file_id, batch.error_bytes, means.folder.errors_of(batch.id), "error"),
        ):
            if file_id is not None:
                await asyncio.to_thread(means.folder.publish, path, file_id, size)
                filename = f"{batch.id}_{name}.jsonl"
                made.append(StoredFile(file_id, batch.owner, filename, "batch_output", size, now, now + kept))
        ended = self._in_status(batch, batch.ending)
        await means.store.end(ended, made)
        self._results.batch = ended
        await asyncio.to_thread(means.folder.clear, batch.id)
        _log.info("batch ended", batch=batch.id, status=ended.status, completed=ended.counts.completed)

    # Asking.

    async def _allowed(self) -> None:
        """Wait while the disk is nearly full or it is not the time for jobs. Raises Stopped."""
        while True:
            self._check_end()
            reason = await self._pause_reason()
            if reason is None:
                if self._state != "running":
                    self._means.alerts.clear("jobs_paused", self.batch.id)
                    self._say("running", "")
                    self._pace.begin(self._means.clock())
                    self._pace_onsite.begin(self._means.clock())
                return
            self._say("paused", reason)
            await self._rest(_LOOK_SECONDS)
            await self._commit_in_time()

    async def _pause_reason(self) -> str | None:
        if not is_open(self._means.config.hours, datetime.fromtimestamp(self._means.wall())):
            return f"jobs run at {', '.join(self._means.config.hours)} here (jobs.hours)"
        now = self._means.clock()
        if self._state == "paused" or now - self._disk_looked >= _DISK_SECONDS:
            self._disk_looked = now
            try:
                await asyncio.to_thread(self._means.folder.check_space)
            except StorageFull as error:
                self._means.alerts.warn("jobs_paused", f"batch {self.batch.id}: {error.message}", self.batch.id)
                return error.message
        return None

    def _check_end(self) -> None:
        if self._stopped is not None:
            raise self._stopped
        if self._means.wall() >= self.batch.expires_at:
            text = f"the batch was not done within its completion window of {self.batch.completion_window}"
            raise Stopped("expired", "batch_expired", text)

    def _look_ahead(self) -> None:
        """What would be late at this pace, of what is neither done nor on its way."""
        means, wall = self._means, self._means.wall()
        left = open_seconds(means.config.hours, datetime.fromtimestamp(wall), self.batch.expires_at - wall)
        rate = self._pace_onsite.per_second(means.clock())
        self._forecast = forecast(self.batch.counts.left - len(self._answered), rate, left)
        self._claim.pressing = self._forecast.late > 0

    async def _next_group(self) -> list[Line]:
        """Lines to be asked in one call; none where none is ready now."""
        now = self._means.clock()
        due = next((one for one in self._again if one.ready <= now), None)
        if due is not None:
            self._again.remove(due)
            return [due.line]
        if not self._fetched and len(self._again) < _MOST_AGAIN:
            await self._fetch()
        return self._fetched.popleft() if self._fetched else []

    async def _fetch(self) -> None:
        more = partial(self._means.store.to_ask, self.batch.id, self._fetched_to, _FETCHED_LINES)
        places = await self._patiently(more)
        size, taken = 0, 0
        while taken < len(places) and (not taken or size + places[taken].length <= _FETCHED_BYTES):
            size, taken = size + places[taken].length, taken + 1
        if not taken:
            return
        try:
            lines = await self._results.read(places[:taken])
        except FileNotFoundError as error:
            raise Stopped("failed", "input_lost", f"the batch's input cannot be read any more: {error}") from error
        self._fetched_to = places[taken - 1].number
        self._fetched += grouped(lines, self._means.answering.kin)

    async def _ask_when_free(self, group: list[Line]) -> None:
        while True:
            if self._leaves(group):
                for line in group:
                    self._spawn([line], hosted=True)
                return
            if self._means.places.enter(self._claim):
                self._spawn(group, hosted=False)
                return
            await self._rest(_LOOK_SECONDS)
            await self._commit_in_time()
            await self._allowed()
            self._look_ahead()

    def _leaves(self, group: Sequence[Line]) -> bool:
        """Whether lines are sent off at once because on-site they would be late. Those that are bound are never sent:
        that is decided for each anew where it is asked, whatever is hoped for here."""
        if self._forecast.late <= self._hosted_lane or self._hosted_lane >= self._means.config.hosted_concurrency:
            return False
        bound = Residency.parse(self.batch.residency)
        hosted = [target for target in self._means.state.snapshot.targets if target.location == "hosted"]
        return any(bound.allows(target) for target in hosted)

    def _spawn(self, group: list[Line], *, hosted: bool) -> None:
        self._lines_under_way += len(group)
        self._hosted_lane += hosted
        task = asyncio.create_task(self._ask(group, hosted=hosted), name=f"jobs {self.batch.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, group: list[Line], *, hosted: bool) -> None:
        batch = self.batch
        patience = 0.0 if hosted else max(1.0, batch.expires_at - self._means.wall())
        terms = Terms(batch.id, batch.owner, batch.residency, batch.tag, patience)
        try:
            answers = await self._means.answering.ask(group, terms)
            self._take(group, answers)
        except Unauthorized as error:
            self._stopped = self._stopped or Stopped("failed", error.code, error.message)
        except Exception:  # a defect harms the lines that meet it
            _log.exception("lines failed unexpectedly", batch=batch.id, lines=[line.number for line in group])
            text = "the appliance failed unexpectedly; its log has the details under the batch's id"
            self._take(group, [LineAnswer(500, ApplianceError(text).to_openai(), batch.id)] * len(group))
        finally:
            self._lines_under_way -= len(group)
            self._hosted_lane -= hosted
            if not hosted:
                self._means.places.leave(self._claim)
            self.nudge()

    def _take(self, group: Sequence[Line], answers: Sequence[LineAnswer]) -> None:
        now = self._means.clock()
        for line, answer in zip(group, answers, strict=True):
            tries = self._tries.pop(line.number, 0) + 1
            is_busy = answer.status in (429, 503)
            if answer.retry_after_seconds is not None and (is_busy or tries < _MOST_TRIES):
                self._tries[line.number] = tries
                pause = max(answer.retry_after_seconds, min(60.0, 2.0 ** min(tries, 6)))
                self._again.append(_Again(line, tries, now + pause))
                self._reason = f"asked again: {_message(answer)}"
                continue
            if not self._answered:
                self._answered_since = now
            self._answered.append((line, answer))
        onsite = sum(answer.location == "onsite" for answer in answers)
        good = sum(answer.is_good for answer in answers)
        if onsite:
            self._pace_onsite.done(onsite, now)
        if good:
            self._pace.done(good, now)
            self._reason = "" if self._state == "running" else self._reason

    # Keeping.

    async def _commit_in_time(self) -> None:
        is_late = self._answered and self._means.clock() - self._answered_since >= _COMMIT_SECONDS
        if is_late or len(self._answered) >= _COMMIT_LINES:
            await self._patiently(self._commit)

    async def _commit(self) -> None:
        async with self._lock:
            answered = tuple(self._answered)
            if answered:
                await self._results.put(answered)
                del self._answered[: len(answered)]
                self._answered_since = self._means.clock()

    async def _patiently(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Do it, however long there is no room for it on the disk."""
        while True:
            try:
                return await work()
            except (StorageFull, JobsUnavailable) as error:
                self._means.alerts.warn("jobs_paused", f"batch {self.batch.id}: {error.message}", self.batch.id)
                self._say("paused", error.message)
                await self._rest(_LOOK_SECONDS)

    async def _change(self, batch: Batch, status: Status) -> None:
        """To the next stage; where it was cancelled meanwhile it stays so, and only what was found out is kept."""
        async with self._lock:
            if status == "in_progress" and self.batch.status == "cancelling":
                await self._save(replace(batch, status="cancelling", times=self.batch.times))
            else:
                await self._save(self._in_status(batch, status))

    async def _save(self, batch: Batch) -> None:
        await self._means.store.save(batch)
        self._results.batch = batch

    def _in_status(self, batch: Batch, status: Status) -> Batch:
        return replace(batch, status=status, times={**batch.times, status: self._means.wall()})

    def _say(self, state: RunState, reason: str) -> None:
        if (state, reason) != (self._state, self._reason):
            _log.info("batch", batch=self.batch.id, state=state, reason=reason)
        self._state, self._reason = state, reason

    async def _rest(self, seconds: float) -> None:
        """Until something happens, and no longer than that."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, _LOOK_SECONDS)):
                await self._nudged.wait()
        self._nudged.clear()

    def _until_again(self) -> float:
        soonest = min((one.ready for one in self._again), default=float("inf"))
        commit = self._answered_since + _COMMIT_SECONDS if self._answered else float("inf")
        return max(0.01, min(soonest, commit) - self._means.clock())

    async def _cancel_calls(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


def _message(answer: LineAnswer) -> str:
    error = answer.body.get("error")
    return str(error.get("message", "")) if isinstance(error, dict) else ""
