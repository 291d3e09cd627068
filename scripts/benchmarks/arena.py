"""Where contenders meet: starts servers when they are needed, has them take turns, and keeps time."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp
import psutil

from scripts.benchmarks.measuring import Series, turns
from scripts.benchmarks.peers.base import Peer
from scripts.benchmarks.peers.installing import PeerMissing, Say
from scripts.benchmarks.peers.processes import Server, Setup

RUN_SECONDS = 180.0
"""No run may take longer; on an idle machine the slowest takes about 15."""
WARM_UP_SHARE = 0.125
FAILURES = (RuntimeError, aiohttp.ClientError, OSError, LookupError, psutil.Error)
"""What a server or the way to it can do wrong."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way of doing the work. `run` is given a seed and how much of the work to do, and returns the figure."""

    name: str
    run: Callable[[int, float], Awaitable[float]]
    share: float = 1.0
    """Slow ones get less work: their figure is a rate as well."""


@dataclass(slots=True)
class Arena:
    peers: Mapping[str, Peer]
    say: Say
    runs: int
    budget_seconds: float
    began: float = field(default_factory=time.monotonic)
    missing: dict[str, str] = field(default_factory=dict)
    """Peers that are not here, and why."""
    failures: list[str] = field(default_factory=list)
    _running: dict[str, tuple[Setup, Server, contextlib.AsyncExitStack]] = field(default_factory=dict)

    async def server(self, name: str, setup: Setup) -> Server | None:
        """The peer, running as asked; None where it is not wanted or not here."""
        peer = self.peers.get(name)
        if peer is None or name in self.missing:
            return None
        if name in self._running:
            known, server, _ = self._running[name]
            if known == setup:
                return server
            await self.stop(name)
        stack = contextlib.AsyncExitStack()
        try:
            peer.prepare(self.say)
            server = await stack.enter_async_context(peer.start(setup))
        except (PeerMissing, *FAILURES) as error:
            await stack.aclose()
            self.missing[name] = str(error)
            self.say(f"{name} is left out: {error}")
            return None
        variant = setup.model.stem.rpartition("-")[2] if setup.model else "its own weights"
        self.say(f"{name} is ready after {server.seconds_to_ready:.1f} s ({variant}, {setup.threads} threads)")
        self._running[name] = (setup, server, stack)
        return server

    async def stop(self, name: str) -> None:
        if name in self._running:
            _, _, stack = self._running.pop(name)
            await stack.aclose()

    async def aclose(self) -> None:
        for name in list(self._running):
            await self.stop(name)

    async def race(self, work: str, contenders: Sequence[Contender]) -> dict[str, Series]:
        """All contenders' figures, in turns, after a warm-up each. One that fails is left out, and that is said."""
        values: dict[str, list[float]] = {}
        for contender in contenders:
            if await self._try(work, contender, 0, WARM_UP_SHARE) is not None:
                values[contender.name] = []
        left = [contender for contender in contenders if contender.name in values]
        for run, contender in turns(left, self.runs_left()):
            if contender.name not in values:
                continue
            value = await self._try(work, contender, run, 1.0)
            if value is None:
                del values[contender.name]
                continue
            values[contender.name].append(value)
            self.say(f"{work}: run {run}: {contender.name}: {value:.2f}")
        return {name: Series(name, tuple(found)) for name, found in values.items() if found}

    def runs_left(self) -> int:
        """As many runs as wanted, or one when the time is nearly used up."""
        spent = time.monotonic() - self.began
        if self.runs > 1 and spent > 0.85 * self.budget_seconds:
            self.say(f"{spent:.0f} s of {self.budget_seconds:.0f} s are used: one run for each from here on")
            return 1
        return self.runs

    async def trial(self, work: str, contender: Contender, limit_seconds: float, seed: int = 0) -> float | None:
        """One figure, to choose by; None where it fails or takes longer. A text of the same `seed` may be cached."""
        return await self._try(work, contender, seed, 1.0, limit_seconds)

    async def _try(
        self, work: str, contender: Contender, seed: int, share: float, limit_seconds: float = RUN_SECONDS
    ) -> float | None:
        try:
            async with asyncio.timeout(limit_seconds):
                return await contender.run(seed, share * contender.share)
        except FAILURES as error:
            reason = f"took more than {limit_seconds:.0f} s" if isinstance(error, TimeoutError) else repr(error)[:300]
            self.failures.append(f"{work}: {contender.name}: {reason}")
            self.say(self.failures[-1])
            return None
