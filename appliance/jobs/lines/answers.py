"""What came of a line as its answer: a payload with its tokens and cost, or an error and whether to ask again."""

from typing import Any, Final

from appliance.core import ResponseMetadata, Usage
from appliance.errors import ApplianceError, BackendError, Busy, DeadlineExceeded, RejectedReply, Unavailable
from appliance.jobs.models import LineAnswer

_BUDGET_SECONDS: Final = 60.0
"""Budgets are of a day, so it helps little to try sooner."""


def make_answer(
    payload: Any, name: str, metadata: ResponseMetadata, usage: Usage, cost_usd: float | None
) -> LineAnswer:
    return LineAnswer(200, payload, name, metadata.location, usage, cost_usd, None, metadata.decision_id)


def make_refusal(error: ApplianceError, name: str) -> LineAnswer:
    decision_id = error.headers.get("x-appliance-decision")
    return LineAnswer(
        error.status,
        error.to_openai(),
        name,
        retry_after_seconds=_retry_after_seconds(error),
        decision_id=decision_id,
    )


def _retry_after_seconds(error: ApplianceError) -> float | None:
    """When asking again may help: where it was only busy, or a target failed in a way that passes."""
    if isinstance(error, Busy):
        return max(error.retry_after_seconds or 1.0, _BUDGET_SECONDS if error.code == "budget_exceeded" else 0.0)
    passes = isinstance(error, BackendError) and error.fallback and not isinstance(error, RejectedReply)
    if passes or isinstance(error, Unavailable | DeadlineExceeded):
        return error.retry_after_seconds or 1.0
    return None
