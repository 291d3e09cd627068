"""One engine under supervision: its process, its life and what it last said."""

import asyncio
import secrets
import shutil
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from appliance.core import EngineLoad, EngineStatus, Target
from appliance.engines.base import EngineAdapter, LoadReader, Placement
from appliance.node.supervise import orphans
from appliance.node.supervise.launcher import Launcher, Process
from appliance.node.supervise.lifecycle import (
    Action,
    EngineLifecycle,
    Event,
    Exited,
    Healthy,
    LifecycleLimits,
    Phase,
    ProgressReport,
    Start,
    Stop,
    Tick,
    Unhealthy,
    advance,
)
from appliance.node.supervise.liveness import Liveness
from appliance.node.supervise.sockets import SESSION_FILE
from appliance.node.supervise.status import EngineClient, StatusPublisher

_STARTING_POLL_SECONDS: Final = 0.05
_LONG_START_POLL_SECONDS: Final = 0.5
_LONG_START_SECONDS: Final = 5.0
_BUSY_POLL_SECONDS: Final = 0.25
_IDLE_POLL_SECONDS: Final = 1.0
_PAGE_POLL_SECONDS: Final = 0.5
"""For gauges that cost the engine some 10 ms a reading."""
_AFTER_FAILURE_SECONDS: Final = 1.0
"""Pause before a control task that failed goes on, so that a lasting fault does not fill the log."""
_SLEEP_SECONDS: Final = 60.0
"""Moving weights between GPU and RAM takes seconds."""
KEY_FILE: Final = "key"


_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SupervisorDeps:
    """What all keepers of a node share."""

    launcher: Launcher
    signals: StatusPublisher
    clock: Callable[[], float]
    home: Path
    """The data directory: whose engines' processes are known by it."""
    stall_seconds: float
    start_seconds: float
    drain_seconds: float
    watts_per_busy_core: float | None = None


