"""One decision's story, as the ledger has it: the request, its attempts, what was left out, and the money."""

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, Table, select

from appliance.ledger.rows import to_usd
from appliance.ledger.tables import attempts, decisions, exclusions, reservations


def read_decision(connection: Connection, decision_id: str) -> Mapping[str, Any] | None:
    """The story as plain data. `cost_usd` is None where an attempt used tokens at an unknown cost.

    A reservation without a decision is the trace of a request that a crash cut off: its story has `status` None.
    """
    row = connection.execute(select(decisions).where(decisions.c.decision_id == decision_id)).mappings().first()
    reserved = _of(connection, reservations, decision_id, reservations.c.reserved_at)
    if row is None and not reserved:
        return None
    tried = _of(connection, attempts, decision_id, attempts.c.position)
    excluded = _of(connection, exclusions, decision_id, exclusions.c.position)
    is_priced = all(
        attempt["cost_nano_usd"] is not None or attempt["reservation_id"] or not _tokens(attempt) for attempt in tried
    )
    nano = sum(attempt["cost_nano_usd"] or 0 for attempt in tried if not attempt["reservation_id"])
    nano += sum(_counted(reservation) for reservation in reserved)
    return {
        "id": decision_id,
        **_request_story(row),
        "attempts": [_attempt_story(attempt) for attempt in tried],
        "excluded": [{"target": item["target"], "reason": item["reason"]} for item in excluded],
        "reservations": [_reservation_story(reservation) for reservation in reserved],
        "cost_usd": to_usd(nano) if is_priced else None,
        "cost_is_final": all(reservation["settled_at"] is not None for reservation in reserved),
    }


_PROFILE = ("task", "complexity", "format", "latency_class", "language", "risk", "prompt_tokens", "output_tokens")
_REQUEST = (
    "request_id",
    "received_at",
    "endpoint",
    "model",
    "key_id",
    "route",
    "policy_version",
    "residency",
    "residency_reason",
    "status",
    "error_code",
    "stream",
    "first_byte_seconds",
    "total_seconds",
    "target",
    "location",
)
_ATTEMPT = (
    "target",
    "location",
    "reason",
    "result",
    "detail",
    "started_at",
    "first_byte_seconds",
    "total_seconds",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "reasoning_tokens",
    "reservation_id",
    "cost_basis",
    "energy_joules",
    "energy_basis",
)


def _request_story(row: RowMapping | None) -> dict[str, Any]:
    if row is None:
        return {**dict.fromkeys(_REQUEST), "profile": None}
    profile = {name: row[name] for name in _PROFILE} | {"reasons": json.loads(row["profile_reasons"])}
    return {name: row[name] for name in _REQUEST} | {"profile": profile}


def _attempt_story(row: RowMapping) -> dict[str, Any]:
    nano = row["cost_nano_usd"]
    return {name: row[name] for name in _ATTEMPT} | {"cost_usd": None if nano is None else to_usd(nano)}


def _reservation_story(row: RowMapping) -> dict[str, Any]:
    settled = row["settled_nano_usd"]
    return {
        "id": row["reservation_id"],
        "target": row["target"],
        "reserved_at": row["reserved_at"],
        "reserved_usd": to_usd(row["reserved_nano_usd"]),
        "settled_usd": None if settled is None else to_usd(settled),
    }


def _counted(row: RowMapping) -> int:
    return int(row["reserved_nano_usd"] if row["settled_nano_usd"] is None else row["settled_nano_usd"])


def _tokens(row: RowMapping) -> int:
    return int(row["prompt_tokens"] + row["completion_tokens"])


def _of(connection: Connection, table: Table, decision_id: str, order: ColumnElement[Any]) -> list[RowMapping]:
    found = connection.execute(select(table).where(table.c.decision_id == decision_id).order_by(order))
    return list(found.mappings())
