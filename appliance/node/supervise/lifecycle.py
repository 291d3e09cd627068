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


def advance(life: EngineLifecycle, event: Event, now: float, limits: LifecycleLimits) -> Transition:
    """What becomes of `life` by `event` at `now`, and the actions to take, in order."""
    match event:
        case Start():
            return _start(life, now, limits)
        case Stop():
            return _stop(life, now, limits)
        case Exited(code, crash_reason):
            return _exited(life, code, crash_reason, now, limits)
        case Healthy():
            return _healthy(life, now)
        case Unhealthy(reason):
            return _unhealthy(life, reason, now, limits)
        case ProgressReport(steps, has_work):
            return _progressed(life, steps, has_work, now, limits)
        case Tick():
            return _tick(life, now, limits)


def _start(life: EngineLifecycle, now: float, limits: LifecycleLimits) -> Transition:
    if life.phase in ("stopped", "failed"):
        return _spawn(replace(life, should_run=True, back_off_seconds=_FIRST_BACK_OFF_SECONDS), now, limits)
    if life.phase == "waiting":
        return _spawn(replace(life, should_run=True), now, limits)
    return replace(life, should_run=True), ()


def _spawn(life: EngineLifecycle, now: float, limits: LifecycleLimits) -> Transition:
    fresh = replace(
        life,
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


def _stop(life: EngineLifecycle, now: float, limits: LifecycleLimits) -> Transition:
    life = replace(life, should_run=False)
    match life.phase:
        case "starting":
            # An engine that is still loading may lose or swallow SIGTERM, and has nothing to finish.
            return _kill(life, "stopped while starting", now)
        case "ready":
            reason = "asked to stop"
            return replace(life, phase="stopping", since=now, wake_at=now + limits.drain_seconds, reason=reason), (
                "terminate",
            )
        case "waiting" | "failed":
            return replace(life, phase="stopped", since=now, wake_at=None, reason="asked to stop"), ()
        case "stopped" | "stopping" | "killing":
            return life, ()


def _exited(
    life: EngineLifecycle, code: int | None, crash_reason: str, now: float, limits: LifecycleLimits
) -> Transition:
    if life.phase in ("stopped", "waiting", "failed"):
        return life, ()
    if not life.should_run:
        return replace(life, phase="stopped", since=now, wake_at=None, reason="stopped as asked"), ()
    reason = life.reason if life.phase == "killing" else describe_exit(code, crash_reason)
    if life.phase == "starting" and code in limits.permanent_exits:
        return replace(life, phase="failed", since=now, wake_at=None, reason=reason), ()
    delay = _back_off_seconds(life, now)
    waiting = replace(
        life,
        phase="waiting",
        since=now,
        wake_at=now + delay,
        reason=f"{reason}; starts again in {delay:g} s",
        back_off_seconds=min(_MOST_BACK_OFF_SECONDS, 2 * delay),
    )
    return waiting, ()


def _healthy(life: EngineLifecycle, now: float) -> Transition:
    if life.phase == "starting":
        ready = replace(
            life,
            phase="ready",
            since=now,
            wake_at=None,
            reason="",
            progress_at=now,
            unhealthy_at=now,
            unhealthy_seconds=0.0,
        )
        return ready, ()
    return replace(life, unhealthy_at=now, unhealthy_seconds=0.0), ()


def _unhealthy(life: EngineLifecycle, reason: str, now: float, limits: LifecycleLimits) -> Transition:
    if life.phase != "ready":
        return life, ()
    silent = life.unhealthy_seconds + min(now - life.unhealthy_at, _LONGEST_GAP_SECONDS)
    if silent >= limits.unhealthy_seconds:
        return _kill(life, f"no answer for {silent:.0f} s: {reason}", now)
    return replace(life, unhealthy_at=now, unhealthy_seconds=silent), ()


def _progressed(life: EngineLifecycle, steps: int, has_work: bool, now: float, limits: LifecycleLimits) -> Transition:
    if life.phase != "ready":
        return life, ()
    answered = replace(life, unhealthy_at=now, unhealthy_seconds=0.0)
    if not (has_work and life.had_work) or steps != life.steps:
        return replace(answered, steps=steps, progress_at=now, stalled_seconds=0.0, had_work=has_work), ()
    stalled = life.stalled_seconds + min(now - life.progress_at, _LONGEST_GAP_SECONDS)
    if stalled >= limits.stall_seconds:
        return _kill(answered, f"hung: work waited and no step was done for {stalled:.0f} s", now)
    return replace(answered, progress_at=now, stalled_seconds=stalled), ()


def _tick(life: EngineLifecycle, now: float, limits: LifecycleLimits) -> Transition:
    if life.wake_at is None or now < life.wake_at:
        return life, ()
    match life.phase:
        case "starting":
            return _kill(life, f"not ready within {limits.start_seconds:g} s", now)
        case "stopping":
            return _kill(life, f"did not end within {limits.drain_seconds:g} s of SIGTERM", now)
        case "waiting":
            return _spawn(replace(life, restarts=life.restarts + 1), now, limits)
        case _:
            return replace(life, wake_at=None), ()


def _kill(life: EngineLifecycle, reason: str, now: float) -> Transition:
    killed = replace(
        life, phase="killing", since=now, wake_at=None, reason=reason, back_off_seconds=_back_off_seconds(life, now)
    )
    return killed, ("kill",)


def _back_off_seconds(life: EngineLifecycle, now: float) -> float:
    good = life.phase == "ready" and now - life.since >= _GOOD_RUN_SECONDS
    return _FIRST_BACK_OFF_SECONDS if good else life.back_off_seconds


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
