"""What routes did recently, in sliding windows: shares of traffic, escalations, cost of an answer. Pure.

Outlives reloads. Written by requests alone, on the event loop; `now` is monotonic, so setting the clock changes
nothing.
"""

from collections import deque
from collections.abc import Collection, Iterable
from typing import Final, Protocol

from appliance.config import RouteRule
from appliance.router.routing.match import QUOTA_WINDOW_SECONDS

_BUCKETS: Final = 60
_COST_WINDOW_SECONDS: Final = 3600.0
_UNDER_RATE: Final = 0.8
_FEW: Final = 20
"""Attempts that have to be seen before a cost for each success is held against a target."""


class EscalationRate(Protocol):
    """What limits how often a route escalates."""

    @property
    def max_rate(self) -> float: ...

    @property
    def window_seconds(self) -> float: ...


class Window:
    """Two running sums over the last `seconds`, in sixty steps."""

    __slots__ = ("_buckets", "_first", "_second", "_step")

    def __init__(self, seconds: float) -> None:
        self._step = seconds / _BUCKETS
        self._buckets: deque[tuple[int, list[float]]] = deque()
        self._first = self._second = 0.0

    def add(self, now: float, first: float, second: float = 0.0) -> None:
        self._forget(now)
        number = int(now / self._step)
        if not self._buckets or self._buckets[-1][0] != number:
            self._buckets.append((number, [0.0, 0.0]))
        bucket = self._buckets[-1][1]
        bucket[0] += first
        bucket[1] += second
        self._first += first
        self._second += second

    def sums(self, now: float) -> tuple[float, float]:
        self._forget(now)
        return (self._first, self._second) if self._buckets else (0.0, 0.0)

    def _forget(self, now: float) -> None:
        oldest = int(now / self._step) - _BUCKETS
        while self._buckets and self._buckets[0][0] <= oldest:
            first, second = self._buckets.popleft()[1]
            self._first -= first
            self._second -= second


class SlidingWindows:
    """All routes' windows."""

    def __init__(self) -> None:
        self._all = Window(QUOTA_WINDOW_SECONDS)
        self._routes: dict[str, Window] = {}
        self._escalations: dict[tuple[str, float], Window] = {}
        self._costs: dict[tuple[str, str], Window] = {}
        self._tries: dict[tuple[str, str], Window] = {}

    def over_quota(self, rules: Iterable[RouteRule], now: float) -> Collection[str]:
        """The routes that would exceed their share with one request more."""
        limited = [rule for rule in rules if rule.quota is not None]
        if not limited:
            return ()
        total = self._all.sums(now)[0] + 1
        return {rule.name for rule in limited if self._taken(rule.name, now) + 1 > (rule.quota or 0.0) * total}

    def record_request(self, route: str, now: float) -> None:
        """Count a request of `route`."""
        self._all.add(now, 1)
        self._routes.setdefault(route, Window(QUOTA_WINDOW_SECONDS)).add(now, 1)

    def _taken(self, route: str, now: float) -> float:
        window = self._routes.get(route)
        return 0.0 if window is None else window.sums(now)[0]

    def record_answers(self, route: str, rule: EscalationRate, now: float, answers: int = 1) -> None:
        """Count `answers` of `route` that have a confidence."""
        self._escalation(route, rule).add(now, answers)

    def escalations_left(self, route: str, rule: EscalationRate, now: float) -> int:
        """How many more may escalate inside the rate."""
        judged, escalated = self._escalation(route, rule).sums(now)
        return max(0, int(rule.max_rate * judged - escalated + 1e-9))

    def may_escalate(self, route: str, rule: EscalationRate, now: float) -> bool:
        """Whether one more stays inside the rate."""
        judged, escalated = self._escalation(route, rule).sums(now)
        return escalated + 1 <= rule.max_rate * judged

    def is_under_rate(self, route: str, rule: EscalationRate, now: float) -> bool:
        """Whether the rate is well below its cap: at the cap itself the alert would flap."""
        judged, escalated = self._escalation(route, rule).sums(now)
        return escalated <= _UNDER_RATE * rule.max_rate * judged

    def record_escalations(self, route: str, rule: EscalationRate, now: float, answers: int = 1) -> None:
        self._escalation(route, rule).add(now, 0, answers)

    def _escalation(self, route: str, rule: EscalationRate) -> Window:
        return self._escalations.setdefault((route, rule.window_seconds), Window(rule.window_seconds))

    def record_cost(self, route: str, target: str, usd: float | None, *, answered: bool, now: float) -> None:
        """Count an ended attempt of `route` at `target`. An unknown cost is left out."""
        if usd is None:
            return
        key = (route, target)
        self._costs.setdefault(key, Window(_COST_WINDOW_SECONDS)).add(now, usd, float(answered))
        self._tries.setdefault(key, Window(_COST_WINDOW_SECONDS)).add(now, 1)

    def usd_per_success(self, route: str, target: str, now: float) -> float | None:
        """What an answer has cost, failures included; None where too few attempts were seen to tell."""
        key = (route, target)
        if key not in self._tries or self._tries[key].sums(now)[0] < _FEW:
            return None
        usd, successes = self._costs[key].sums(now)
        return max(0.0, usd) / max(1.0, successes)
