"""Keeps the planned engines alive: one keeper task for each, which feeds its life cycle and does as that says."""

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import structlog

from appliance.catalog import EngineKind
from appliance.config import Engine as EngineConfig
from appliance.core import EngineLoad, EngineView, Target
from appliance.engines.base import Engine, Placement
from appliance.errors import EngineFailed
from appliance.node.launcher import Launcher, Process
from appliance.node.lifecycle import (
    Action,
    Beat,
    Event,
    Exited,
    Healthy,
    Life,
    Limits,
    Phase,
    Start,
    Stop,
    Tick,
    Unhealthy,
    advance,
)
from appliance.node.planner import ENGINES
from appliance.node.signals import EngineLine, Signals
from appliance.node.sockets import SocketFolder

_STARTING_POLL_SECONDS: Final = 0.05
_BUSY_POLL_SECONDS: Final = 0.25
_IDLE_POLL_SECONDS: Final = 1.0
_AFTER_FAILURE_SECONDS: Final = 1.0
"""Pause before a control task that failed goes on, so that a lasting fault does not fill the log."""
_STOP_SLACK_SECONDS: Final = 10.0
_STARTS_THAT_TELL: Final = 3
"""So many starts failed in a row: waiting longer will not help."""

_log = structlog.get_logger(__name__)


