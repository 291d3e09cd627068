"""Circuit breakers: a target that keeps failing is left alone for a while, then tried with one request. Pure."""

from dataclasses import dataclass, replace
from typing import Final

FAILURES_TO_OPEN: Final = 3
FIRST_COOL_DOWN_SECONDS: Final = 5.0
MAX_COOL_DOWN_SECONDS: Final = 300.0
"""Also the bound of what a Retry-After may ask for."""

PROBE_SECONDS: Final = 60.0
"""A probe that has told nothing for so long no longer keeps others from probing."""


@dataclass(frozen=True, slots=True)
class Breaker:
    """One target's standing. Closed while `open_until` is None; half open once `open_until` has passed."""

    failures: int = 0
    """In a row."""
    open_until: float | None = None
    probe_since: float | None = None
    """When the one request that may try was let through."""

    def blocked_until(self, now: float) -> float | None:
        """When this target may be tried again, or None where it may be tried now."""
        if self.open_until is None:
            return None
        if now < self.open_until:
            return self.open_until
        if self.probe_since is not None and now < self.probe_since + PROBE_SECONDS:
            return self.probe_since + PROBE_SECONDS
        return None


CLOSED: Final = Breaker()


def after_start(breaker: Breaker, now: float) -> Breaker:
    """A request is sent: where the breaker is half open it is the probe."""
    return breaker if breaker.open_until is None else replace(breaker, probe_since=now)


def after_failure(breaker: Breaker, now: float, *, retry_after_seconds: float | None = None) -> Breaker:
    """Opens after several failures in a row; at once where the target asked to be left alone or failed its probe.

    Each further failure doubles the cool-down, up to its bound.
    """
    failures = breaker.failures + 1
    asked = min(retry_after_seconds or 0.0, MAX_COOL_DOWN_SECONDS)
    if failures < FAILURES_TO_OPEN and not asked and breaker.open_until is None:
        return Breaker(failures)
    if asked and failures < FAILURES_TO_OPEN:
        return Breaker(failures, now + asked)
    doublings = min(max(0, failures - FAILURES_TO_OPEN), 10)
    cool_down = min(FIRST_COOL_DOWN_SECONDS * 2**doublings, MAX_COOL_DOWN_SECONDS)
    return Breaker(failures, now + max(asked, cool_down))


def after_nothing(breaker: Breaker) -> Breaker:
    """The request ended without telling anything of the target (cancelled, refused): the probe is free again."""
    return replace(breaker, probe_since=None)


class Breakers:
    """Every target's breaker. Written by the attempts alone, on the event loop."""

    def __init__(self) -> None:
        self._breakers: dict[str, Breaker] = {}
        self._rests: dict[str, float] = {}
        """Until when a target that answers well wants to be spared, having said that its limit is used up."""

    def get(self, target: str) -> Breaker:
        return self._breakers.get(target, CLOSED)

    def blocked_until(self, target: str, now: float) -> float | None:
        rests = self._rests.get(target)
        if rests is not None and now >= rests:
            del self._rests[target]
            rests = None
        blocked = self.get(target).blocked_until(now)
        return max((until for until in (rests, blocked) if until is not None), default=None)

    def rest(self, target: str, until: float) -> None:
        """A target that is well asked for no more until then."""
        self._rests[target] = max(until, self._rests.get(target, until))

    def start(self, target: str, now: float) -> None:
        if target in self._breakers:
            self._breakers[target] = after_start(self.get(target), now)

    def fail(self, target: str, now: float, retry_after_seconds: float | None) -> None:
        self._breakers[target] = after_failure(self.get(target), now, retry_after_seconds=retry_after_seconds)

    def succeed(self, target: str) -> None:
        self._breakers.pop(target, None)

    def release(self, target: str) -> None:
        if target in self._breakers:
            self._breakers[target] = after_nothing(self.get(target))
