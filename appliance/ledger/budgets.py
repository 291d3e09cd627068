"""Spending caps, kept in the transaction that reserves: what is over a cap is refused before the call leaves.

Spend is counted by UTC day and scope: `all`, `provider:NAME`, `route:NAME`, `key:NAME`. A reservation counts with its
full amount until it is settled, so that calls under way together cannot overshoot a cap; one that a crash left open
goes on counting until its day is over, because what it cost is not known.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sqlalchemy import Connection, bindparam, insert, select, update

from appliance.errors import BudgetExceeded
from appliance.ledger.rows import to_nano, to_usd
from appliance.ledger.tables import reservations, spend

_SECONDS_PER_DAY = 86_400
_MOST_NANO = 2**62
"""What a database's column of integers holds, and one call more; 4.6 milliards of dollars."""


@dataclass(frozen=True, slots=True)
class SpendCap:
    """What may be spent on hosted calls in one UTC day within `scope`; None: it is counted and not limited."""

    scope: str
    limit_usd: float | None = None


def utc_day(at: float) -> int:
    """The UTC day of a wall-clock moment, in days since the epoch."""
    return int(at // _SECONDS_PER_DAY)


class SpendSums:
    """The sums of one transaction: read when first needed, changed here, written together by `write`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sums: dict[tuple[int, str], int] = {}
        self._stored: set[tuple[int, str]] = set()
        self._changed: set[tuple[int, str]] = set()

    def reserve(self, caps: Sequence[SpendCap], nano: int, at: float) -> Mapping[str, int]:
        """Count `nano` towards every cap, or raise BudgetExceeded and count nothing. Returns the new sums by scope."""
        day = utc_day(at)
        self._read(day, [cap.scope for cap in caps])
        for cap in caps:
            spent = self._sums[day, cap.scope]
            if spent + nano > _MOST_NANO:
                raise BudgetExceeded(f"this call may cost {to_usd(nano):.3g} USD, more than is ever spent in a day")
            if cap.limit_usd is not None and spent + nano > to_nano(cap.limit_usd):
                raise BudgetExceeded(
                    f"the daily budget of {cap.scope} is {cap.limit_usd:g} USD, {to_usd(spent):.6f} of it is spent or "
                    f"reserved, and this call may cost {to_usd(nano):.6f}: raise it, or wait for the next UTC day",
                    retry_after_seconds=(day + 1) * _SECONDS_PER_DAY - at,
                )
        return {cap.scope: self._add(day, cap.scope, nano) for cap in caps}

    def settle(self, settlements: Sequence["SettledSpend"]) -> None:
        """Put down what reserved calls cost, and give back what they did not. The first settlement of each stands."""
        by_id = {one.reservation_id: one for one in reversed(settlements)}
        table = reservations.c
        is_open = table.reservation_id.in_(by_id) & table.settled_at.is_(None)
        columns = (table.reservation_id, table.day, table.scopes, table.reserved_nano_usd)
        rows = self._connection.execute(select(*columns).where(is_open).with_for_update()).all()
        if not rows:
            return
        values = [{"id": row.reservation_id, **_values(by_id[row.reservation_id])} for row in rows]
        self._connection.execute(_SETTLE, values)
        for row in rows:
            if row.day is None:
                continue
            scopes = json.loads(row.scopes)
            self._read(row.day, scopes)
            for scope in scopes:
                self._add(row.day, scope, by_id[row.reservation_id].nano_usd - row.reserved_nano_usd)

    def write(self) -> None:
        new = [key for key in self._changed if key not in self._stored]
        if new:
            rows = [{"day": day, "scope": scope, "nano_usd": self._sums[day, scope]} for day, scope in new]
            self._connection.execute(insert(spend), rows)
        old = [key for key in self._changed if key in self._stored]
        if old:
            changes = [{"on": day, "of": scope, "to": self._sums[day, scope]} for day, scope in old]
            self._connection.execute(_SUM, changes)

    def _read(self, day: int, scopes: Sequence[str]) -> None:
        missing = [scope for scope in scopes if (day, scope) not in self._sums]
        if not missing:
            return
        wanted = (spend.c.day == day) & spend.c.scope.in_(missing)
        # Locked, so that several nodes on one database count one after another; SQLite has one writer anyway.
        query = select(spend.c.scope, spend.c.nano_usd).where(wanted).with_for_update()
        found = {row.scope: row.nano_usd for row in self._connection.execute(query)}
        self._stored.update((day, scope) for scope in found)
        self._sums.update({(day, scope): found.get(scope, 0) for scope in missing})

    def _add(self, day: int, scope: str, nano: int) -> int:
        after = max(0, self._sums[day, scope] + nano)
        self._sums[day, scope] = after
        self._changed.add((day, scope))
        return after


class SettledSpend(Protocol):
    @property
    def reservation_id(self) -> str: ...

    @property
    def nano_usd(self) -> int: ...

    @property
    def at(self) -> float: ...


def _values(settled: SettledSpend) -> dict[str, float | int]:
    return {"nano": settled.nano_usd, "at": settled.at}


_SETTLE = (
    update(reservations)
    .where(reservations.c.reservation_id == bindparam("id"))
    .values(settled_at=bindparam("at"), settled_nano_usd=bindparam("nano"))
)
_SUM = (
    update(spend)
    .where((spend.c.day == bindparam("on")) & (spend.c.scope == bindparam("of")))
    .values(nano_usd=bindparam("to"))
)
