"""Which attempt comes after a failure, and which failures another attempt can mend. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from appliance.core import Attempt, AttemptCause, AttemptOutcome, AttemptResult, Route, Target
from appliance.errors import (
    ApplianceError,
    BackendAuth,
    BackendError,
    BackendIncapable,
    Busy,
    ContextTooLong,
    DeadlineExceeded,
    EngineBusy,
    RejectedReply,
    Unavailable,
    Unsupported,
)

_FIRST_DELAY_SECONDS: Final = 0.1
_LONGEST_DELAY_SECONDS: Final = 2.0
"""Before the same target is asked again; doubled each time, and spread so that many do not come back together."""

_CAUSES: Final[Mapping[AttemptResult, AttemptCause]] = {"overflowed": "overflow", "rejected": "rejected"}


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    target: Target
    outcome: AttemptOutcome | None
    """None where it was never begun."""
    error: ApplianceError


@dataclass(frozen=True, slots=True)
class NextAttempt:
    attempt: Attempt
    delay_seconds: float = 0.0
    following: Target | None = None
    """The target that could be asked after it."""


@dataclass(frozen=True, slots=True)
class RetryConditions:
    """When a retry is in time. Times are monotonic seconds."""

    now: float
    ends: float
    """The request's deadline."""
    draw: Callable[[], float]
    """Uniform from 0 to 1."""
    blocked_until: Callable[[str, float], float | None]
    """By target and time: until when its breaker keeps it from being tried."""


def take_next_in_order(route: Route, failures: Sequence[FailedAttempt], left: int) -> NextAttempt:
    """The attempt after those that failed, of at most `left` attempts; the route must have one."""
    attempt = route.attempts[len(failures)]
    following = route.attempts[len(failures) + 1 : left]
    if failures:
        attempt = _after_failure(attempt, failures[-1])
    return NextAttempt(attempt, following=following[0].target if following else None)


def choose_retry(route: Route, failures: Sequence[FailedAttempt], conditions: RetryConditions) -> NextAttempt | None:
    """The first of the route's targets whose failure may pass, while there is time for it."""
    for attempt in route.attempts:
        errors = [failed.error for failed in failures if failed.target.name == attempt.target.name]
        if not errors or not _may_retry(errors[-1], billed_too=route.retry_billed):
            continue
        delay = min(_FIRST_DELAY_SECONDS * 2 ** (len(errors) - 1), _LONGEST_DELAY_SECONDS)
        delay = max(delay * (0.5 + conditions.draw()), errors[-1].retry_after_seconds or 0.0)
        at = conditions.now + delay
        blocked = conditions.blocked_until(attempt.target.name, at)
        if blocked is None and delay <= route.max_wait_seconds and at < conditions.ends:
            reason = f"retry: {attempt.target.name} {errors[-1].code}"
            return NextAttempt(replace(attempt, reason=reason, cause="retry"), delay)
    return None


def choose_cold_target(route: Route, failures: Sequence[FailedAttempt]) -> NextAttempt | None:
    """An engine that was not up when the request was decided, now that no other target is left: a hosted target may be
    refused by a budget only after it was chosen."""
    tried = {failed.target.name for failed in failures}
    attempt = next((attempt for attempt in route.cold_targets if attempt.target.name not in tried), None)
    return None if attempt is None else NextAttempt(_after_failure(attempt, failures[-1]))


def may_fall_back(error: ApplianceError) -> bool:
    """Whether another target may be asked: where this one was full, failed or cannot be asked this, never where the
    request itself is the mistake: that would fail anywhere, and sending it out would only leak it."""
    return error.fallback or isinstance(error, Busy | Unavailable | Unsupported)


def may_degrade(error: ApplianceError) -> bool:
    """Whether a smaller request may succeed: never where the request may not be answered at all."""
    return may_fall_back(error) or isinstance(error, ContextTooLong | DeadlineExceeded)


def final_error(failures: Sequence[FailedAttempt]) -> ApplianceError:
    """The last error; where several targets were tried its message names them all."""
    if not failures:
        return Unavailable("no target is left for this request")
    error = failures[-1].error
    if len(failures) > 1:
        names = "; ".join(f"{failed.target.name}: {failed.error.code}" for failed in failures)
        error.message = f"{error.message} (tried {names})"
        error.args = (error.message,)
    return error


def _after_failure(attempt: Attempt, failed: FailedAttempt) -> Attempt:
    """`attempt`, with the failure before it as its cause."""
    assert failed.outcome is not None
    cause: AttemptCause = _CAUSES.get(failed.outcome.result, "fallback")
    detail = failed.outcome.detail
    reason = f"{cause}: {detail if failed.target.name in detail else f'{failed.target.name} {detail}'}"
    return replace(attempt, reason=reason, cause=cause)


def _may_retry(error: ApplianceError, *, billed_too: bool) -> bool:
    """Whether the same target may do better in a moment. An answer that did not pass would not pass again, and what may
    have been billed is not asked for twice unless the route says so."""
    if isinstance(error, EngineBusy):
        return True
    if not isinstance(error, BackendError) or not error.fallback:
        return False
    if isinstance(error, RejectedReply | BackendAuth | BackendIncapable):
        return False
    return billed_too or not error.may_have_cost