class EngineSupervisor:
    """Feeds an engine's life with what happens and does as that says. Everything runs on the event loop."""

    def __init__(self, placement: Placement, engine: EngineAdapter, folder: Path, around: SupervisorDeps) -> None:
        """`folder` is this engine's alone; it is made when the engine starts."""
        self.placement, self.lifecycle = placement, EngineLifecycle()
        self._engine, self._folder, self._around = engine, folder, around
        self._signals, self._clock = around.signals, around.clock
        self._socket = folder / "s"
        self._key = secrets.token_urlsafe(24)
        self._limits = LifecycleLimits(
            start_seconds=around.start_seconds,
            stall_seconds=around.stall_seconds,
            drain_seconds=around.drain_seconds,
            permanent_exits=engine.permanent_exits,
        )
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._phase_changed = asyncio.Event()
        self._process: Process | None = None
        self._load: EngineLoad | None = None
        self._liveness = Liveness(around.stall_seconds)
        self._can_probe = True
        self._progress = ""
        self._resting = ""
        """Why it has been unloaded, while it is."""
        self._is_asleep = False
        self._found: frozenset[str] | None = None
        """What the running engine found that its model can do; None where it has not said."""
        self._shared: frozenset[Path] = frozenset()
        """Files of shared memory that it has been seen to hold."""
        self._is_warm = False
        self._session: int | None = None
        """Of the process that was started last: its leader's number."""
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def target(self) -> Target:
        placement = self.placement
        return Target(
            name=placement.target,
            location="onsite",
            dialect="openai",
            address=f"unix:{self._socket}",
            model=placement.model,
            abilities=placement.abilities if self._found is None else placement.abilities & self._found,
            context_tokens=placement.shape.sequence_context_tokens,
            quality=placement.quality,
            variant=placement.variant,
        )

    @property
    def progress(self) -> str:
        """What the engine is doing while it starts; empty where it does not say."""
        return self._progress if self.lifecycle.phase == "starting" else ""

    @property
    def is_unloaded(self) -> bool:
        return bool(self._resting)

    @property
    def load(self) -> EngineLoad | None:
        """As it was last told; None while it is not ready."""
        return self._load

    @property
    def pid(self) -> int | None:
        """Of the process that leads its engine, while there is one."""
        return None if self._process is None else self._process.pid

    @property
    def is_busy(self) -> bool:
        """Whether it was last seen with work."""
        return self._load is not None and self._load.queued_requests + self._load.running_sequences > 0

    def begin(self, *, resting: str = "") -> None:
        """Begin to keep it, and start it unless it is to rest for now."""
        self._resting = resting
        self._show()  # a target without a view would be one that nobody knows anything of
        self._run("keeper", self._live)
        if not resting:
            self._inbox.put_nowait(Start())

    def stop(self) -> None:
        self._inbox.put_nowait(Stop())

    async def unload(self, reason: str) -> None:
        """Give its memory back until `wake`: asleep where the engine can, else stopped. Returns when that is done."""
        self._resting = reason
        self._show()
        if (
            self.lifecycle.phase == "ready"
            and self._engine.can_sleep(self.placement)
            and await self._post("/sleep?level=1")
        ):
            self._is_asleep = True
            self._show()
            return
        self.stop()
        await self.wait_for(lambda life: life.phase in ("stopped", "failed"))
        self._show()

    async def wake(self) -> None:
        """Have it loaded again. Returns at once where it has to be started: its state tells when it is ready."""
        if self._is_asleep and await self._post("/wake_up"):
            self._liveness.moved(self._clock())
        elif self._is_asleep:
            self.stop()
            await self.wait_for(lambda life: life.phase == "stopped")
        self._is_asleep, self._resting = False, ""
        self._show()
        self._inbox.put_nowait(Start())

    async def wait_for(self, is_so: Callable[[EngineLifecycle], bool]) -> None:
        while not is_so(self.lifecycle):
            await self._phase_changed.wait()

    async def aclose(self) -> None:
        """End the tasks, and the process with everything it has started, whatever state it is in."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
            self._process = None
            await self._clean_up()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _live(self) -> None:
        """Take events as they come, or a Tick when the life asks for one."""
        while True:
            wake_at = self.lifecycle.wake_at
            timeout = None if wake_at is None else max(0.0, wake_at - self._clock())
            try:
                async with asyncio.timeout(timeout):
                    event: Event = await self._inbox.get()
            except TimeoutError:
                event = Tick()
            await self._take(event)

    async def _take(self, event: Event) -> None:
        before = self.lifecycle
        self.lifecycle, actions = advance(before, event, self._clock(), self._limits)
        if self.lifecycle.phase != before.phase:
            if self.lifecycle.phase != "ready":
                self._load = None
            if self.lifecycle.phase in ("stopping", "killing", "waiting"):
                self._is_asleep = False
            if self.lifecycle.phase == "starting":
                self._progress = ""
            self._tell(before.phase)
        for action in actions:
            await self._do(action)

    def _tell(self, before: Phase) -> None:
        """Publish the new phase first of all; then say it in words."""
        life, model, name = self.lifecycle, self.placement.model, self.placement.target
        self._show()
        if life.state == "failed":
            self._signals.warn("engine_down", f"the engine for {model} {life.reason}", about=name)
        elif life.phase in ("ready", "stopped"):
            self._signals.clear("engine_down", about=name)
            for task in ("keeper", "poll", "exit"):
                self._signals.clear("control_task_failed", about=f"{task} {name}")
        level = _log.warning if life.state == "failed" else _log.info
        level("engine", model=model, phase=life.phase, was=before, reason=life.reason, restarts=life.restarts)
        changed, self._phase_changed = self._phase_changed, asyncio.Event()
        changed.set()

    def _show(self) -> None:
        state, reason, watts = (
            self.lifecycle.state,
            self.lifecycle.reason or self.progress,
            self._around.watts_per_busy_core,
        )
        if self._resting and (self._is_asleep or state in ("ready", "stopped")):
            state, reason = "stopped", self._resting
        on_demand = bool(self._resting) and state == "stopped"
        view = EngineStatus(
            target=self.placement.target,
            state=state,
            seen=self._clock(),
            load=self._load,
            watts=None if watts is None or self.placement.gpu else watts * self.placement.shape.threads,
            restarts=self.lifecycle.restarts,
            reason=reason,
            on_demand=on_demand,
        )
        self._signals.publish_status(view)

    async def _do(self, action: Action) -> None:
        match action:
            case "spawn":
                await self._spawn()
            case "terminate" if self._process is not None:
                self._process.terminate()
            case "kill" if self._process is not None:
                self._process.kill()

    async def _spawn(self) -> None:
        # Engines leave their sockets behind, and some refuse to start where one lies.
        shutil.rmtree(self._folder, ignore_errors=True)
        try:
            self._folder.mkdir(mode=0o700, parents=True)
            (self._folder / KEY_FILE).write_text(self._key if self._engine.key_variable else "")
            process = await self._around.launcher.launch(self.placement.model, self._argv, self._environment())
        except OSError as error:
            self._inbox.put_nowait(Exited(None, str(error)))
            return
        self._process, self._session = process, process.pid
        (self._folder / SESSION_FILE).write_text(str(process.pid))
        self._liveness, self._can_probe, self._is_warm = Liveness(self._limits.stall_seconds), True, False
        self._run("exit", lambda: self._watch(process))
        self._run("poll", lambda: self._poll(process))

    def _environment(self) -> dict[str, str]:
        added = dict(self._engine.build_environment(self.placement, self._folder))
        if self._engine.key_variable:
            added[self._engine.key_variable] = self._key
        return added | {
            orphans.ENGINE_MARK_VARIABLE: orphans.format_engine_mark(self._around.home, self.placement.model)
        }

    def _argv(self, parent_guard_fd: int) -> list[str]:
        return self._engine.build_argv(
            sys.executable,
            self.placement,
            socket=self._socket,
            parent_guard_fd=parent_guard_fd,
            drain_seconds=self._limits.drain_seconds,
        )

    async def _watch(self, process: Process) -> None:
        code = await process.wait()
        self._process = None
        await self._clean_up()
        words = self._engine.find_crash_reason(process.last_lines())
        if self.lifecycle.phase == "starting":
            self._shrink(words)
        self._inbox.put_nowait(Exited(code, words))

    async def _clean_up(self) -> None:
        """Whatever of it has left its group, and the sockets it leaves behind."""
        ended = await asyncio.to_thread(lambda: orphans.kill_processes(self._members()))
        if ended:
            _log.warning("an engine left processes behind; they were ended", model=self.placement.model, pids=ended)
        shared, self._shared = self._shared, frozenset()
        await asyncio.to_thread(orphans.remove_shared_memory, shared)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _shrink(self, words: str) -> None:
        """Where memory was too small, the next start is one with less."""
        less = self._engine.shrink_placement(self.placement, words)
        if less is None:
            return
        self.placement = less
        text = f"{less.model} is served with {less.reasons[-1]}; free memory and restart the node for the whole"
        self._signals.warn("engine_shrunk", text, about=less.target)
        self._signals.replace_target(self.target)

    async def _poll(self, process: Process) -> None:
        """As long as `process` lives: ask for its health while it starts, for its load once it is ready."""
        gauges = self._engine.make_load_reader(self.placement)
        async with aclosing(EngineClient(self._socket, self._key if self._engine.key_variable else "")) as line:
            while True:
                starting = self.lifecycle.phase == "starting"
                event = await (self._ask_health(line, process) if starting else self._ask_load(line, gauges))
                if self._process is not process:
                    return
                if event is not None:
                    self._inbox.put_nowait(event)
                await asyncio.sleep(self._pause_seconds(gauges))

    async def _ask_health(self, line: EngineClient, process: Process) -> Event | None:
        if await line.check_health() is None:
            self._compare(await line.fetch_abilities())
            return Healthy()
        progress = self._engine.parse_progress(process.last_lines())
        if progress != self._progress:
            self._progress = progress
            await self._note_shared()
            _log.info("engine", model=self.placement.model, phase="starting", progress=progress)
            self._show()
        return None

    def _compare(self, found: frozenset[str] | None) -> None:
        """What was declared and is not there is not offered to anyone, and said on the health page."""
        self._found = found
        placement = self.placement
        lacking = sorted(placement.abilities - found) if found is not None else []
        if lacking:
            text = (
                f"{placement.model} is declared to be able to do {', '.join(lacking)}, and its engine finds that it "
                "cannot: no such request is sent to it; correct its abilities, or use a file with another chat template"
            )
            self._signals.warn("abilities_differ", text, about=placement.target)
        else:
            self._signals.clear("abilities_differ", about=placement.target)
        self._signals.replace_target(self.target)

    async def _ask_load(self, line: EngineClient, gauges: LoadReader) -> Event:
        answer = await line.fetch_load(gauges, self._clock)
        if isinstance(answer, str):
            return Unhealthy(answer)
        if not self._is_warm:
            self._is_warm = True
            await self._note_shared()
            self._run("warm-up", self._warm_up)
        if self.lifecycle.phase in ("ready", "stopping"):
            self._load = answer
            self._show()
        has_work = answer.queued_requests + answer.running_sequences > 0
        return ProgressReport(answer.steps, has_work=self._probe(answer.steps) or has_work)

    def _probe(self, steps: int) -> bool:
        """Ask for a token where nothing has moved for a while. Whether a probe waits for its answer."""
        probe, now = self._engine.build_liveness_probe(self.placement), self._clock()
        if probe is None or not self._can_probe or self._is_asleep or self.lifecycle.phase != "ready":
            return False
        self._liveness.saw(steps, now)
        if self._liveness.is_due(now):
            self._liveness.asked(now)
            self._run("probe", self._send_probe)
        return self._liveness.is_waiting

    async def _send_probe(self) -> None:
        probe, process = self._engine.build_liveness_probe(self.placement), self._process
        if probe is None:
            return
        async with aclosing(EngineClient(self._socket, self._key if self._engine.key_variable else "")) as line:
            status = await line.send_probe(probe, self._limits.stall_seconds)
        if process is not self._process or status is None:
            return
        if status == 200:
            self._liveness.moved(self._clock())
        elif 400 <= status < 500:
            # The engine is there and does not take the question: its silence would say nothing.
            self._can_probe = False
            self._liveness.moved(self._clock())
            _log.warning(
                "the engine takes no probe; a hang may go unnoticed", model=self.placement.model, status=status
            )

    async def _note_shared(self) -> None:
        if self._engine.build_liveness_probe(self.placement) is not None:
            self._shared |= await asyncio.to_thread(lambda: orphans.find_shared_memory(self._members()))

    def _members(self) -> Sequence[int]:
        """Its processes, wherever they are. Looks through all of the machine's: call it in a thread."""
        return orphans.find_marked_processes(
            orphans.format_engine_mark(self._around.home, self.placement.model), self._session
        )

    async def _warm_up(self) -> None:
        work = self._engine.build_warm_up(self.placement)
        if work is not None:
            async with aclosing(EngineClient(self._socket, self._key if self._engine.key_variable else "")) as line:
                await line.send_probe(work, self._limits.stall_seconds)

    async def _post(self, path: str) -> bool:
        async with aclosing(EngineClient(self._socket, self._key if self._engine.key_variable else "")) as line:
            return await line.post(path, {}, _SLEEP_SECONDS) == 200

    def _pause_seconds(self, gauges: LoadReader) -> float:
        if self.lifecycle.phase == "starting":
            long = self._clock() - self.lifecycle.since > _LONG_START_SECONDS
            return _LONG_START_POLL_SECONDS if long else _STARTING_POLL_SECONDS
        busy = _BUSY_POLL_SECONDS if gauges.path == "/load" else _PAGE_POLL_SECONDS
        return busy if self.is_busy or self._liveness.is_waiting else _IDLE_POLL_SECONDS

    def _run(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `work` as a task that outlives its own failures."""
        task = asyncio.create_task(self._guard(name, work), name=f"{name} {self.placement.model}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guard(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            try:
                return await work()
            except Exception as error:
                _log.exception("control task failed", task=name, model=self.placement.model)
                text = f"the {name} task of {self.placement.model} failed and goes on: {error!r}"
                self._signals.warn("control_task_failed", text, about=f"{name} {self.placement.target}")
                if self._process is None:
                    # Whatever was under way has come to nothing; the life must not wait for its end.
                    self._inbox.put_nowait(Exited(None, repr(error)))
                await asyncio.sleep(_AFTER_FAILURE_SECONDS)
