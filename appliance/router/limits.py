"""The limits of one request: how long an attempt may take, and what all attempts together may spend."""

from dataclasses import dataclass

from appliance.errors import BudgetExceeded


@dataclass(frozen=True, slots=True)
class AttemptTimeouts:
    """How long one attempt may take, in seconds from its start."""

    total_seconds: float
    wait_seconds: float
    """In the target's queue."""
    budget_seconds: float | None
    """To the first token; None where no other target is left."""
    is_residency_bound: bool
    """Residency-bound requests wait before those that may go elsewhere."""
    answer_seconds: float | None = None
    """To the end of the answer; None where that is not limited or no other target is left."""
    fallback_seconds: float = 0.0
    """How long the next target is expected to take to its first byte."""


class RequestBudget:
    """What one request may still spend, over all its attempts and calls."""

    def __init__(self, ceiling_usd: float | None) -> None:
        self._ceiling_usd = ceiling_usd
        self._held_usd = 0.0

    def reserve(self, usd: float, target: str) -> None:
        """Raises BudgetExceeded where this could exceed the ceiling."""
        if self._ceiling_usd is not None and self._held_usd + usd > self._ceiling_usd:
            raise BudgetExceeded(
                f"{target} may cost {usd:.6f} USD, this request's attempts {self._held_usd:.6f} USD so far, "
                f"and its route allows {self._ceiling_usd:.6f} USD for all of them"
            )
        self._held_usd += usd

    def settle(self, reserved_usd: float, spent_usd: float | None) -> None:
        """Give back what was not spent. An unknown cost counts as what was reserved."""
        self._held_usd += 0.0 if spent_usd is None else spent_usd - reserved_usd
