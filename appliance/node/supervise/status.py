"""Publishes what the control plane sees as snapshots for the requests."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from appliance.core import CostBasis, EngineStatus, HealthWarning, Snapshot, Target
from appliance.state import State


class StatusPublisher:
    """Keeps targets, engine statuses and warnings, and publishes them together. The only writer of snapshots.

    Every change is published at once: a request must not be sent to an engine that is known to be down.
    """

    def __init__(self, state: State, clock: Callable[[], float], configured: Sequence[Target] = ()) -> None:
        self._state, self._clock = state, clock
        self._configured = tuple(configured)
        self._own: tuple[Target, ...] = ()
        self._served: dict[str, tuple[Target, ...]] = {}
        self._statuses: dict[str, EngineStatus] = {}
        self._warnings: dict[tuple[str, str], HealthWarning] = {}
        self._watts: Mapping[str, tuple[float, CostBasis]] = {}

    def set_configured_targets(self, targets: Sequence[Target]) -> None:
        """Replace the rows of the configured providers, at start and on reload."""
        self._configured = tuple(targets)
        self._publish()

    def set_engine_targets(self, targets: Sequence[Target]) -> None:
        """Replace the rows of this node's own engines; statuses of others are forgotten."""
        self._own = tuple(targets)
        names = {target.name for target in self._own}
        self._statuses = {name: status for name, status in self._statuses.items() if name in names}
        self._publish()

    def set_served_targets(self, engine: str, targets: Sequence[Target]) -> None:
        """Replace an engine's own row by what it serves: one program may be many targets. They share its status."""
        if self._served.get(engine) != tuple(targets):
            self._served[engine] = tuple(targets)
            self._publish()

    def replace_target(self, target: Target) -> None:
        """Put `target` in the place of the row of its name."""
        self._own = tuple(target if one.name == target.name else one for one in self._own)
        self._publish()

    def publish_status(self, status: EngineStatus) -> None:
        self._statuses[status.target] = status
        self._publish()

    def set_watts(self, watts: Mapping[str, tuple[float, CostBasis]]) -> None:
        """Set what engines draw while busy, by target, and how that is known. It replaces what statuses say."""
        if watts != self._watts:
            self._watts = dict(watts)
            self._publish()

    def warn(self, code: str, text: str, about: str = "") -> None:
        """Raise a named condition, or reword it. `about` tells several of one code apart."""
        warning = HealthWarning(code, text)
        if self._warnings.get((code, about)) != warning:
            self._warnings[code, about] = warning
            self._publish()

    def clear(self, code: str, about: str = "") -> None:
        """End a condition, if it is there."""
        if self._warnings.pop((code, about), None) is not None:
            self._publish()

    def _publish(self) -> None:
        own = [row for target in self._own for row in self._served.get(target.name, (target,))]
        statuses = {name: self._with_watts(status) for name, status in self._statuses.items()}
        for engine, targets in self._served.items():
            status = statuses.pop(engine, None)
            if status is not None:
                statuses.update({target.name: replace(status, target=target.name) for target in targets})
        snapshot = Snapshot(
            at=self._clock(),
            targets=(*own, *self._configured),
            engines=statuses,
            warnings=tuple(self._warnings.values()),
        )
        self._state.publish(snapshot)

    def _with_watts(self, status: EngineStatus) -> EngineStatus:
        known = self._watts.get(status.target)
        return status if known is None else replace(status, watts=known[0], watts_basis=known[1])
