"""Carries out swap decisions: loads models on demand, unloads those that are idle or occupy memory others need."""

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Final

import structlog

from appliance.node.plan.swap import LoadedModel, Residence, SwapMove, SwapRules, decide_swaps, list_memory_pools
from appliance.node.supervise.engine_supervisor import EngineSupervisor
from appliance.node.supervise.supervisor import Supervisor
from appliance.state import State

_LOOK_SECONDS: Final = 0.5

_log = structlog.get_logger(__name__)


class Swapper:
    """Runs beside the supervisor, on the event loop."""

    def __init__(
        self,
        supervisor: Supervisor,
        state: State,
        clock: Callable[[], float],
        pools: Mapping[str, int],
        rules: SwapRules,
        models: Collection[str],
    ) -> None:
        """`models` are those that take turns. Engines that were added by other code are left alone."""
        self._supervisor, self._state, self._clock = supervisor, state, clock
        self._pools, self._rules, self._models = pools, rules, frozenset(models)
        self._seen: dict[str, tuple[Residence, float]] = {}
        self._unloading: set[str] = set()

    async def run(self) -> None:
        """Look and act until cancelled."""
        async with asyncio.TaskGroup() as moving:
            while True:
                for move in self.decide_moves():
                    moving.create_task(self._make(move))
                await asyncio.sleep(_LOOK_SECONDS)

    def decide_moves(self) -> tuple[SwapMove, ...]:
        """The moves to make now."""
        now = self._clock()
        engines = [engine for engine in self._supervisor.engines if engine.placement.model in self._models]
        models = [self._describe(engine, now) for engine in engines]
        return decide_swaps(now, models, self._pools, self._rules)

    async def _make(self, move: SwapMove) -> None:
        engine = next((one for one in self._supervisor.engines if one.placement.model == move.model), None)
        if engine is None:
            return
        _log.info("model", model=move.model, move=move.kind, reason=move.reason)
        if move.kind == "load":
            await engine.wake()
            return
        self._unloading.add(move.model)
        try:
            await engine.unload(f"{move.reason}; loaded again when wanted")
        finally:
            self._unloading.discard(move.model)

    def _describe(self, engine: EngineSupervisor, now: float) -> LoadedModel:
        placement, target = engine.placement, engine.placement.target
        residence: Residence = "loaded"
        if placement.model in self._unloading or not (engine.is_unloaded or engine.lifecycle.phase == "ready"):
            residence = "moving"
        elif engine.is_unloaded:
            residence = "unloaded"
        before, since = self._seen.get(placement.model, ("", now))
        if before != residence:
            since = now
            self._seen[placement.model] = (residence, now)
        return LoadedModel(
            model=placement.model,
            pools=list_memory_pools(placement),
            bytes=placement.memory.total_bytes,
            residence=residence,
            since=since,
            used_at=self._state.used.get(target, 0.0),
            is_busy=engine.is_busy,
            requested_at=self._state.demand.get(target),
        )
