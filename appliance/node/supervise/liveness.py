"""Whether an engine still computes, where its own health page and gauges cannot be believed. Pure."""

from typing import Final

_LONGEST_QUIET_SECONDS: Final = 15.0


class Liveness:
    """An engine whose counters stand still is asked for one token now and then; until they move it counts as having
    work, so that a hung one is found by the same rule as any other: work waits and no step is done."""

    def __init__(self, stall_seconds: float) -> None:
        """Asked often enough that a hang is noticed within about `stall_seconds` and a quarter."""
        self._every_seconds = min(_LONGEST_QUIET_SECONDS, stall_seconds / 4)
        self._steps: int | None = None
        self._quiet_since = 0.0
        self._asked_at: float | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether a probe has had no answer yet."""
        return self._asked_at is not None

    def saw(self, steps: int, now: float) -> None:
        """The engine's counter of steps at `now`."""
        if steps != self._steps:
            self._steps = steps
            self.moved(now)

    def moved(self, now: float) -> None:
        """It has computed something, as a probe's answer or the counters tell."""
        self._quiet_since, self._asked_at = now, None

    def is_due(self, now: float) -> bool:
        return now - (self._quiet_since if self._asked_at is None else self._asked_at) >= self._every_seconds

    def asked(self, now: float) -> None:
        self._asked_at = now
