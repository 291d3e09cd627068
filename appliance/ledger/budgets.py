"""Spending caps, kept in the transaction that reserves: what is over a cap is refused before the call leaves.

Spend is counted by UTC day and scope: `all`, `provider:NAME`, `route:NAME`, `key:NAME`. A reservation counts with its
full amount until it is settled, so that calls under way together cannot overshoot a cap; one that a crash left open
goes on counting until its day is over, because what it cost is not known.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from appliance.errors import BudgetExceeded
from appliance.ledger.rows import to_nano, to_usd
from appliance.ledger.schema import reservations, spend

_SECONDS_PER_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Cap:
    """What may be spent on hosted calls in one UTC day within `scope`; None: it is counted and not limited."""

    scope: str
    limit_usd: float | None = None


def day_of(at: float) -> int:
    """The UTC day of a wall-clock moment, in days since the epoch."""
    return int(at // _SECONDS_PER_DAY)


def hold(connection: Connection, caps: Sequence[Cap], nano: int, at: float) -> Mapping[str, int]:
    """Count `nano` towards every cap, or raise BudgetExceeded and count nothing. Returns the new sums by scope."""
    day = day_of(at)
    before = _spent(connection, day, [cap.scope for cap in caps])
    for cap in caps:
        spent = before.get(cap.scope, 0)
        if cap.limit_usd is not None and spent + nano > to_nano(cap.limit_usd):
            raise BudgetExceeded(
                f"the daily budget of {cap.scope} is {cap.limit_usd:g} USD, {to_usd(spent):.6f} of it is spent or "
                f"reserved, and this call may cost {to_usd(nano):.6f}: raise the budget, or wait for the next UTC day",
                retry_after_seconds=(day + 1) * _SECONDS_PER_DAY - at,
            )
    return {cap.scope: _add(connection, day, cap.scope, before.get(cap.scope), nano) for cap in caps}


def settle(connection: Connection, reservation_id: str, nano: int, at: float) -> None:
    """Put down what a reserved call cost, and give back what it did not. The first settlement stands."""
    table = reservations.c
    is_open = (table.reservation_id == reservation_id) & table.settled_at.is_(None)
    row = connection.execute(
        select(table.day, table.scopes, table.reserved_nano_usd).where(is_open).with_for_update()
    ).first()
    if row is None:
        return
    connection.execute(update(reservations).where(is_open).values(settled_at=at, settled_nano_usd=nano))
    if row.day is None:
        return
    scopes = json.loads(row.scopes)
    for scope, spent in _spent(connection, row.day, scopes).items():
        _add(connection, row.day, scope, spent, nano - row.reserved_nano_usd)


def spent_usd(connection: Connection, at: float) -> Mapping[str, float]:
    """What is spent or reserved so far on the UTC day of `at`, by scope."""
    rows = connection.execute(select(spend.c.scope, spend.c.nano_usd).where(spend.c.day == day_of(at)))
    return {scope: to_usd(nano) for scope, nano in rows}


def _spent(connection: Connection, day: int, scopes: Sequence[str]) -> dict[str, int]:
    if not scopes:
        return {}
    wanted = (spend.c.day == day) & spend.c.scope.in_(scopes)
    # Locked, so that several nodes on one database count one after another; SQLite has one writer anyway.
    rows = connection.execute(select(spend.c.scope, spend.c.nano_usd).where(wanted).with_for_update())
    return {row.scope: row.nano_usd for row in rows}


def _add(connection: Connection, day: int, scope: str, before: int | None, nano: int) -> int:
    after = max(0, (before or 0) + nano)
    if before is None:
        connection.execute(insert(spend).values(day=day, scope=scope, nano_usd=after))
    else:
        here = (spend.c.day == day) & (spend.c.scope == scope)
        connection.execute(update(spend).where(here).values(nano_usd=after))
    return after
