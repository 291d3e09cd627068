"""One engine's life cycle as a pure state machine: (state, event, now) -> next state and actions. No clock, no process.

    stopped --Start--> starting --Healthy--> ready --Stop--> stopping --Exited--> stopped
                          |                    |                 +--drain over--> killing
                          +--too long, hung----+--> killing --Exited--> waiting --Tick--> starting
                          +--exit 2 or 3, a start that cannot succeed--> failed

An exit that nobody asked for is a crash, whatever its code: engines have been seen to die with 0.
"""

from dataclasses import dataclass, replace
from typing import Final, Literal

from appliance.core import EngineState

Phase = Literal["stopped", "starting", "ready", "stopping", "killing", "waiting", "failed"]
Action = Literal["spawn", "terminate", "kill"]

_FIRST_BACK_OFF_SECONDS: Final = 0.5
_MOST_BACK_OFF_SECONDS: Final = 30.0
_GOOD_RUN_SECONDS: Final = 60.0
"""An engine that was ready this long has earned a quick restart again."""
_LONGEST_GAP_SECONDS: Final = 5.0
"""Between two looks no more than this counts as stalled: a paused machine must not look like a hung engine."""


@dataclass(frozen=True, slots=True)
class LifecycleLimits:
    start_seconds: float = 300.0
    stall_seconds: float = 60.0
    """Work waits and no step is done for this long: hung."""
    unhealthy_seconds: float = 20.0
    """It answers nothing at all for this long: hung."""
    drain_seconds: float = 30.0
    """From SIGTERM to SIGKILL."""
    permanent_exits: frozenset[int] = frozenset({2, 3})
    """Exit codes before readiness that another start cannot mend."""


@dataclass(frozen=True, slots=True)
class Start:
    """The operator wants it to run."""


@dataclass(frozen=True, slots=True)
class Healthy:
    """It answered that it is ready."""


@dataclass(frozen=True, slots=True)
class Unhealthy:
    """It did not answer, or not as it should."""

    reason: str


@dataclass(frozen=True, slots=True)
class ProgressReport:
    """What it said of its work: steps done so far, and whether anything waits or runs."""

    steps: int
    has_work: bool


@dataclass(frozen=True, slots=True)
class Exited:
    """The process has ended. `code` below 0: the signal that ended it, negated; None: it could not be started."""

    code: int | None
    crash_reason: str = ""


