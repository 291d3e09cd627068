"""What came of a line as its answer: a payload with its tokens and cost, or an error and whether to ask again."""

from collections.abc import Mapping
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


def read_usage(payload: Any) -> Usage:
    """What a payload of any endpoint says of its tokens."""
    usage = payload.get("usage") if isinstance(payload, dict) else None
    if not isinstance(usage, Mapping):
        return Usage()
    prompt = _details(usage, "prompt_tokens_details") or _details(usage, "input_tokens_details")
    output = _details(usage, "completion_tokens_details") or _details(usage, "output_tokens_details")
    return Usage(
        _count(usage, "prompt_tokens") or _count(usage, "input_tokens"),
        _count(usage, "completion_tokens") or _count(usage, "output_tokens"),
        _count(prompt, "cached_tokens"),
        _count(output, "reasoning_tokens"),
    )


def _details(usage: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = usage.get(name)
    return found if isinstance(found, Mapping) else {}


def _count(usage: Mapping[str, Any], name: str) -> int:
    found = usage.get(name)
    return found if isinstance(found, int) else 0
