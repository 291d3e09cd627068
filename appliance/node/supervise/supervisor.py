"""Keeps the planned engines running; engines may be added and removed while the node runs."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Final

import structlog

from appliance.catalog import EngineKind
from appliance.core import Target
from appliance.engines.base import EngineAdapter, Placement
from appliance.errors import EngineFailed
from appliance.node.plan.planner import ENGINE_ADAPTERS
from appliance.node.supervise import orphans
from appliance.node.supervise.deps import SupervisorDeps
from appliance.node.supervise.engine_supervisor import EngineSupervisor
from appliance.node.supervise.lifecycle import EngineLifecycle
from appliance.node.supervise.sockets import SocketFolder

_STOP_SLACK_SECONDS: Final = 10.0
_CONCLUSIVE_STARTS: Final = 3
"""After so many failed starts in a row, waiting longer will not help."""

_log = structlog.get_logger(__name__)


class Supervisor:
    """Starts, watches, restarts and stops the engines of a plan."""

    def __init__(
        self,
        placements: Sequence[Placement],
        deps: SupervisorDeps,
        adapters: Mapping[EngineKind, EngineAdapter] = ENGINE_ADAPTERS,
    ) -> None:
        """The sockets lie in `deps.runtime_folder`, or in another folder when its path is too long for them."""
        self._deps, self._adapters = deps, adapters
        self._folder = SocketFolder(deps.runtime_folder)
        self._made = 0
        self._engines = [self._make(placement) for placement in placements]

    @property
    def targets(self) -> tuple[Target, ...]:
        """The engines as rows that a policy can name."""
        return tuple(engine.target for engine in self._engines)

    @property
    def engines(self) -> Sequence[EngineSupervisor]:
        return tuple(self._engines)

    @property
    def progress(self) -> Mapping[str, str]:
        """What engines that are starting are doing, by model."""
        return {engine.placement.model: engine.progress for engine in self._engines if engine.progress}

    async def start(self, unloaded: Mapping[str, str] | None = None) -> None:
        """Start all engines and return at once; `wait_ready` waits for them.

        `unloaded`: models that are loaded only on demand, and why.
        """
        ended = await asyncio.to_thread(self._end_orphans)
        if ended:
            _log.warning("engines of an earlier run were still there; they were ended", pids=ended)
        self._publish_targets()
        for engine in self._engines:
            engine.begin(unload_reason=(unloaded or {}).get(engine.placement.model, ""))

    def add(self, placement: Placement) -> EngineSupervisor:
        """Supervise one more engine from now on. It is started at once; its status in the snapshot tells how it goes.

        Raises EngineFailed when the model is served already, or no engine of its kind can be launched here.
        """
        if any(engine.placement.model == placement.model for engine in self._engines):
            raise EngineFailed(f"{placement.model} is served already; remove it first")
        if placement.engine not in self._adapters:
            raise EngineFailed(f"{placement.model} needs the engine {placement.engine}, which cannot be launched here")
        engine = self._make(placement)
        self._engines.append(engine)
        self._publish_targets()
        engine.begin()
        return engine

    async def remove(self, model: str) -> None:
        """Drain and end one engine, and forget its target. Unknown names are ignored."""
        for engine in [one for one in self._engines if one.placement.model == model]:
            await self._end([engine])
            self._engines.remove(engine)
            self._publish_targets()

    async def wait_ready(self, timeout_seconds: float) -> None:
        """Wait until every engine is ready that is to run.

        Raises EngineFailed with the crash reason when an engine has failed for good, has failed three times in a row,
        or the time is over. The engines are left as they are: those that may still come up go on trying.
        """
        awaited = [engine for engine in self._engines if not engine.is_unloaded]
        with contextlib.suppress(TimeoutError):  # engines that are not ready by then raise below
            async with asyncio.timeout(timeout_seconds):
                for engine in awaited:
                    await engine.wait_for(_is_decided)
        for engine in awaited:
            if engine.lifecycle.phase != "ready":
                reason = engine.lifecycle.reason or f"not ready within {timeout_seconds:g} s"
                raise EngineFailed(f"the engine for {engine.placement.model} {reason}")

    async def stop(self) -> None:
        """Drain and end all engines. Nothing of theirs is left when this returns."""
        try:
            await self._end(self._engines)
        finally:
            self._folder.remove()

    async def _end(self, engines: Sequence[EngineSupervisor]) -> None:
        for engine in engines:
            engine.stop()
        try:
            async with asyncio.timeout(self._deps.drain_seconds + _STOP_SLACK_SECONDS):
                for engine in engines:
                    await engine.wait_for(lambda lifecycle: lifecycle.phase == "stopped")
        except TimeoutError:
            _log.warning("engines did not stop in time; they are killed")
        finally:
            for engine in engines:
                await engine.aclose()

    def _make(self, placement: Placement) -> EngineSupervisor:
        folder = self._folder.path / str(self._made)
        self._made += 1
        return EngineSupervisor(placement, self._adapters[placement.engine], folder, self._deps)

    def _publish_targets(self) -> None:
        self._deps.status.set_engine_targets(self.targets)

    def _end_orphans(self) -> Sequence[int]:
        mark = orphans.format_engine_mark(self._deps.runtime_folder)
        leftovers = orphans.find_vllm_leftovers(self._folder.orphaned_sessions)
        return orphans.kill_processes(sorted({*orphans.find_marked_processes(mark), *leftovers}))


def _is_decided(lifecycle: EngineLifecycle) -> bool:
    has_failed = lifecycle.phase == "waiting" and lifecycle.restarts >= _CONCLUSIVE_STARTS - 1
    return lifecycle.phase in ("ready", "failed") or has_failed
