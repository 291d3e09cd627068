"""A request that has ended: the metadata for its headers and the row for the ledger. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from appliance.core import AttemptOutcome, AttemptResult, CostBasis, Decision, Outcome, Request, ResponseMetadata, Usage
from appliance.errors import (
    ApplianceError,
    BackendError,
    BackendRefused,
    Busy,
    EngineBusy,
    LedgerUnavailable,
    RejectedReply,
    RequestError,
    ResidencyRefused,
    Unavailable,
)
from appliance.telemetry.redaction import scrub_text

_MAX_ATTEMPTS_KEPT: Final = 64
"""More than this in one row (thousands of texts in a call) are added up by target and result."""

_REASON_CHARACTERS: Final = 240

_WARNINGS: Final[Mapping[str, str]] = {
    "deprecated": "the route of this request is deprecated and is going to be removed",
}


def make_response_metadata(
    request: Request, decision: Decision, attempts: Sequence[AttemptOutcome], *, reason: str | None = None
) -> ResponseMetadata:
    """For an answer or an error: the last attempt that answered is the target, and every attempt's cost counts."""
    answered = [attempt for attempt in attempts if attempt.result == "answered"]
    by = answered[-1] if answered else None
    return ResponseMetadata(
        request_id=request.id,
        decision_id=decision.id,
        target=by.target if by else None,
        location=by.location if by else None,
        route=decision.route.name,
        reason=_one_line(reason or (by.reason if by else decision.route.residency_reason)),
        policy_version=decision.route.policy_version,
        cost_usd=sum_cost_usd(attempts),
        cost_is_final=True,
        cost_basis=weakest_basis([attempt.cost_basis for attempt in attempts]),
        warning=_WARNINGS.get(decision.route.stage),
    )


def sum_cost_usd(attempts: Sequence[AttemptOutcome]) -> float | None:
    """None where an attempt that did something has an unknown cost."""
    total = 0.0
    for attempt in attempts:
        if attempt.cost_usd is None:
            if attempt.result == "answered":
                return None
        else:
            total += attempt.cost_usd
    return total


_WEAKEST_FIRST: Final[Sequence[CostBasis]] = ("assumed", "configured", "measured", "price")


def weakest_basis(bases: Sequence[CostBasis | None]) -> CostBasis | None:
    """The least certain basis of a sum's parts. None: nothing was charged."""
    return next((basis for basis in _WEAKEST_FIRST if basis in bases), None)


def build_outcome(
    request: Request,
    decision: Decision,
    attempts: Sequence[AttemptOutcome],
    *,
    error: ApplianceError | None,
    first_byte_seconds: float | None,
    total_seconds: float,
) -> Outcome:
    return Outcome(
        decision_id=decision.id,
        request_id=request.id,
        received_at=request.received_at,
        endpoint=request.endpoint,
        model=request.model,
        key_id=request.caller.key_id,
        route=decision.route.name,
        policy_version=decision.route.policy_version,
        residency=str(decision.route.residency),
        residency_reason=decision.route.residency_reason,
        profile=decision.profile,
        attempts=merge_attempts(attempts),
        excluded=decision.route.excluded,
        status=200 if error is None else error.status,
        error_code=None if error is None else error.code,
        stream=request.stream,
        first_byte_seconds=first_byte_seconds,
        total_seconds=total_seconds,
    )


def merge_attempts(attempts: Sequence[AttemptOutcome]) -> tuple[AttemptOutcome, ...]:
    """The attempts as they were, or, where they are too many, one row for each target and result."""
    if len(attempts) <= _MAX_ATTEMPTS_KEPT:
        return tuple(replace(attempt, index=index) for index, attempt in enumerate(attempts))
    groups: dict[tuple[str, str], list[AttemptOutcome]] = {}
    for attempt in attempts:
        groups.setdefault((attempt.target, attempt.result), []).append(attempt)
    return tuple(_sum(index, group) for index, group in enumerate(groups.values()))


def _sum(index: int, group: Sequence[AttemptOutcome]) -> AttemptOutcome:
    costs = [attempt.cost_usd for attempt in group]
    first_bytes = [attempt.first_byte_seconds for attempt in group if attempt.first_byte_seconds is not None]
    joules = [attempt.energy_joules for attempt in group if attempt.energy_joules is not None]
    usage = Usage()
    for attempt in group:
        usage += attempt.usage
    return replace(
        group[0],
        index=index,
        detail=f"{len(group)} calls" + (f", the first: {group[0].detail}" if group[0].detail else ""),
        started_at=min(attempt.started_at for attempt in group),
        first_byte_seconds=min(first_bytes) if first_bytes else None,
        total_seconds=sum(attempt.total_seconds for attempt in group),
        usage=usage,
        cost_usd=None if None in costs else sum(cost for cost in costs if cost is not None),
        reservation=None,
        cost_basis=weakest_basis([attempt.cost_basis for attempt in group]),
        energy_joules=sum(joules) if joules else None,
        energy_basis=weakest_basis([attempt.energy_basis for attempt in group]),
        is_unsure=False,
    )


def _one_line(text: str) -> str:
    return scrub_text(" ".join(text.split())[:_REASON_CHARACTERS])


def classify_error(error: ApplianceError) -> AttemptResult:
    match error:
        case EngineBusy() | Busy():
            return "overflowed"
        case RejectedReply():
            return "rejected"
        case RequestError() | BackendRefused() | ResidencyRefused():
            return "refused"
        case LedgerUnavailable():
            return "failed"
        case Unavailable():
            return "overflowed"
        case _:
            return "failed"


def describe_error(error: ApplianceError) -> str:
    """For headers and the ledger: never a target's words, which may quote the prompt or the answer."""
    if isinstance(error, Busy | Unavailable) and not isinstance(error, EngineBusy):
        return error.message
    return f"{error.code} ({error.status})" if isinstance(error, BackendRefused) else error.code


def may_have_cost(error: ApplianceError) -> bool:
    """Whether the target may have done (and billed) work before this."""
    return isinstance(error, BackendError) and error.may_have_cost
