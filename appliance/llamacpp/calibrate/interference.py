"""Whether other programs used the cores during a measurement: how long our threads were ready and had to wait.

The kernel keeps that for every thread. Comparing CPU time with wall time would not show it: threads that wait for each
other sleep, so that a step which nobody disturbs gets less than its share of CPU time as well. But CPU time says what a
disturbed step took of the cores, whatever else ran in between.
"""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TASKS: Final = Path("/proc/self/task")
_STAT: Final = Path("/proc/stat")
_STEAL_FIELD: Final = 8
"""Of the first line of /proc/stat, counted from its name: ticks the hypervisor gave to other machines."""


@dataclass(frozen=True, slots=True)
class InterferenceSample:
    seconds: float
    cpu_seconds: float
    """Of all threads of this process together."""
    waited_seconds: float | None
    """Of all threads of this process together, ready to run and not running. None where the system does not say."""

    @property
    def waited_share(self) -> float | None:
        """A thread that waits holds up all the others, so this is about the share of the time that was lost."""
        return None if self.waited_seconds is None else min(1.0, self.waited_seconds / max(self.seconds, 1e-9))


class InterferenceStopwatch:
    """Times pieces of work and the waiting in them."""

    def __init__(self) -> None:
        self._tells = (_TASKS / str(os.getpid()) / "schedstat").is_file()
        self.start()

    def start(self) -> None:
        self._waited = self._waited_seconds()
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def lap(self) -> InterferenceSample:
        """The time since `start` or the last lap."""
        now, cpu = time.perf_counter(), time.process_time()
        waited = self._waited_seconds()
        known = None if waited is None or self._waited is None else max(0.0, waited - self._waited)
        lap = InterferenceSample(now - self._began, cpu - self._cpu, known)
        self._waited = waited
        self._began, self._cpu = time.perf_counter(), time.process_time()
        return lap

    def _waited_seconds(self) -> float | None:
        if not self._tells:
            return None
        total = 0
        for task in os.listdir(_TASKS):
            with suppress(OSError, IndexError, ValueError):  # a thread may end meanwhile
                total += int((_TASKS / task / "schedstat").read_text().split()[1])
        return total / 1e9


def read_stolen_seconds() -> float | None:
    """CPU time the hypervisor has given to other machines since this one started; None where unknown."""
    try:
        first = _STAT.read_text().split("\n", 1)[0].split()
        return int(first[_STEAL_FIELD]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def read_load_average() -> float | None:
    """Processes that ran or wanted to, over the last minute."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None
