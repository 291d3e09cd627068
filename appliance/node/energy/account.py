"""Divides the energy that meters counted beyond idling among the engines that worked meanwhile. Pure.

The result for each engine is its extra power while busy: joules that were counted, divided by the engine time that its
own token counters stand for. A request is charged its tokens' share of engine time by the same rates, so the sum over
requests is what the meters counted, whatever those rates are wrong by.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from appliance.node.energy.meters import CPU_METER, MeterReading

_MOST_WATTS: Final = 20_000.0
"""More than any one meter's device takes: then the counter is another device's, or began anew."""
_LONGEST_STEP_SECONDS: Final = 10.0
"""Power that was read further apart says nothing of what was between."""
_IDLE_KEPT: Final = 60
_IDLE_NEEDED: Final = 2
_FORGETTING_SECONDS: Final = 300.0
"""Busy time after which old measurements count for little: clocks, temperatures and models change."""
_LEAST_BUSY_SECONDS: Final = 1.0
"""Before so much work was metered, the result would be noise."""


@dataclass(frozen=True, slots=True)
class EngineWork:
    """What one engine did since the last sample."""

    target: str
    devices: frozenset[str] | None
    """GPUs it computes on; None: the processor."""
    is_active: bool
    """Whether it had work at either end, or its counters moved."""
    busy_seconds: float
    """Engine time that its tokens stand for."""
    cpu_seconds: float
    """Processor time of its processes."""
    is_ready: bool = True
    """False while it loads: that takes power, and no request is charged with it."""


def compute_joules(before: MeterReading, now: MeterReading, seconds: float) -> float | None:
    """What one meter counted; None if the two readings do not tell: the driver was loaded anew, or they are too far
    apart for a meter without a counter."""
    if seconds <= 0:
        return None
    joules: float | None = None
    if before.joules is not None and now.joules is not None:
        joules = now.joules - before.joules
        if joules < 0 and now.wraps_joules is not None:
            joules += now.wraps_joules
    elif before.watts is not None and now.watts is not None and seconds <= _LONGEST_STEP_SECONDS:
        joules = (before.watts + now.watts) / 2 * seconds
    if joules is None or joules < 0 or joules / seconds > _MOST_WATTS:
        return None
    return joules


@dataclass(slots=True)
class _Meter:
    """One meter's history: what it takes while nothing is done, and an interval of which that is not yet certain."""

    idle: deque[float] = field(default_factory=lambda: deque(maxlen=_IDLE_KEPT))
    quiet: int = 0
    """Quiet intervals in a row."""
    held: tuple[float, float] | None = None
    """Joules and seconds of the last quiet interval. Engines' counters are read a moment late, so that a quiet
    interval before a busy one may hold its beginning."""

    @property
    def idle_watts(self) -> float | None:
        """A low one of those seen: other programs use the machine, too."""
        if len(self.idle) < _IDLE_NEEDED:
            return None
        return sorted(self.idle)[len(self.idle) // 4]

    def record_idle(self, joules: float, seconds: float) -> None:
        self.quiet += 1
        if self.quiet > 2 and self.held is not None:
            self.idle.append(self.held[0] / self.held[1])
        self.held = joules, seconds

    def take_busy(self, joules: float, seconds: float) -> float | None:
        """Joules beyond idling, of a busy interval; None while the idle power is unknown."""
        idle = self.idle_watts
        held, self.held, self.quiet = self.held, None, 0
        if idle is None:
            return None
        extra = max(0.0, joules - idle * seconds)
        return extra if held is None else extra + max(0.0, held[0] - idle * held[1])

    def forget_interval(self) -> None:
        self.held, self.quiet = None, 0


@dataclass(slots=True)
class _Sum:
    joules: float = 0.0
    seconds: float = 0.0

    def add(self, joules: float, seconds: float) -> None:
        keep = math.exp(-seconds / _FORGETTING_SECONDS)
        self.joules, self.seconds = self.joules * keep + joules, self.seconds * keep + seconds


class EnergyAccount:
    """Takes samples and says what each engine draws while it is busy. Holds no clock and does no I/O."""

    def __init__(self) -> None:
        self._at: float | None = None
        self._before: dict[str, MeterReading] = {}
        self._meters: dict[str, _Meter] = {}
        self._sums: dict[str, _Sum] = {}

    def add_sample(
        self, at: float, readings: Sequence[MeterReading], works: Sequence[EngineWork], machine_cpu_seconds: float
    ) -> Mapping[str, float]:
        """Target -> extra watts while busy, for every engine of which enough was metered by now.

        `machine_cpu_seconds`: processor time of all programs since the last sample; of what the processors took, an
        engine is given its share of that.
        """
        seconds = 0.0 if self._at is None else at - self._at
        counted: dict[str, float] = {}
        for now in readings:
            before = self._before.get(now.meter)
            joules = None if before is None else compute_joules(before, now, seconds)
            if joules is not None:
                counted[now.meter] = joules
        self._at, self._before = at, {now.meter: now for now in readings}
        users = {work.target: _meters_of(work, readings) for work in works}
        spent: dict[str, Mapping[str, float] | None] = {}
        for name in {reading.meter for reading in readings} | self._meters.keys():
            using = [work for work in works if name in users[work.target]]
            spent[name] = self._split(name, counted.get(name), seconds, using, machine_cpu_seconds)
        for work in works:
            self._add_work(work, [spent.get(name) for name in users[work.target]])
        return self.watts

    @property
    def watts(self) -> Mapping[str, float]:
        return {
            target: total.joules / total.seconds
            for target, total in self._sums.items()
            if total.seconds >= _LEAST_BUSY_SECONDS
        }

    @property
    def idle_watts(self) -> Mapping[str, float]:
        """Meter -> what it counts while nothing is done, where that is known."""
        return {name: watts for name, meter in self._meters.items() if (watts := meter.idle_watts) is not None}

    def _split(
        self, name: str, joules: float | None, seconds: float, using: Sequence[EngineWork], machine_cpu_seconds: float
    ) -> Mapping[str, float] | None:
        """Of one meter and interval: joules for each target; None if it is unknown."""
        meter = self._meters.setdefault(name, _Meter())
        if joules is None:
            meter.forget_interval()
            return None
        if not any(work.is_active for work in using):
            meter.record_idle(joules, seconds)
            return {}
        extra = meter.take_busy(joules, seconds)
        if extra is None:
            return None
        of_cpu = name == CPU_METER
        shares = {work.target: work.cpu_seconds if of_cpu else work.busy_seconds for work in using}
        whole = max(machine_cpu_seconds, sum(shares.values())) if of_cpu else sum(shares.values())
        return {target: extra * share / whole for target, share in shares.items()} if whole > 0 else None

    def _add_work(self, work: EngineWork, shares: Sequence[Mapping[str, float] | None]) -> None:
        """Joules and the engine time they were used in belong together: either both are counted or neither."""
        if not (work.is_active and work.is_ready and shares) or any(one is None for one in shares):
            return
        joules = sum(share.get(work.target, 0.0) for share in shares if share is not None)
        self._sums.setdefault(work.target, _Sum()).add(joules, work.busy_seconds)


def _meters_of(work: EngineWork, readings: Sequence[MeterReading]) -> frozenset[str]:
    """Those that count what it does; empty if one of its devices has none, since a part is not the whole."""
    cpu = frozenset(reading.meter for reading in readings if reading.meter == CPU_METER)
    if work.devices is None:
        return cpu
    found = {device: reading.meter for reading in readings for device in work.devices & reading.covers}
    return frozenset(found.values()) | cpu if found.keys() == work.devices else frozenset()
