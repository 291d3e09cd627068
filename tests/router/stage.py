"""A scene with one stand-in engine and one stand-in provider."""

import asyncio
from typing import Any

from appliance.core import TimeLimits
from appliance.router.capacity.request_load import RequestLoad
from appliance.router.capacity.target_queue import Slot
from tests.router.scene import LOCAL_FIRST, Scene, engine_target, hosted_target
from tests.standin import StandIn


class Stage(Scene):
    """A scene with one engine and one provider, both stand-ins."""

    def __init__(self, engine: StandIn, provider: StandIn, policy: str = LOCAL_FIRST, **limits: Any) -> None:
        self.engine, self.provider = engine, provider
        hosted = hosted_target(provider.address, limits=TimeLimits(**{"connect_seconds": 2.0, **limits}))
        super().__init__(engine_target(engine.address), hosted, policy=policy)

    async def fill_engine(self) -> list[Slot]:
        """Take every place that the engine has, with work for many seconds."""
        loads = [RequestLoad(2000, 4000), *[RequestLoad(10, 10)] * 5]
        return [
            await self.admission.enter(self.targets[0], load, is_residency_bound=False, wait_seconds=0)
            for load in loads
        ]


async def settled() -> None:
    """Let every task run as far as it can."""
    for _ in range(200):
        await asyncio.sleep(0)


def attempts(stage: Scene) -> list[tuple[str, str]]:
    return [(attempt.target, attempt.result) for attempt in stage.ledger.outcomes[-1].attempts]
