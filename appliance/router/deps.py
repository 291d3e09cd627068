"""What attempts work with: the parts of the node that outlive a request."""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from appliance.config import CascadeRule, CostSettings
from appliance.core import HealthAlerts, NoAlerts, Outcome, Target
from appliance.router.capacity.admission import Admission
from appliance.router.capacity.breaker import Breakers
from appliance.router.residency import EgressPermitIssuer
from appliance.router.stats.estimators import Estimators
from appliance.router.stats.windows import SlidingWindows
from appliance.state import State
from appliance.tasks.classify.cascade import CascadeCall, CascadeThresholds
from appliance.upstream.base import Transports


class SpendLedger(Protocol):
    """What the pipeline needs of the ledger."""

    async def reserve(self, *, decision_id: str, target: Target, usd: float, route: str, key_id: str) -> str: ...

    def settle(self, reservation_id: str, *, usd: float) -> None: ...

    def record(self, outcome: Outcome) -> None: ...


class FeedbackSink(Protocol):
    """Knows how far trained classifiers' answers can be relied on, and records what became of them."""

    def get_thresholds(self, cascade: CascadeRule, classifier: str, version: str | None) -> CascadeThresholds:
        """From which confidence on this version's answers may stand."""

    def record_cascade(self, call: CascadeCall) -> None: ...


class NoFeedback:
    """Records nothing and knows no threshold."""

    def get_thresholds(self, cascade: CascadeRule, classifier: str, version: str | None) -> CascadeThresholds:
        return CascadeThresholds(None, "nothing is known of its answers")

    def record_cascade(self, call: CascadeCall) -> None:
        pass


@dataclass(frozen=True, slots=True)
class RuntimeStats:
    """What requests teach the ones after them. Outlives reloads."""

    estimators: Estimators = field(default_factory=Estimators)
    windows: SlidingWindows = field(default_factory=SlidingWindows)


@dataclass(frozen=True, slots=True)
class RouterDeps:
    """Everything a pipeline is given but its policy. Parts that change themselves outlive a reload."""

    state: State
    ledger: SpendLedger
    admission: Admission
    breakers: Breakers
    stats: RuntimeStats
    transports: Transports
    permits: EgressPermitIssuer
    cost: CostSettings = field(default_factory=CostSettings)
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Cores that an engine of this node uses, for the energy of its answers."""
    alerts: HealthAlerts = field(default_factory=NoAlerts)
    feedback: FeedbackSink = field(default_factory=NoFeedback)
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    draw: Callable[[], float] = random.random
    """Uniform from 0 to 1: spreads retries and draws audit samples."""
