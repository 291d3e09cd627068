"""Money and outcomes on their way from the pipeline to the ledger: budgets are put to it, metrics see what ends."""

from collections.abc import Mapping
from typing import Protocol

from appliance.config import KeySettings, NodeConfig, Policy
from appliance.core import HealthAlerts, Outcome, Target
from appliance.ledger.budgets import SpendCap
from appliance.ledger.store import Ledger

_CODE = "budget_nearly_spent"


class OutcomeObserver(Protocol):
    def observe_outcome(self, outcome: Outcome) -> None: ...


class SpendCaps:
    """Who may spend how much in a day: a value that a reload replaces. `keys`: those of the configuration or made by
    command."""

    def __init__(self, config: NodeConfig, policy: Policy, keys: Mapping[str, KeySettings]) -> None:
        self.alert_at = config.budget.alert_at
        self._all = SpendCap("all", config.budget.daily_usd)
        self._providers = {one.name: SpendCap(f"provider:{one.name}", one.daily_usd) for one in config.providers}
        self._routes = {one.name: SpendCap(f"route:{one.name}", one.daily_usd) for one in policy.routes}
        self._keys = {name: SpendCap(f"key:{name}", key.daily_usd) for name, key in keys.items()}

    def of(self, target: Target, route: str, key_id: str) -> tuple[SpendCap, ...]:
        """Every scope that a call counts towards."""
        found = (self._providers.get(target.provider or ""), self._routes.get(route), self._keys.get(key_id))
        return (self._all, *(cap for cap in found if cap is not None))


class SpendAccounting:
    """The pipeline's side of the ledger."""

    def __init__(self, ledger: Ledger, metrics: OutcomeObserver, alerts: HealthAlerts, caps: SpendCaps) -> None:
        self._ledger, self._metrics, self._alerts = ledger, metrics, alerts
        self.caps = caps
        self.settle = ledger.settle

    async def reserve(self, *, decision_id: str, target: Target, usd: float, route: str, key_id: str) -> str:
        """Raises BudgetExceeded where a cap would be exceeded, LedgerUnavailable where it cannot be put down."""
        caps = self.caps.of(target, route, key_id)
        reservation = await self._ledger.reserve(decision_id=decision_id, target=target, usd=usd, caps=caps)
        self._watch(caps)
        return reservation

    def record(self, outcome: Outcome) -> None:
        self._metrics.observe_outcome(outcome)
        self._ledger.record(outcome)

    def _watch(self, caps: tuple[SpendCap, ...]) -> None:
        """Warn while a cap is nearly spent; a new day, or a higher cap, ends that."""
        for cap in caps:
            if cap.limit_usd is None:
                continue
            spent = self._ledger.spent_today.get(cap.scope, 0.0)
            if spent >= self.caps.alert_at * cap.limit_usd:
                text = f"{spent:.2f} of {cap.limit_usd:g} USD of today's budget of {cap.scope} is spent or reserved"
                self._alerts.warn(_CODE, f"{text}: raise it, or calls are refused when it is gone", cap.scope)
            else:
                self._alerts.clear(_CODE, cap.scope)
