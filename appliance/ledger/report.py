"""The report over a period: requests, tokens, cost and energy by target. Pure but for the connection."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, case, distinct, func, or_, select, true

from appliance.core import Location
from appliance.ledger.database import check_revision, describe_place, explaining_errors, open_reader
from appliance.ledger.rows import to_usd
from appliance.ledger.tables import attempts, decisions, reservations


@dataclass(frozen=True, slots=True)
class TargetRow:
    """One target in a period. Tokens and cost are of all attempts at it, answered or not."""

    target: str
    location: Location
    requests: int
    """Requests it answered."""
    share: float
    """Of all answered requests, 0 to 1."""
    attempts: int
    failed_attempts: int
    overflowed_attempts: int
    """Requests it could not have taken in time."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cost_usd: float
    """Known cost, what is reserved and not settled included."""
    unsettled_usd: float
    unsettled: int
    """Reservations without a settlement: calls under way, or cut off by a crash."""
    unpriced_attempts: int
    """Attempts that used tokens at an unknown cost; they are in no sum."""
    energy_joules: float
    """Of the node's own engines, beyond what the machine takes idling."""
    measured_joules: float
    """Of these, counted by the machine's own meters; the rest rests on a power that was configured or assumed."""
    assumed_usd: float
    """Part of `cost_usd` that rests on a power or a price of electricity that is neither configured nor measured."""


