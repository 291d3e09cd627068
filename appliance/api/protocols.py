"""What the API needs of the packages below. `serve` gives the real ones, tests give stand-ins."""

from collections.abc import Mapping
from typing import Any, Protocol

from appliance.core import Snapshot


class SnapshotSource(Protocol):
    @property
    def snapshot(self) -> Snapshot: ...


class LedgerStatus(Protocol):
    @property
    def ok(self) -> bool: ...

    @property
    def reason(self) -> str: ...

    @property
    def pending(self) -> int: ...

    @property
    def dropped(self) -> int: ...


class LedgerReader(Protocol):
    def health(self) -> LedgerStatus: ...

    async def read_decision(self, decision_id: str) -> Mapping[str, Any] | None: ...


class MetricsPage(Protocol):
    def observe_snapshot(self, snapshot: Snapshot) -> None: ...

    def observe_ledger(self, health: LedgerStatus) -> None: ...

    def render(self) -> tuple[bytes, str]: ...
