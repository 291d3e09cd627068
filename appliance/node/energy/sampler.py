"""Reads the meters every few seconds while a node runs, and publishes what each engine draws while it is busy.

Nothing here is in a request's way: meters are read in a thread, and a request finds the result in its snapshot.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import structlog

from appliance.core import CostBasis, EngineLoad
from appliance.engines.rates import estimate_busy_seconds
from appliance.node.energy.account import EnergyAccount, EngineWork
from appliance.node.energy.meters import MeterReading, NvmlMeters, RaplMeters, find_rapl
from appliance.node.supervise.engine_supervisor import EngineSupervisor
from appliance.node.supervise.status import StatusPublisher

SAMPLE_SECONDS: Final = 2.0
_LIST_PROCESSES_SECONDS: Final = 30.0
"""How often an engine's processes are listed: that goes through all of the machine's."""

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class EnergyMeters:
    """Every meter that this machine has and this program may read. Blocking; not for several threads at once."""

    gpus: NvmlMeters
    cpu: RaplMeters

    @classmethod
    def open(cls, nvml: Any | None, root: Path = Path("/")) -> "EnergyMeters":
        rapl = find_rapl(root)
        _log.info("power meters", cpu=rapl.reason, gpus="NVML" if nvml is not None else "no driver")
        return cls(NvmlMeters(nvml), RaplMeters(rapl))

    def read(self) -> Sequence[MeterReading]:
        return (*self.gpus.read(), *self.cpu.read())

    def close(self) -> None:
        self.gpus.close()


@dataclass(slots=True)
class _LastSample:
    """An engine as it was at the last sample."""

    pid: int | None = None
    load: EngineLoad | None = None
    processes: Mapping[int, tuple[psutil.Process, float]] = field(default_factory=dict)
    """By number, with the processor time that it had used."""
    listed_at: float = -_LIST_PROCESSES_SECONDS


class EnergySampler:
    """Combines what meters and engines report and adds it to the energy account."""

    def __init__(
        self,
        engines: Callable[[], Sequence[EngineSupervisor]],
        status: StatusPublisher,
        meters: EnergyMeters,
        clock: Callable[[], float] = time.monotonic,
        machine_cpu_seconds: Callable[[], float] | None = None,
    ) -> None:
        self._engines, self._status, self._meters, self._clock = engines, status, meters, clock
        self._machine_cpu_seconds = machine_cpu_seconds or _machine_cpu_seconds
        self._account = EnergyAccount()
        self._known: dict[str, _LastSample] = {}
        self._cpu_before = 0.0

    async def run(self, seconds: float = SAMPLE_SECONDS) -> None:
        """Sample until cancelled. The caller closes the meters."""
        while True:
            await self.sample()
            await asyncio.sleep(seconds)

    async def sample(self) -> None:
        """Read everything once, and publish."""
        now = self._clock()
        engines = list(self._engines())
        readings, spent, machine = await asyncio.to_thread(self._read, [(one.target.name, one.pid) for one in engines])
        works = [self._describe_work(engine, spent.get(engine.target.name, 0.0)) for engine in engines]
        self._known = {name: known for name, known in self._known.items() if name in {one.target for one in works}}
        watts: dict[str, tuple[float, CostBasis]] = {}
        for work in works:
            limits = [one.limit_watts for one in readings if work.devices and work.devices & one.covers]
            if limits and all(limits):
                # Until it is metered: unknown is not free, and a GPU takes what it is allowed to.
                watts[work.target] = sum(limit for limit in limits if limit), "assumed"
        for target, metered in self._account.add_sample(now, readings, works, machine).items():
            watts[target] = round(metered, 3), "measured"
        self._status.set_watts(watts)

    def _describe_work(self, engine: EngineSupervisor, cpu_seconds: float) -> EngineWork:
        name, load, gpu = engine.target.name, engine.load, engine.placement.gpu
        known = self._known.setdefault(name, _LastSample())
        before, known.load = known.load, load
        is_starting = engine.pid is not None and load is None
        seconds, moved = 0.0, False
        if load is not None and before is not None:
            prefilled = load.prefill_tokens_total - before.prefill_tokens_total
            written = load.decode_tokens_total - before.decode_tokens_total
            moved = load.steps != before.steps
            if prefilled >= 0 and written >= 0:  # else it has been started anew
                seconds = estimate_busy_seconds(load, prefilled, written) or 0.0
        return EngineWork(
            target=name,
            devices=None if gpu is None else frozenset(gpu.devices),
            is_active=is_starting or engine.is_busy or moved,
            busy_seconds=seconds,
            cpu_seconds=cpu_seconds,
            is_ready=load is not None and before is not None,
        )

    def _read(
        self, engines: Sequence[tuple[str, int | None]]
    ) -> tuple[Sequence[MeterReading], Mapping[str, float], float]:
        readings = self._meters.read()
        has_cpu_meter = any(not one.covers for one in readings)
        machine, before = self._machine_cpu_seconds() if has_cpu_meter else 0.0, self._cpu_before
        self._cpu_before = machine
        spent = {name: self._cpu_of(name, pid) for name, pid in engines} if has_cpu_meter else {}
        return readings, spent, max(0.0, machine - before) if before else 0.0

    def _cpu_of(self, name: str, pid: int | None) -> float:
        """Processor seconds of an engine's processes since the last sample."""
        known, now = self._known.setdefault(name, _LastSample()), time.monotonic()
        if pid is None:
            known.pid, known.processes = None, {}
            return 0.0
        processes = {number: process for number, (process, _) in known.processes.items()}
        if pid != known.pid or now - known.listed_at >= _LIST_PROCESSES_SECONDS:
            known.pid, known.listed_at = pid, now
            with contextlib.suppress(psutil.Error):
                leader = psutil.Process(pid)
                processes = {one.pid: one for one in (leader, *leader.children(recursive=True))}
        spent, kept = 0.0, {}
        for number, process in processes.items():
            with contextlib.suppress(psutil.Error):
                used = process.cpu_times()
                total = used.user + used.system
                spent += max(0.0, total - known.processes[number][1]) if number in known.processes else 0.0
                kept[number] = process, total
        known.processes = kept
        return spent


def _machine_cpu_seconds() -> float:
    """Processor time of everything that runs on this machine, since it was started."""
    used = psutil.cpu_times()
    idle = used.idle + getattr(used, "iowait", 0.0)
    counted_twice = getattr(used, "guest", 0.0) + getattr(used, "guest_nice", 0.0)
    return float(sum(used) - idle - counted_twice)
