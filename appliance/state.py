"""Where the two planes meet: the control plane publishes snapshots, requests read them and leave their demand."""

import asyncio
from collections.abc import Callable

from appliance.core import Snapshot


class State:
    """One frozen snapshot, replaced whole. All methods are called on the event loop; nothing here blocks.

    Writers: the control plane alone calls `publish`; requests alone call `want` and `use`.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._snapshot = Snapshot(at=clock())
        self._changed = asyncio.Event()
        self.demand: dict[str, float] = {}
        """Target name -> when a request last wanted it and could not have it (monotonic seconds)."""
        self.used: dict[str, float] = {}
        """Target name -> when a request was last let in."""

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    def publish(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def want(self, target: str) -> None:
        self.demand[target] = self._clock()

    def use(self, target: str) -> None:
        self.used[target] = self._clock()

    async def wait_for_change(self, timeout_seconds: float) -> bool:
        """Wait for the next publish. True if there was one, False if the time ran out."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True
