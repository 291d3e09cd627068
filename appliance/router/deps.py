"""What attempts work with: the parts that outlive a request, and the patience and the purse of one request."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from appliance.config import CascadeRule, CostSettings
from appliance.core import HealthAlerts, Outcome, Target
from appliance.errors import BudgetExceeded
from appliance.router.capacity.admission import Admission
from appliance.router.capacity.breaker import Breakers
from appliance.router.residency import EgressPermitIssuer
from appliance.router.stats.estimators import Estimators
from appliance.router.stats.windows import SlidingWindows
from appliance.state import State
from appliance.tasks.classify.cascade import CascadeCall, CascadeThresholds
from appliance.upstream.base import Transports


class SpendLedger(Protocol):
    """What the pipeline asks of the ledger."""

    async def reserve(self, *, decision_id: str, target: Target, usd: float, route: str, key_id: str) -> str: ...

    def settle(self, reservation_id: str, *, usd: float) -> None: ...

    def record(self, outcome: Outcome) -> None: ...


class FeedbackSink(Protocol):
    """What is known of trained classifiers' answers, and who is told what became of them."""

    def standing(self, cascade: CascadeRule, classifier: str, version: str | None) -> CascadeThresholds:
        """From which confidence on this version's answers may stand."""

    def seen(self, call: CascadeCall) -> None: ...


class NoFeedback:
    """Where nobody keeps count: no threshold is known."""

    def standing(self, cascade: CascadeRule, classifier: str, version: str | None) -> CascadeThresholds:
        return CascadeThresholds(None, "nothing is known of its answers")

    def seen(self, call: CascadeCall) -> None:
        pass


@dataclass(frozen=True, slots=True)
class RuntimeStats:
    """What requests teach the ones after them. Outlives reloads."""

    experience: Estimators = field(default_factory=Estimators)
    of_late: SlidingWindows = field(default_factory=SlidingWindows)


@dataclass(frozen=True, slots=True)
class RouterDeps:
    """What attempts work with."""

    state: State
    ledger: SpendLedger
    admission: Admission
    breakers: Breakers
    memory: RuntimeStats
    doors: Transports
    permits: EgressPermitIssuer
    alerts: HealthAlerts
    learning: FeedbackSink
    cost: CostSettings
    cores: int
    clock: Callable[[], float]
    wall: Callable[[], float]
    pause: Callable[[float], Awaitable[object]]
    chance: Callable[[], float]
    """Between 0 and 1, to spread retries."""


@dataclass(frozen=True, slots=True)
class AttemptTimeouts:
    """How long an attempt may take, in seconds from now."""

    total_seconds: float
    wait_seconds: float
    budget_seconds: float | None
    """To the first token; None where there is nowhere else to go."""
    first: bool
    """Whether it waits before those who are not bound."""
    answer_seconds: float | None = None
    """To the end of the answer, where that is limited and there is somewhere else to go."""
    elsewhere_seconds: float = 0.0
    """How long whoever comes next is going to need."""


class RequestBudget:
    """What one request may still spend, over all its attempts and calls."""

    def __init__(self, ceiling_usd: float | None) -> None:
        self._ceiling_usd = ceiling_usd
        self._held_usd = 0.0

    def take(self, usd: float, target: str) -> None:
        """Raises BudgetExceeded where this could exceed the ceiling."""
        if self._ceiling_usd is not None and self._held_usd + usd > self._ceiling_usd:
            raise BudgetExceeded(
                f"{target} may cost {usd:.6f} USD, this request's attempts {self._held_usd:.6f} USD so far, "
                f"and its route allows {self._ceiling_usd:.6f} USD for all of them"
            )
        self._held_usd += usd

    def settle(self, taken_usd: float, spent_usd: float | None) -> None:
        """Put back what was not spent. A cost that nobody knows counts as what was taken."""
        self._held_usd += 0.0 if spent_usd is None else spent_usd - taken_usd