@dataclass(frozen=True, slots=True)
class Stop:
    """The operator wants it to end."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Start | Healthy | Unhealthy | ProgressReport | Exited | Stop | Tick


@dataclass(frozen=True, slots=True)
class EngineLifecycle:
    phase: Phase = "stopped"
    since: float = 0.0
    """When the phase began."""
    wake_at: float | None = None
    """When a Tick is due at the latest; None: only an event brings it on."""
    reason: str = ""
    restarts: int = 0
    back_off_seconds: float = _FIRST_BACK_OFF_SECONDS
    """Before the next restart."""
    should_run: bool = False
    """Whether it is to run again once it has ended."""
    steps: int = -1
    progress_at: float = 0.0
    stalled_seconds: float = 0.0
    had_work: bool = False
    """At the last report: time before there was any work is no stall."""
    unhealthy_at: float = 0.0
    unhealthy_seconds: float = 0.0

    @property
    def state(self) -> EngineState:
        """The phase as requests see it."""
        return _STATES[self.phase]


_STATES: Final[dict[Phase, EngineState]] = {
    "stopped": "stopped",
    "starting": "starting",
    "ready": "ready",
    "stopping": "draining",
    "killing": "failed",
    "waiting": "failed",
    "failed": "failed",
}

Transition = tuple[EngineLifecycle, tuple[Action, ...]]


def advance(lifecycle: EngineLifecycle, event: Event, now: float, limits: LifecycleLimits) -> Transition:
    """The next state after `event` at `now`, and the actions to take, in order."""
    match event:
        case Start():
            return _start(lifecycle, now, limits)
        case Stop():
            return _stop(lifecycle, now, limits)
        case Exited(code, crash_reason):
            return _exited(lifecycle, code, crash_reason, now, limits)
        case Healthy():
            return _healthy(lifecycle, now)
        case Unhealthy(reason):
            return _unhealthy(lifecycle, reason, now, limits)
        case ProgressReport(steps, has_work):
            return _progressed(lifecycle, steps, has_work, now, limits)
        case Tick():
            return _tick(lifecycle, now, limits)


def _start(lifecycle: EngineLifecycle, now: float, limits: LifecycleLimits) -> Transition:
    if lifecycle.phase in ("stopped", "failed"):
        return _spawn(replace(lifecycle, should_run=True, back_off_seconds=_FIRST_BACK_OFF_SECONDS), now, limits)
    if lifecycle.phase == "waiting":
        return _spawn(replace(lifecycle, should_run=True), now, limits)
    return replace(lifecycle, should_run=True), ()


def _spawn(lifecycle: EngineLifecycle, now: float, limits: LifecycleLimits) -> Transition:
    fresh = replace(
        lifecycle,
        phase="starting",
        since=now,
        wake_at=now + limits.start_seconds,
        reason="",
        steps=-1,
        stalled_seconds=0.0,
        had_work=False,
        unhealthy_seconds=0.0,
    )
    return fresh, ("spawn",)


def _stop(lifecycle: EngineLifecycle, now: float, limits: LifecycleLimits) -> Transition:
    lifecycle = replace(lifecycle, should_run=False)
    match lifecycle.phase:
        case "starting":
            # An engine that is still loading may lose or swallow SIGTERM, and has nothing to finish.
            return _kill(lifecycle, "stopped while starting", now)
        case "ready":
            reason = "asked to stop"
            return replace(lifecycle, phase="stopping", since=now, wake_at=now + limits.drain_seconds, reason=reason), (
                "terminate",
            )
        case "waiting" | "failed":
            return replace(lifecycle, phase="stopped", since=now, wake_at=None, reason="asked to stop"), ()
        case "stopped" | "stopping" | "killing":
            return lifecycle, ()


def _exited(
    lifecycle: EngineLifecycle, code: int | None, crash_reason: str, now: float, limits: LifecycleLimits
) -> Transition:
    if lifecycle.phase in ("stopped", "waiting", "failed"):
        return lifecycle, ()
    if not lifecycle.should_run:
        return replace(lifecycle, phase="stopped", since=now, wake_at=None, reason="stopped as asked"), ()
    reason = lifecycle.reason if lifecycle.phase == "killing" else describe_exit(code, crash_reason)
    if lifecycle.phase == "starting" and code in limits.permanent_exits:
        return replace(lifecycle, phase="failed", since=now, wake_at=None, reason=reason), ()
    delay = _back_off_seconds(lifecycle, now)
    waiting = replace(
        lifecycle,
        phase="waiting",
        since=now,
        wake_at=now + delay,
        reason=f"{reason}; starts again in {delay:g} s",
        back_off_seconds=min(_MOST_BACK_OFF_SECONDS, 2 * delay),
    )
    return waiting, ()


def _healthy(lifecycle: EngineLifecycle, now: float) -> Transition:
    if lifecycle.phase == "starting":
        ready = replace(
            lifecycle,
            phase="ready",
            since=now,
            wake_at=None,
            reason="",
            progress_at=now,
            unhealthy_at=now,
            unhealthy_seconds=0.0,
        )
        return ready, ()
    return replace(lifecycle, unhealthy_at=now, unhealthy_seconds=0.0), ()


def _unhealthy(lifecycle: EngineLifecycle, reason: str, now: float, limits: LifecycleLimits) -> Transition:
    if lifecycle.phase != "ready":
        return lifecycle, ()
    silent = lifecycle.unhealthy_seconds + min(now - lifecycle.unhealthy_at, _LONGEST_GAP_SECONDS)
    if silent >= limits.unhealthy_seconds:
        return _kill(lifecycle, f"no answer for {silent:.0f} s: {reason}", now)
    return replace(lifecycle, unhealthy_at=now, unhealthy_seconds=silent), ()


def _progressed(
    lifecycle: EngineLifecycle, steps: int, has_work: bool, now: float, limits: LifecycleLimits
) -> Transition:
    if lifecycle.phase != "ready":
        return lifecycle, ()
    answered = replace(lifecycle, unhealthy_at=now, unhealthy_seconds=0.0)
    if not (has_work and lifecycle.had_work) or steps != lifecycle.steps:
        return replace(answered, steps=steps, progress_at=now, stalled_seconds=0.0, had_work=has_work), ()
    stalled = lifecycle.stalled_seconds + min(now - lifecycle.progress_at, _LONGEST_GAP_SECONDS)
    if stalled >= limits.stall_seconds:
        return _kill(answered, f"hung: work waited and no step was done for {stalled:.0f} s", now)
    return replace(answered, progress_at=now, stalled_seconds=stalled), ()


def _tick(lifecycle: EngineLifecycle, now: float, limits: LifecycleLimits) -> Transition:
    if lifecycle.wake_at is None or now < lifecycle.wake_at:
        return lifecycle, ()
    match lifecycle.phase:
        case "starting":
            return _kill(lifecycle, f"not ready within {limits.start_seconds:g} s", now)
        case "stopping":
            return _kill(lifecycle, f"did not end within {limits.drain_seconds:g} s of SIGTERM", now)
        case "waiting":
            return _spawn(replace(lifecycle, restarts=lifecycle.restarts + 1), now, limits)
        case _:
            return replace(lifecycle, wake_at=None), ()


def _kill(lifecycle: EngineLifecycle, reason: str, now: float) -> Transition:
    killed = replace(
        lifecycle,
        phase="killing",
        since=now,
        wake_at=None,
        reason=reason,
        back_off_seconds=_back_off_seconds(lifecycle, now),
    )
    return killed, ("kill",)


def _back_off_seconds(lifecycle: EngineLifecycle, now: float) -> float:
    good = lifecycle.phase == "ready" and now - lifecycle.since >= _GOOD_RUN_SECONDS
    return _FIRST_BACK_OFF_SECONDS if good else lifecycle.back_off_seconds


def describe_exit(code: int | None, crash_reason: str) -> str:
    """What happened, for people: the code or signal, then the last thing the engine wrote."""
    if code is None:
        what = "could not be started"
    elif code == -9:
        what = "was killed (signal 9); the system does so when memory runs out"
    elif code < 0:
        what = f"was ended by signal {-code}"
    else:
        what = f"ended by itself with code {code}"
    return f"{what}: {crash_reason}" if crash_reason else what