class Supervisor:
    """Starts, watches, restarts and stops the engines of a plan."""

    def __init__(
        self,
        placements: Sequence[Placement],
        *,
        launcher: Launcher,
        signals: Signals,
        config: EngineConfig,
        drain_seconds: float,
        runtime_folder: Path,
        watts_per_busy_core: float | None = None,
        engines: Mapping[EngineKind, Engine] = ENGINES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`runtime_folder` is where the sockets are to lie; another one is taken where its path is too long."""
        self._signals, self._clock = signals, clock
        self._drain_seconds = drain_seconds
        self._folder = SocketFolder(runtime_folder)
        self._keepers = [
            Keeper(
                placement,
                engine=engines[placement.engine],
                launcher=launcher,
                signals=signals,
                socket=self._folder.path / f"{index}.sock",
                limits=Limits(
                    start_seconds=config.start_seconds,
                    stall_seconds=config.stall_seconds,
                    drain_seconds=drain_seconds,
                    permanent_exits=engines[placement.engine].permanent_exits,
                ),
                watts=None if watts_per_busy_core is None else watts_per_busy_core * placement.shape.threads,
                clock=clock,
            )
            for index, placement in enumerate(placements)
        ]

    @property
    def targets(self) -> tuple[Target, ...]:
        """The engines as rows that a policy can name."""
        return tuple(keeper.target for keeper in self._keepers)

    async def start(self) -> None:
        """Start all engines and return at once; `wait_ready` waits for them."""
        self._signals.set_engines(self.targets)
        for keeper in self._keepers:
            keeper.start()

    async def wait_ready(self, timeout_seconds: float) -> None:
        """Wait until every engine is ready.

        Raises EngineFailed with the engine's last words when one has failed for good, has failed three times in a row,
        or the time is over. The engines are left as they are: those that may still come up go on trying.
        """
        with contextlib.suppress(TimeoutError):  # who is not ready by then is told below
            async with asyncio.timeout(timeout_seconds):
                for keeper in self._keepers:
                    await keeper.wait_for(_is_decided)
        for keeper in self._keepers:
            if keeper.life.phase != "ready":
                reason = keeper.life.reason or f"not ready within {timeout_seconds:g} s"
                raise EngineFailed(f"the engine for {keeper.placement.model} {reason}")

    async def stop(self) -> None:
        """Drain and end all engines. Nothing of theirs is left when this returns."""
        for keeper in self._keepers:
            keeper.stop()
        try:
            async with asyncio.timeout(self._drain_seconds + _STOP_SLACK_SECONDS):
                for keeper in self._keepers:
                    await keeper.wait_for(lambda life: life.phase == "stopped")
        except TimeoutError:
            _log.warning("engines did not stop in time; they are killed")
        finally:
            for keeper in self._keepers:
                await keeper.aclose()
            self._folder.remove()


def _is_decided(life: Life) -> bool:
    return life.phase in ("ready", "failed") or (life.phase == "waiting" and life.restarts >= _STARTS_THAT_TELL - 1)


class Keeper:
    """One engine: its process, its life and what it last said. Everything runs on the event loop."""

    def __init__(
        self,
        placement: Placement,
        *,
        engine: Engine,
        launcher: Launcher,
        signals: Signals,
        socket: Path,
        limits: Limits,
        watts: float | None,
        clock: Callable[[], float],
    ) -> None:
        self.placement, self.life = placement, Life()
        self.target = Target(
            name=placement.target,
            location="onsite",
            dialect="openai",
            address=f"unix:{socket}",
            model=placement.model,
            abilities=placement.abilities,
            context_tokens=placement.shape.sequence_context_tokens,
            quality=placement.quality,
            variant=placement.variant,
        )
        self._engine, self._launcher, self._signals = engine, launcher, signals
        self._socket, self._limits, self._watts, self._clock = socket, limits, watts, clock
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._phase_changed = asyncio.Event()
        self._process: Process | None = None
        self._load: EngineLoad | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._show()  # a target without a view would be one that nobody knows anything of
        self._run("keeper", self._live)
        self._inbox.put_nowait(Start())

    def stop(self) -> None:
        self._inbox.put_nowait(Stop())

    async def wait_for(self, is_so: Callable[[Life], bool]) -> None:
        while not is_so(self.life):
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

    async def _live(self) -> None:
        """Take events as they come, or a Tick when the life asks for one."""
        while True:
            wake_at = self.life.wake_at
            timeout = None if wake_at is None else max(0.0, wake_at - self._clock())
            try:
                async with asyncio.timeout(timeout):
                    event: Event = await self._inbox.get()
            except TimeoutError:
                event = Tick()
            await self._take(event)

    async def _take(self, event: Event) -> None:
        before = self.life
        self.life, actions = advance(before, event, self._clock(), self._limits)
        if self.life.phase != before.phase:
            if self.life.phase != "ready":
                self._load = None
            self._tell(before.phase)
        for action in actions:
            await self._do(action)

    def _tell(self, before: Phase) -> None:
        """Publish the new phase first of all; then say it in words."""
        life, model = self.life, self.placement.model
        self._show()
        if life.state == "failed":
            self._signals.warn("engine_down", f"the engine for {model} {life.reason}", about=self.target.name)
        elif life.phase in ("ready", "stopped"):
            self._signals.clear("engine_down", about=self.target.name)
            for task in ("keeper", "poll", "exit"):
                self._signals.clear("control_task_failed", about=f"{task} {self.target.name}")
        level = _log.warning if life.state == "failed" else _log.info
        level("engine", model=model, phase=life.phase, was=before, reason=life.reason, restarts=life.restarts)
        changed, self._phase_changed = self._phase_changed, asyncio.Event()
        changed.set()

    def _show(self) -> None:
        view = EngineView(
            target=self.target.name,
            state=self.life.state,
            seen=self._clock(),
            load=self._load,
            watts=self._watts,
            restarts=self.life.restarts,
            reason=self.life.reason,
        )
        self._signals.show(view)

    async def _do(self, action: Action) -> None:
        match action:
            case "spawn":
                await self._spawn()
            case "terminate" if self._process is not None:
                self._process.terminate()
            case "kill" if self._process is not None:
                self._process.kill()

    async def _spawn(self) -> None:
        # Engines leave their socket behind, and some refuse to start where one lies.
        self._socket.unlink(missing_ok=True)
        try:
            process = await self._launcher.launch(
                self.placement.model,
                self._argv,
                self._engine.environment(self.placement, self._socket.parent),
            )
        except OSError as error:
            self._inbox.put_nowait(Exited(None, str(error)))
            return
        self._process = process
        self._run("exit", lambda: self._watch(process))
        self._run("poll", lambda: self._poll(process))

    def _argv(self, leash_fd: int) -> list[str]:
        return self._engine.argv(
            sys.executable,
            self.placement,
            socket=self._socket,
            leash_fd=leash_fd,
            drain_seconds=self._limits.drain_seconds,
        )

    async def _watch(self, process: Process) -> None:
        code = await process.wait()
        self._process = None
        self._inbox.put_nowait(Exited(code, self._engine.last_words(process.last_lines())))

    async def _poll(self, process: Process) -> None:
        """As long as `process` lives: ask for its health while it starts, for its load once it is ready."""
        async with aclosing(EngineLine(self._socket)) as line:
            while True:
                event = await (self._ask_health(line) if self.life.phase == "starting" else self._ask_load(line))
                if self._process is not process:
                    return
                if event is not None:
                    self._inbox.put_nowait(event)
                await asyncio.sleep(self._pause_seconds())

    async def _ask_health(self, line: EngineLine) -> Event | None:
        return Healthy() if await line.health_problem() is None else None

    async def _ask_load(self, line: EngineLine) -> Event:
        answer = await line.load()
        if isinstance(answer, str):
            return Unhealthy(answer)
        if self.life.phase in ("ready", "stopping"):
            self._load = answer
            self._show()
        return Beat(answer.steps, has_work=answer.queued_requests + answer.running_sequences > 0)

    def _pause_seconds(self) -> float:
        if self.life.phase == "starting":
            return _STARTING_POLL_SECONDS
        load = self._load
        busy = load is not None and load.queued_requests + load.running_sequences > 0
        return _BUSY_POLL_SECONDS if busy else _IDLE_POLL_SECONDS

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
                self._signals.warn("control_task_failed", text, about=f"{name} {self.target.name}")
                if self._process is None:
                    # Whatever was under way has come to nothing; the life must not wait for its end.
                    self._inbox.put_nowait(Exited(None, repr(error)))
                await asyncio.sleep(_AFTER_FAILURE_SECONDS)