@dataclass(frozen=True, slots=True)
class Report:
    """A period, from `since_at` up to and not including `until_at` (wall clock, seconds since the epoch).

    A request belongs to the moment it was received, money to the moment it was reserved.
    """

    since_at: float
    until_at: float
    requests: int
    answered: int
    errors: Mapping[str, int]
    """Requests that ended with status 400 or more, by error code."""
    overflowed: int
    """Requests that at least one target could not have taken in time."""
    fell_back: int
    """Requests that were given to another target after one failed."""
    escalated: int
    """Requests that were given to another target after an answer did not pass verification."""
    bound: Mapping[str, int]
    """Requests bound to the site or a region, by bound."""
    left_site: int
    """Requests that were sent to a hosted target, or may have been."""
    onsite_bound_left: int
    """Of those bound to the site. Anything but 0 is an incident."""
    targets: tuple[TargetRow, ...]
    """Most requests first."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cost_usd: float
    unsettled_usd: float
    unsettled: int
    unpriced_attempts: int
    energy_joules: float
    measured_joules: float
    assumed_usd: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def offline_report(url: str, *, since_at: float, until_at: float) -> Report:
    """The report of a node that may not be running, read-only. Blocking. Raises LedgerUnavailable."""
    with explaining_errors(url, "read"):
        engine = open_reader(url)
        try:
            with engine.connect() as connection:
                check_revision(connection, describe_place(url))
                return read_report(connection, since_at=since_at, until_at=until_at)
        finally:
            engine.dispose()


def read_report(connection: Connection, *, since_at: float, until_at: float) -> Report:
    def within(column: ColumnElement[float]) -> ColumnElement[bool]:
        return and_(column >= since_at, column < until_at)

    totals = _totals(connection, within(decisions.c.received_at))
    answered = _answered_by_target(connection, within(decisions.c.received_at))
    tried = _tried_by_target(connection, within(attempts.c.received_at))
    spent = _spent_by_target(connection, within(reservations.c.reserved_at))
    answered_total = sum(answered.values())
    rows = sorted(
        (_target_row(name, answered.get(name, 0), answered_total, tried, spent) for name in {*tried, *spent}),
        key=lambda row: (-row.requests, row.target),
    )
    nano = sum(_nano(name, tried, spent) for name in {*tried, *spent})
    return Report(
        since_at=since_at,
        until_at=until_at,
        requests=totals["requests"],
        answered=answered_total,
        errors=_counts(connection, decisions.c.error_code, within(decisions.c.received_at), decisions.c.status >= 400),
        overflowed=totals["overflowed"],
        fell_back=totals["fell_back"],
        escalated=totals["escalated"],
        bound=_counts(
            connection, decisions.c.residency, within(decisions.c.received_at), decisions.c.residency != "any"
        ),
        left_site=totals["left_site"] + _cut_off(connection, within(reservations.c.reserved_at)),
        onsite_bound_left=totals["onsite_bound_left"],
        targets=tuple(rows),
        prompt_tokens=sum(row.prompt_tokens for row in rows),
        cached_tokens=sum(row.cached_tokens for row in rows),
        completion_tokens=sum(row.completion_tokens for row in rows),
        reasoning_tokens=sum(row.reasoning_tokens for row in rows),
        cost_usd=to_usd(nano),
        unsettled_usd=to_usd(sum(int(row["unsettled_nano"]) for row in spent.values())),
        unsettled=sum(row.unsettled for row in rows),
        unpriced_attempts=sum(row.unpriced_attempts for row in rows),
        energy_joules=sum(row.energy_joules for row in rows),
        measured_joules=sum(row.measured_joules for row in rows),
        assumed_usd=sum(row.assumed_usd for row in rows),
    )


def _number_of(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)


def _totals(connection: Connection, period: ColumnElement[bool]) -> dict[str, int]:
    left = decisions.c.left_site.is_(true())
    query = select(
        func.count().label("requests"),
        _number_of(decisions.c.overflowed.is_(true())).label("overflowed"),
        _number_of(decisions.c.fell_back.is_(true())).label("fell_back"),
        _number_of(decisions.c.escalated.is_(true())).label("escalated"),
        _number_of(left).label("left_site"),
        _number_of(and_(left, decisions.c.residency == "onsite")).label("onsite_bound_left"),
    ).where(period)
    return {name: int(value) for name, value in connection.execute(query).mappings().one().items()}


def _counts(connection: Connection, column: ColumnElement[Any], *conditions: ColumnElement[bool]) -> dict[str, int]:
    query = select(column, func.count()).where(*conditions).group_by(column).order_by(func.count().desc(), column)
    return {str(value): int(count) for value, count in connection.execute(query)}


def _answered_by_target(connection: Connection, period: ColumnElement[bool]) -> dict[str, int]:
    return _counts(connection, decisions.c.target, period, decisions.c.target.is_not(None))


def _tried_by_target(connection: Connection, period: ColumnElement[bool]) -> dict[str, RowMapping]:
    used = attempts.c.prompt_tokens + attempts.c.completion_tokens > 0
    query = (
        select(
            attempts.c.target,
            func.max(attempts.c.location).label("location"),
            func.count().label("attempts"),
            _number_of(attempts.c.result.in_(("failed", "rejected", "refused"))).label("failed"),
            _number_of(attempts.c.result == "overflowed").label("overflowed"),
            func.sum(attempts.c.prompt_tokens).label("prompt_tokens"),
            func.sum(attempts.c.cached_tokens).label("cached_tokens"),
            func.sum(attempts.c.completion_tokens).label("completion_tokens"),
            func.sum(attempts.c.reasoning_tokens).label("reasoning_tokens"),
            # What was reserved is counted from the reservations, which a lost outcome does not take along.
            func.coalesce(
                func.sum(case((attempts.c.reservation_id.is_(None), attempts.c.cost_nano_usd), else_=0)), 0
            ).label("nano"),
            _number_of(and_(attempts.c.cost_nano_usd.is_(None), attempts.c.reservation_id.is_(None), used)).label(
                "unpriced"
            ),
            func.coalesce(func.sum(attempts.c.energy_joules), 0.0).label("joules"),
            func.coalesce(
                func.sum(case((attempts.c.energy_basis == "measured", attempts.c.energy_joules), else_=0.0)), 0.0
            ).label("measured_joules"),
            func.coalesce(
                func.sum(case((attempts.c.cost_basis == "assumed", attempts.c.cost_nano_usd), else_=0)), 0
            ).label("assumed_nano"),
        )
        .where(period)
        .group_by(attempts.c.target)
    )
    return {row["target"]: row for row in connection.execute(query).mappings()}


def _spent_by_target(connection: Connection, period: ColumnElement[bool]) -> dict[str, RowMapping]:
    is_open = reservations.c.settled_at.is_(None)
    counted = case((is_open, reservations.c.reserved_nano_usd), else_=reservations.c.settled_nano_usd)
    query = (
        select(
            reservations.c.target,
            func.max(reservations.c.location).label("location"),
            func.sum(counted).label("nano"),
            func.sum(case((is_open, reservations.c.reserved_nano_usd), else_=0)).label("unsettled_nano"),
            _number_of(is_open).label("unsettled"),
        )
        .where(period)
        .group_by(reservations.c.target)
    )
    return {row["target"]: row for row in connection.execute(query).mappings()}


def _cut_off(connection: Connection, period: ColumnElement[bool]) -> int:
    """Requests that reserved money and whose outcome was never written."""
    query = (
        select(func.count(distinct(reservations.c.decision_id)))
        .select_from(reservations.outerjoin(decisions, reservations.c.decision_id == decisions.c.decision_id))
        .where(period, decisions.c.decision_id.is_(None), or_(*_may_have_left()))
    )
    return int(connection.execute(query).scalar_one())


def _may_have_left() -> tuple[ColumnElement[bool], ...]:
    # One settled at nothing was cancelled before its call, or cost nothing because nothing was sent.
    return (reservations.c.settled_at.is_(None), reservations.c.settled_nano_usd > 0)


def _nano(name: str, tried: Mapping[str, RowMapping], spent: Mapping[str, RowMapping]) -> int:
    return sum(int(found[name]["nano"]) for found in (tried, spent) if name in found)


def _target_row(
    name: str, requests: int, answered_total: int, tried: Mapping[str, RowMapping], spent: Mapping[str, RowMapping]
) -> TargetRow:
    of_attempts = dict(tried.get(name) or {})
    of_money = dict(spent.get(name) or {})

    def count(column: str) -> int:
        return int(of_attempts.get(column, 0))

    return TargetRow(
        target=name,
        location=(of_attempts or of_money)["location"],
        requests=requests,
        share=requests / answered_total if answered_total else 0.0,
        attempts=count("attempts"),
        failed_attempts=count("failed"),
        overflowed_attempts=count("overflowed"),
        prompt_tokens=count("prompt_tokens"),
        cached_tokens=count("cached_tokens"),
        completion_tokens=count("completion_tokens"),
        reasoning_tokens=count("reasoning_tokens"),
        cost_usd=to_usd(_nano(name, tried, spent)),
        unsettled_usd=to_usd(int(of_money.get("unsettled_nano", 0))),
        unsettled=int(of_money.get("unsettled", 0)),
        unpriced_attempts=count("unpriced"),
        energy_joules=float(of_attempts.get("joules", 0.0)),
        measured_joules=float(of_attempts.get("measured_joules", 0.0)),
        assumed_usd=to_usd(count("assumed_nano")),
    )
