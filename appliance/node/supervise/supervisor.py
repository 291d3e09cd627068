"""Keeps the planned engines alive: one keeper for each; engines may come and go while the node runs."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import structlog

from appliance.catalog import EngineKind
from appliance.config import EngineSettings as EngineConfig
from appliance.core import Target
from appliance.engines.base import EngineAdapter, Placement
from appliance.errors import EngineFailed
from appliance.node.plan.planner import ENGINE_ADAPTERS
from appliance.node.supervise import orphans
from appliance.node.supervise.engine_supervisor import EngineSupervisor, SupervisorDeps
from appliance.node.supervise.launcher import Launcher
from appliance.node.supervise.lifecycle import EngineLifecycle
from appliance.node.supervise.sockets import SocketFolder
from appliance.node.supervise.status import StatusPublisher

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
        signals: StatusPublisher,
        config: EngineConfig,
        drain_seconds: float,
        runtime_folder: Path,
        watts_per_busy_core: float | None = None,
        engines: Mapping[EngineKind, EngineAdapter] = ENGINE_ADAPTERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`runtime_folder` is where the sockets are to lie; another one is taken where its path is too long."""
        self._signals, self._drain_seconds, self._engines = signals, drain_seconds, engines
        self._folder = SocketFolder(runtime_folder)
        self._around = SupervisorDeps(
            launcher=launcher,
            signals=signals,
            clock=clock,
            home=runtime_folder,
            stall_seconds=config.stall_seconds,
            start_seconds=config.start_seconds,
            drain_seconds=drain_seconds,
            watts_per_busy_core=watts_per_busy_core,
        )
        self._made = 0
        self._keepers = [self._keeper(placement) for placement in placements]

    @property
    def targets(self) -> tuple[Target, ...]:
        """The engines as rows that a policy can name."""
        return tuple(keeper.target for keeper in self._keepers)

    @property
    def engines(self) -> Sequence[EngineSupervisor]:
        return tuple(self._keepers)

    @property
    def progress(self) -> Mapping[str, str]:
        """What engines that are starting are doing, by model."""
        return {keeper.placement.model: keeper.progress for keeper in self._keepers if keeper.progress}

    async def start(self, resting: Mapping[str, str] | None = None) -> None:
        """Start all engines and return at once; `wait_ready` waits for them. `resting`: models that are to be loaded
        only when they are wanted, and why."""
        ended = await asyncio.to_thread(self._end_orphans)
        if ended:
            _log.warning("engines of an earlier run were still there; they were ended", pids=ended)
        self._signals.set_engine_targets(self.targets)
        for keeper in self._keepers:
            keeper.begin(resting=(resting or {}).get(keeper.placement.model, ""))

    def _end_orphans(self) -> Sequence[int]:
        found = {
            *orphans.find_marked_processes(orphans.format_engine_mark(self._around.home)),
            *orphans.find_vllm_leftovers(self._folder.left_sessions),
        }
        return orphans.kill_processes(sorted(found))

    def add(self, placement: Placement) -> EngineSupervisor:
        """Keep one more engine from now on. It is started at once; its view in the snapshot tells how it goes.

        Raises EngineFailed where the model is served already, or no engine of its kind can be launched here.
        """
        if any(keeper.placement.model == placement.model for keeper in self._keepers):
            raise EngineFailed(f"{placement.model} is served already; remove it first")
        if placement.engine not in self._engines:
            raise EngineFailed(f"{placement.model} needs the engine {placement.engine}, which cannot be launched here")
        keeper = self._keeper(placement)
        self._keepers.append(keeper)
        self._signals.set_engine_targets(self.targets)
        keeper.begin()
        return keeper

    async def remove(self, model: str) -> None:
        """Drain and end one engine, and forget its target. Unknown names are no matter."""
        for keeper in [one for one in self._keepers if one.placement.model == model]:
            await self._end([keeper])
            self._keepers.remove(keeper)
            self._signals.set_engine_targets(self.targets)

    async def wait_ready(self, timeout_seconds: float) -> None:
        """Wait until every engine is ready that is to run.

        Raises EngineFailed with the engine's last words when one has failed for good, has failed three times in a row,
        or the time is over. The engines are left as they are: those that may still come up go on trying.
        """
        wanted = [keeper for keeper in self._keepers if not keeper.is_unloaded]
        with contextlib.suppress(TimeoutError):  # who is not ready by then is told below
            async with asyncio.timeout(timeout_seconds):
                for keeper in wanted:
                    await keeper.wait_for(_is_decided)
        for keeper in wanted:
            if keeper.lifecycle.phase != "ready":
                reason = keeper.lifecycle.reason or f"not ready within {timeout_seconds:g} s"
                raise EngineFailed(f"the engine for {keeper.placement.model} {reason}")

    async def stop(self) -> None:
        """Drain and end all engines. Nothing of theirs is left when this returns."""
        try:
            await self._end(self._keepers)
        finally:
            self._folder.remove()

    async def _end(self, keepers: Sequence[EngineSupervisor]) -> None:
        for keeper in keepers:
            keeper.stop()
        try:
            async with asyncio.timeout(self._drain_seconds + _STOP_SLACK_SECONDS):
                for keeper in keepers:
                    await keeper.wait_for(lambda life: life.phase == "stopped")
        except TimeoutError:
            _log.warning("engines did not stop in time; they are killed")
        finally:
            for keeper in keepers:
                await keeper.aclose()

    def _keeper(self, placement: Placement) -> EngineSupervisor:
        folder = self._folder.path / str(self._made)
        self._made += 1
        return EngineSupervisor(placement, self._engines[placement.engine], folder, self._around)


def _is_decided(life: EngineLifecycle) -> bool:
    return life.phase in ("ready", "failed") or (life.phase == "waiting" and life.restarts >= _STARTS_THAT_TELL - 1)
