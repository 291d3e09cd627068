"""Watches one run of an engine: its health while it starts, then its load, and whether it still computes."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from appliance.core import EngineLoad
from appliance.engines.base import EngineAdapter, Placement
from appliance.node.supervise import orphans
from appliance.node.supervise.engine_client import EngineClient
from appliance.node.supervise.launcher import Process
from appliance.node.supervise.lifecycle import EngineLifecycle, Event, ProgressReport, Unhealthy

_STARTING_POLL_SECONDS: Final = 0.05
_LONG_START_POLL_SECONDS: Final = 0.5
_LONG_START_SECONDS: Final = 5.0
_BUSY_POLL_SECONDS: Final = 0.25
_IDLE_POLL_SECONDS: Final = 1.0
_PAGE_POLL_SECONDS: Final = 0.5
"""For load pages that cost the engine some 10 ms a reading."""
_LONGEST_QUIET_SECONDS: Final = 15.0

_log = structlog.get_logger(__name__)

StartTask = Callable[[str, Callable[[], Awaitable[None]]], None]
"""Starts a named background task."""


class LivenessTracker:
    """Decides when an engine whose counters stand still is asked for one token. Pure.

    Until the probe is answered the engine counts as having work. A hung engine is then found by the same rule as any
    other: work waits and no step is done.
    """

    def __init__(self, stall_seconds: float) -> None:
        """Probes are due so often that a hang is noticed within about `stall_seconds` and a quarter."""
        self._every_seconds = min(_LONGEST_QUIET_SECONDS, stall_seconds / 4)
        self._steps: int | None = None
        self._quiet_since = 0.0
        self._probed_at: float | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether a probe has had no answer yet."""
        return self._probed_at is not None

    def record_steps(self, steps: int, now: float) -> None:
        """The engine's counter of steps at `now`."""
        if steps != self._steps:
            self._steps = steps
            self.record_progress(now)

    def record_progress(self, now: float) -> None:
        """The engine has computed something, as a probe's answer or its counters show."""
        self._quiet_since, self._probed_at = now, None

    def is_probe_due(self, now: float) -> bool:
        return now - (self._quiet_since if self._probed_at is None else self._probed_at) >= self._every_seconds

    def record_probe(self, now: float) -> None:
        self._probed_at = now


@dataclass(frozen=True, slots=True)
class EngineRun:
    """One run of an engine: its process, and how it is reached."""

    engine: EngineAdapter
    placement: Placement
    process: Process
    connect: Callable[[], EngineClient]
    list_processes: Callable[[], Sequence[int]]
    """All processes of the engine. Blocking: it looks through all of the machine's."""


class EngineMonitor:
    """Asks one running engine and keeps its last answers. Runs on the event loop."""

    def __init__(self, run: EngineRun, clock: Callable[[], float], stall_seconds: float, start_task: StartTask) -> None:
        self.progress = ""
        """What the engine was last seen to do while it starts; empty when it does not say."""
        self.load: EngineLoad | None = None
        self.abilities: frozenset[str] | None = None
        """What the engine found that its model can do; None when it has not said."""
        self.shared_memory: frozenset[Path] = frozenset()
        """Files of shared memory that its processes were seen to hold."""
        self._run, self._clock, self._stall_seconds, self._start_task = run, clock, stall_seconds, start_task
        self._reader = run.engine.make_load_reader(run.placement)
        self._probe = run.engine.build_liveness_probe(run.placement)
        self._may_leave_memory = self._probe is not None
        self._liveness = LivenessTracker(stall_seconds)
        self._is_warm = False

    @property
    def sends_probes(self) -> bool:
        """False when the engine needs none, or refused one."""
        return self._probe is not None

    async def check_ready(self, client: EngineClient) -> bool:
        """Whether the engine is ready. Until it is, `progress` is what its last lines say."""
        if await client.check_health() is None:
            self.abilities = await client.fetch_abilities()
            return True
        progress = self._run.engine.parse_progress(self._run.process.last_lines())
        if progress != self.progress:
            self.progress = progress
            await self._note_shared_memory()
            _log.info("engine", model=self._run.placement.model, phase="starting", progress=progress)
        return False

    async def read_load(self, client: EngineClient, *, may_probe: bool) -> Event:
        """Fetch the load of a ready engine. A probe is sent when nothing moves and `may_probe` allows it."""
        answer = await client.fetch_load(self._reader, self._clock)
        if isinstance(answer, str):
            return Unhealthy(answer)
        if not self._is_warm:
            self._is_warm = True
            await self._note_shared_memory()
            self._start_task("warm-up", self._warm_up)
        self.load = answer
        waits = may_probe and self._probe_if_due(answer.steps)
        return ProgressReport(answer.steps, has_work=waits or has_work(answer))

    def record_wake(self) -> None:
        """The engine was asleep and computes again."""
        self._liveness.record_progress(self._clock())

    def pause_seconds(self, lifecycle: EngineLifecycle) -> float:
        """How long to wait before the engine is asked again."""
        if lifecycle.phase == "starting":
            is_long = self._clock() - lifecycle.since > _LONG_START_SECONDS
            return _LONG_START_POLL_SECONDS if is_long else _STARTING_POLL_SECONDS
        busy = _BUSY_POLL_SECONDS if self._reader.path == "/load" else _PAGE_POLL_SECONDS
        is_busy = self.load is not None and has_work(self.load)
        return busy if is_busy or self._liveness.is_waiting else _IDLE_POLL_SECONDS

    def _probe_if_due(self, steps: int) -> bool:
        """Ask for one token when nothing has moved for a while. Returns whether a probe waits for its answer."""
        if self._probe is None:
            return False
        now = self._clock()
        self._liveness.record_steps(steps, now)
        if self._liveness.is_probe_due(now):
            self._liveness.record_probe(now)
            self._start_task("probe", self._send_probe)
        return self._liveness.is_waiting

    async def _send_probe(self) -> None:
        if self._probe is None:
            return
        async with aclosing(self._run.connect()) as client:
            status = await client.send_probe(self._probe, self._stall_seconds)
        if status is None:
            return
        if status == 200:
            self._liveness.record_progress(self._clock())
        elif 400 <= status < 500:
            # The engine is there and refuses the question: its silence would say nothing.
            self._probe = None
            self._liveness.record_progress(self._clock())
            model = self._run.placement.model
            _log.warning("the engine takes no probe; a hang may go unnoticed", model=model, status=status)

    async def _warm_up(self) -> None:
        work = self._run.engine.build_warm_up(self._run.placement)
        if work is not None:
            async with aclosing(self._run.connect()) as client:
                await client.send_probe(work, self._stall_seconds)

    async def _note_shared_memory(self) -> None:
        if self._may_leave_memory:
            self.shared_memory |= await asyncio.to_thread(
                lambda: orphans.find_shared_memory(self._run.list_processes())
            )


def has_work(load: EngineLoad) -> bool:
    """Whether requests wait or run."""
    return load.queued_requests + load.running_sequences > 0
