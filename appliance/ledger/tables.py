"""The ledger's tables, as SQLAlchemy Core. Whoever changes them adds a migration and its name to REVISIONS.

Times named `_at` are wall clock, seconds since the epoch. Money is whole nano-dollars (1e-9 USD), so that sums are
exact whatever their order; at one cent per million tokens a single token still is ten of them.
"""

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, MetaData, String, Table, Text

REVISIONS = ("0001", "0002", "0003")
"""Every revision there is, oldest first: a database that names another one was written by a newer appliance."""

NANO_PER_USD = 1_000_000_000

metadata = MetaData()

decisions = Table(
    "decisions",
    metadata,
    Column("decision_id", String, primary_key=True),
    Column("request_id", String, nullable=False),
    Column("received_at", Float(53), nullable=False),
    Column("endpoint", String, nullable=False),
    Column("model", String, nullable=False),
    Column("key_id", String, nullable=False),
    Column("route", String, nullable=False),
    Column("policy_version", String, nullable=False),
    Column("residency", String, nullable=False),
    Column("residency_reason", Text, nullable=False),
    Column("task", String, nullable=False),
    Column("complexity", Float(53), nullable=False),
    Column("format", String, nullable=False),
    Column("latency_class", String, nullable=False),
    Column("language", String),
    Column("risk", String, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("profile_reasons", Text, nullable=False),
    Column("status", Integer, nullable=False),
    Column("error_code", String),
    Column("stream", Boolean, nullable=False),
    Column("first_byte_seconds", Float(53)),
    Column("total_seconds", Float(53), nullable=False),
    Column("target", String),
    Column("location", String),
    Column("overflowed", Boolean, nullable=False),
    Column("fell_back", Boolean, nullable=False),
    Column("escalated", Boolean, nullable=False),
    Column("left_site", Boolean, nullable=False),
    Index("ix_decisions_received_at", "received_at"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("decision_id", String, primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("received_at", Float(53), nullable=False),
    Column("target", String, nullable=False),
    Column("location", String, nullable=False),
    Column("reason", Text, nullable=False),
    Column("result", String, nullable=False),
    Column("detail", Text, nullable=False),
    Column("started_at", Float(53), nullable=False),
    Column("first_byte_seconds", Float(53)),
    Column("total_seconds", Float(53), nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("cost_nano_usd", BigInteger),
    Column("reservation_id", String),
    # How far the cost is known, and the energy in it; empty in rows from before these were kept.
    Column("cost_basis", String),
    Column("energy_joules", Float(53)),
    Column("energy_basis", String),
    Index("ix_attempts_received_at", "received_at"),
)

exclusions = Table(
    "exclusions",
    metadata,
    Column("decision_id", String, primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("target", String, nullable=False),
    Column("reason", Text, nullable=False),
)

reservations = Table(
    "reservations",
    metadata,
    Column("reservation_id", String, primary_key=True),
    Column("decision_id", String, nullable=False),
    Column("target", String, nullable=False),
    Column("location", String, nullable=False),
    Column("reserved_at", Float(53), nullable=False),
    Column("reserved_nano_usd", BigInteger, nullable=False),
    # Both empty until the call has ended; a reservation that stays open counts as spent.
    Column("settled_at", Float(53)),
    Column("settled_nano_usd", BigInteger),
    # The UTC day and the budgets' scopes (a JSON list) it counts towards; empty where no budget counts it.
    Column("day", Integer),
    Column("scopes", Text),
    Index("ix_reservations_reserved_at", "reserved_at"),
    Index("ix_reservations_decision_id", "decision_id"),
)

spend = Table(
    "spend",
    metadata,
    Column("day", Integer, primary_key=True),
    Column("scope", String, primary_key=True),
    Column("nano_usd", BigInteger, nullable=False),
)
"""Sums of the reservations of a UTC day (in days since the epoch), changed in the same transactions as they are."""

api_keys = Table(
    "api_keys",
    metadata,
    Column("name", String, primary_key=True),
    Column("sha256", String, nullable=False, unique=True),
    # The other settings of a key, as JSON.
    Column("settings", Text, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("revoked_at", Float(53)),
)
