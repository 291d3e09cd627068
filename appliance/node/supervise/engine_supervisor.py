"""One engine under supervision: its process, its life cycle and what it last reported."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Final

import structlog

from appliance.core import EngineLoad, EngineStatus, Target
from appliance.engines.base import EngineAdapter, Placement
from appliance.node.supervise.deps import SupervisorDeps
from appliance.node.supervise.engine_client import EngineClient
from appliance.node.supervise.engine_monitor import EngineMonitor, EngineRun, has_work
from appliance.node.supervise.engine_process import EngineProcess
from appliance.node.supervise.launcher import Process
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
    advance,
)
from appliance.telemetry.background import TASK_FAILED, GuardedTask

_SLEEP_SECONDS: Final = 60.0
"""Moving weights between GPU and RAM takes seconds."""
_LASTING_TASKS: Final = ("lifecycle", "poll", "exit")


_log = structlog.get_logger(__name__)


class EngineSupervisor:
    """Feeds an engine's life cycle with events and carries out its actions. Everything runs on the event loop."""

    def __init__(self, placement: Placement, engine: EngineAdapter, folder: Path, deps: SupervisorDeps) -> None:
        """`folder` is this engine's alone; it is made when the engine starts."""
        self.placement, self.lifecycle = placement, EngineLifecycle()
        self.process = EngineProcess(engine, placement.model, folder, deps.launcher, deps.runtime_folder)
        self.monitor: EngineMonitor | None = None
        """Of the process that was started last."""
        self._engine, self._deps = engine, deps
        self._status, self._clock = deps.status, deps.clock
        self._limits = LifecycleLimits(
            start_seconds=deps.config.start_seconds,
            stall_seconds=deps.config.stall_seconds,
            drain_seconds=deps.drain_seconds,
            permanent_exits=engine.permanent_exits,
        )
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._phase_changed = asyncio.Event()
        self._process: Process | None = None
        self._load: EngineLoad | None = None
        self._unload_reason = ""
        """Why it has been unloaded, while it is."""
        self._is_asleep = False
        self._abilities: frozenset[str] | None = None
        """What the engine found that its model can do; None when it has not said."""
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def target(self) -> Target:
        placement = self.placement
        return Target(
            name=placement.target,
            location="onsite",
            dialect="openai",
            address=f"unix:{self.process.socket}",
            model=placement.model,
            abilities=placement.abilities if self._abilities is None else placement.abilities & self._abilities,
            context_tokens=placement.shape.sequence_context_tokens,
            quality=placement.quality,
            variant=placement.variant,
        )

    @property
    def progress(self) -> str:
        """What the engine is doing while it starts; empty when it does not say."""
        return self.monitor.progress if self.monitor is not None and self.lifecycle.phase == "starting" else ""

    @property
    def is_unloaded(self) -> bool:
        return bool(self._unload_reason)

    @property
    def load(self) -> EngineLoad | None:
        """As the engine last reported it; None while it is not ready."""
        return self._load

    @property
    def pid(self) -> int | None:
        """Of the process that leads its engine, while there is one."""
        return None if self._process is None else self._process.pid

    @property
    def is_busy(self) -> bool:
        """Whether it was last seen with work."""
        return self._load is not None and has_work(self._load)

    def begin(self, *, unload_reason: str = "") -> None:
        """Begin to supervise. The engine is started unless `unload_reason` says why it stays unloaded for now."""
        self._unload_reason = unload_reason
        self._publish()  # a target must not be published without a status
        self._start_task("lifecycle", self._process_events)
        if not unload_reason:
            self._inbox.put_nowait(Start())

    def stop(self) -> None:
        self._inbox.put_nowait(Stop())

    async def unload(self, reason: str) -> None:
        """Give its memory back until `wake`: asleep if the engine can, else stopped. Returns when that is done."""
        self._unload_reason = reason
        self._publish()
        can_sleep = self.lifecycle.phase == "ready" and self._engine.can_sleep(self.placement)
        if can_sleep and await self._post("/sleep?level=1"):
            self._is_asleep = True
            self._publish()
            return
        self.stop()
        await self.wait_for(lambda lifecycle: lifecycle.phase in ("stopped", "failed"))
        self._publish()

    async def wake(self) -> None:
        """Load it again. Returns at once when it has to be started: its status tells when it is ready."""
        if self._is_asleep and await self._post("/wake_up"):
            if self.monitor is not None:
                self.monitor.record_wake()
        elif self._is_asleep:
            self.stop()
            await self.wait_for(lambda lifecycle: lifecycle.phase == "stopped")
        self._is_asleep, self._unload_reason = False, ""
        self._publish()
        self._inbox.put_nowait(Start())

    async def wait_for(self, is_so: Callable[[EngineLifecycle], bool]) -> None:
        while not is_so(self.lifecycle):
            await self._phase_changed.wait()

    async def aclose(self) -> None:
        """End the tasks, and the process with everything it has started, in whatever state it is."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
            self._process = None
            await self._clean_up()
        self.process.remove_folder()

    # ---- events and actions ----

    async def _process_events(self) -> None:
        """Take events as they come, or a Tick when the life cycle asks for one."""
        while True:
            wake_at = self.lifecycle.wake_at
            timeout = None if wake_at is None else max(0.0, wake_at - self._clock())
            try:
                async with asyncio.timeout(timeout):
                    event: Event = await self._inbox.get()
            except TimeoutError:
                event = Tick()
            await self._process_event(event)

    async def _process_event(self, event: Event) -> None:
        before = self.lifecycle
        self.lifecycle, actions = advance(before, event, self._clock(), self._limits)
        if self.lifecycle.phase != before.phase:
            if self.lifecycle.phase != "ready":
                self._load = None
            if self.lifecycle.phase in ("stopping", "killing", "waiting"):
                self._is_asleep = False
            self._announce_phase(before.phase)
        for action in actions:
            await self._act(action)

    def _announce_phase(self, before: Phase) -> None:
        """Publish the new phase first of all; then raise or clear warnings, and log it."""
        lifecycle, model, name = self.lifecycle, self.placement.model, self.placement.target
        self._publish()
        if lifecycle.state == "failed":
            self._status.warn("engine_down", f"the engine for {model} {lifecycle.reason}", about=name)
        elif lifecycle.phase in ("ready", "stopped"):
            self._status.clear("engine_down", about=name)
            for task in _LASTING_TASKS:
                self._status.clear(TASK_FAILED, about=f"{task} {name}")
        level = _log.warning if lifecycle.state == "failed" else _log.info
        reason, restarts = lifecycle.reason, lifecycle.restarts
        level("engine", model=model, phase=lifecycle.phase, was=before, reason=reason, restarts=restarts)
        changed, self._phase_changed = self._phase_changed, asyncio.Event()
        changed.set()

    def _publish(self) -> None:
        lifecycle, watts = self.lifecycle, self._deps.watts_per_busy_core
        state, reason = lifecycle.state, lifecycle.reason or self.progress
        if self._unload_reason and (self._is_asleep or state in ("ready", "stopped")):
            state, reason = "stopped", self._unload_reason
        status = EngineStatus(
            target=self.placement.target,
            state=state,
            seen=self._clock(),
            load=self._load,
            watts=None if watts is None or self.placement.gpu else watts * self.placement.shape.threads,
            restarts=lifecycle.restarts,
            reason=reason,
            on_demand=bool(self._unload_reason) and state == "stopped",
        )
        self._status.publish_status(status)

    async def _act(self, action: Action) -> None:
        match action:
            case "spawn":
                await self._spawn()
            case "terminate" if self._process is not None:
                self._process.terminate()
            case "kill" if self._process is not None:
                self._process.kill()

    # ---- the process ----

    async def _spawn(self) -> None:
        try:
            process = await self.process.start(self.placement, self._limits.drain_seconds)
        except OSError as error:
            self._inbox.put_nowait(Exited(None, str(error)))
            return
        self._process = process
        self.process.record_session(process.pid)
        run = EngineRun(self._engine, self.placement, process, self.process.connect, self.process.list_processes)
        monitor = EngineMonitor(run, self._clock, self._limits.stall_seconds, self._start_task)
        self.monitor = monitor
        self._start_task("exit", lambda: self._wait_for_exit(process, monitor))
        self._start_task("poll", lambda: self._poll(process, monitor))

    async def _wait_for_exit(self, process: Process, monitor: EngineMonitor) -> None:
        code = await process.wait()
        self._process = None
        await self._clean_up()
        crash_reason = self._engine.find_crash_reason(process.last_lines())
        if self.lifecycle.phase == "starting":
            self._shrink(crash_reason)
        self._inbox.put_nowait(Exited(code, crash_reason))

    async def _clean_up(self) -> None:
        shared_memory: frozenset[Path] = frozenset()
        if self.monitor is not None:
            shared_memory, self.monitor.shared_memory = self.monitor.shared_memory, frozenset()
        await self.process.clean_up(shared_memory)

    def _shrink(self, crash_reason: str) -> None:
        """When memory was too small, the next start is one with less."""
        less = self._engine.shrink_placement(self.placement, crash_reason)
        if less is None:
            return
        self.placement = less
        text = f"{less.model} is served with {less.reasons[-1]}; free memory and restart the node for the whole"
        self._status.warn("engine_shrunk", text, about=less.target)
        self._status.replace_target(self.target)

    # ---- what it reports ----

    async def _poll(self, process: Process, monitor: EngineMonitor) -> None:
        """As long as `process` lives: ask for its health while it starts, for its load once it is ready."""
        async with aclosing(self.process.connect()) as client:
            while True:
                is_starting = self.lifecycle.phase == "starting"
                event = await (self._ask_health(client, monitor) if is_starting else self._ask_load(client, monitor))
                if self._process is not process:
                    return
                if event is not None:
                    self._inbox.put_nowait(event)
                await asyncio.sleep(monitor.pause_seconds(self.lifecycle))

    async def _ask_health(self, client: EngineClient, monitor: EngineMonitor) -> Event | None:
        before = monitor.progress
        if await monitor.check_ready(client):
            self._check_abilities(monitor.abilities)
            # An engine whose load is unknown gets no requests: the first one after "ready" would overflow, and cost.
            await monitor.read_load(client, may_probe=False)
            self._load = monitor.load
            return Healthy()
        if monitor.progress != before:
            self._publish()
        return None

    async def _ask_load(self, client: EngineClient, monitor: EngineMonitor) -> Event:
        may_probe = self.lifecycle.phase == "ready" and not self._is_asleep
        event = await monitor.read_load(client, may_probe=may_probe)
        if isinstance(event, ProgressReport) and self.lifecycle.phase in ("ready", "stopping"):
            self._load = monitor.load
            self._publish()
        return event

    def _check_abilities(self, found: frozenset[str] | None) -> None:
        """Declared abilities that the engine does not find are not offered, and the health page says so."""
        self._abilities = found
        placement = self.placement
        lacking = sorted(placement.abilities - found) if found is not None else []
        if lacking:
            text = (
                f"{placement.model} is declared to be able to do {', '.join(lacking)}, and its engine finds that it "
                "cannot: no such request is sent to it; correct its abilities, or use a file with another chat template"
            )
            self._status.warn("abilities_differ", text, about=placement.target)
        else:
            self._status.clear("abilities_differ", about=placement.target)
        self._status.replace_target(self.target)

    async def _post(self, path: str) -> bool:
        async with aclosing(self.process.connect()) as client:
            return await client.post(path, {}, _SLEEP_SECONDS) == 200

    # ---- background tasks ----

    def _start_task(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work` as a task that outlives its own failures."""
        about = f"{name} {self.placement.target}"
        guarded = GuardedTask(about, lambda: self._run_task(work), self._status)
        task = asyncio.create_task(guarded.run(), name=about)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_task(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception as error:
            if self._process is None:
                # Whatever was under way has come to nothing; the life cycle must not wait for its end.
                self._inbox.put_nowait(Exited(None, repr(error)))
            raise
