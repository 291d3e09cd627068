"""From an outcome to rows: pure, and run in the writer's thread so that a request pays nothing for it."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from appliance.core import AttemptOutcome, Outcome
from appliance.ledger.tables import NANO_PER_USD

Row = Mapping[str, Any]

_LARGEST = 2**63 - 1
_LONGEST_NAME = 200
_LONGEST_REASON = 500
_GONE_OUT = frozenset({"answered", "rejected"})


def to_nano(usd: float) -> int:
    """US dollars as whole nano-dollars. Raises ValueError for what is no amount: negative, NaN or infinite."""
    if not (math.isfinite(usd) and usd >= 0):
        raise ValueError(f"{usd!r} is no amount of US dollars: it has to be finite and at least 0")
    return min(round(usd * NANO_PER_USD), _LARGEST)


def to_usd(nano: int) -> float:
    return nano / NANO_PER_USD


def make_decision_row(outcome: Outcome) -> Row:
    """The request itself, and what the report counts of it."""
    profile = outcome.profile
    answered = next((attempt for attempt in outcome.attempts if attempt.result == "answered"), None)
    results = [attempt.result for attempt in outcome.attempts]
    return {
        "decision_id": outcome.decision_id,
        "request_id": _text(outcome.request_id),
        "received_at": outcome.received_at,
        "endpoint": outcome.endpoint,
        "model": _text(outcome.model),
        "key_id": _text(outcome.key_id),
        "route": _text(outcome.route),
        "policy_version": _text(outcome.policy_version),
        "residency": _text(outcome.residency),
        "residency_reason": _text(outcome.residency_reason, _LONGEST_REASON),
        "task": profile.task,
        "complexity": profile.complexity,
        "format": profile.format,
        "latency_class": profile.latency_class,
        "language": None if profile.language is None else _text(profile.language),
        "risk": _text(profile.risk),
        "prompt_tokens": _count(profile.prompt_tokens),
        "output_tokens": _count(profile.output_tokens),
        "profile_reasons": json.dumps([_text(reason, _LONGEST_REASON) for reason in profile.reasons]),
        "status": outcome.status,
        "error_code": outcome.error_code,
        "stream": outcome.stream,
        "first_byte_seconds": outcome.first_byte_seconds,
        "total_seconds": outcome.total_seconds,
        "target": None if answered is None else answered.target,
        "location": None if answered is None else answered.location,
        "overflowed": "overflowed" in results,
        "fell_back": _moved_on(results, "failed"),
        "escalated": _moved_on(results, "rejected"),
        "left_site": any(left_site(attempt) for attempt in outcome.attempts),
    }


def make_attempt_rows(outcome: Outcome) -> list[Row]:
    return [
        {
            "decision_id": outcome.decision_id,
            "position": attempt.index,
            "received_at": outcome.received_at,
            "target": attempt.target,
            "location": attempt.location,
            "reason": _text(attempt.reason, _LONGEST_REASON),
            "result": attempt.result,
            "detail": _text(attempt.detail, _LONGEST_REASON),
            "started_at": attempt.started_at,
            "first_byte_seconds": attempt.first_byte_seconds,
            "total_seconds": attempt.total_seconds,
            "prompt_tokens": _count(attempt.usage.prompt_tokens),
            "completion_tokens": _count(attempt.usage.completion_tokens),
            "cached_tokens": _count(attempt.usage.cached_tokens),
            "reasoning_tokens": _count(attempt.usage.reasoning_tokens),
            "cost_nano_usd": None if attempt.cost_usd is None else to_nano(attempt.cost_usd),
            "reservation_id": attempt.reservation,
            "cost_basis": attempt.cost_basis,
            "energy_joules": _joules(attempt.energy_joules),
            "energy_basis": attempt.energy_basis,
        }
        for attempt in outcome.attempts
    ]


def make_exclusion_rows(outcome: Outcome) -> list[Row]:
    return [
        {
            "decision_id": outcome.decision_id,
            "position": position,
            "target": excluded.target,
            "reason": _text(excluded.reason, _LONGEST_REASON),
        }
        for position, excluded in enumerate(outcome.excluded)
    ]


def left_site(attempt: AttemptOutcome) -> bool:
    """Whether this attempt may have carried the request off the site.

    Money is reserved before a hosted call leaves, so an attempt with a reservation counts even if nothing came of it.
    """
    return attempt.location == "hosted" and (attempt.reservation is not None or attempt.result in _GONE_OUT)


def _moved_on(results: Sequence[str], result: str) -> bool:
    """Whether an attempt that ended in `result` was followed by another one."""
    return result in results[:-1]


def _text(text: str, longest: int = _LONGEST_NAME) -> str:
    """Text that any database takes: lone surrogates and NUL replaced, and cut, for some of it comes from outside."""
    return text[:longest].encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _joules(joules: float | None) -> float | None:
    """Sums must stay sums: what is no amount of energy is not written."""
    return joules if joules is not None and math.isfinite(joules) and joules >= 0 else None


def _count(number: int) -> int:
    """A token count that a hosted target reported may be anything; the column holds 0 to 2^63-1."""
    return min(max(number, 0), _LARGEST)
