"""The first tables: decisions, attempts, exclusions, reservations."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "decisions",
        sa.Column("decision_id", sa.String, primary_key=True),
        sa.Column("request_id", sa.String, nullable=False),
        sa.Column("received_at", sa.Float(53), nullable=False),
        sa.Column("endpoint", sa.String, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("key_id", sa.String, nullable=False),
        sa.Column("route", sa.String, nullable=False),
        sa.Column("policy_version", sa.String, nullable=False),
        sa.Column("residency", sa.String, nullable=False),
        sa.Column("residency_reason", sa.Text, nullable=False),
        sa.Column("task", sa.String, nullable=False),
        sa.Column("complexity", sa.Float(53), nullable=False),
        sa.Column("format", sa.String, nullable=False),
        sa.Column("latency_class", sa.String, nullable=False),
        sa.Column("language", sa.String),
        sa.Column("risk", sa.String, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.Column("profile_reasons", sa.Text, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("error_code", sa.String),
        sa.Column("stream", sa.Boolean, nullable=False),
        sa.Column("first_byte_seconds", sa.Float(53)),
        sa.Column("total_seconds", sa.Float(53), nullable=False),
        sa.Column("target", sa.String),
        sa.Column("location", sa.String),
        sa.Column("overflowed", sa.Boolean, nullable=False),
        sa.Column("fell_back", sa.Boolean, nullable=False),
        sa.Column("escalated", sa.Boolean, nullable=False),
        sa.Column("left_site", sa.Boolean, nullable=False),
    )
    op.create_index("ix_decisions_received_at", "decisions", ["received_at"])
    op.create_table(
        "attempts",
        sa.Column("decision_id", sa.String, primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("received_at", sa.Float(53), nullable=False),
        sa.Column("target", sa.String, nullable=False),
        sa.Column("location", sa.String, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("result", sa.String, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("started_at", sa.Float(53), nullable=False),
        sa.Column("first_byte_seconds", sa.Float(53)),
        sa.Column("total_seconds", sa.Float(53), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger, nullable=False),
        sa.Column("cost_nano_usd", sa.BigInteger),
        sa.Column("reservation_id", sa.String),
    )
    op.create_index("ix_attempts_received_at", "attempts", ["received_at"])
    op.create_table(
        "exclusions",
        sa.Column("decision_id", sa.String, primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("target", sa.String, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
    )
    op.create_table(
        "reservations",
        sa.Column("reservation_id", sa.String, primary_key=True),
        sa.Column("decision_id", sa.String, nullable=False),
        sa.Column("target", sa.String, nullable=False),
        sa.Column("location", sa.String, nullable=False),
        sa.Column("reserved_at", sa.Float(53), nullable=False),
        sa.Column("reserved_nano_usd", sa.BigInteger, nullable=False),
        sa.Column("settled_at", sa.Float(53)),
        sa.Column("settled_nano_usd", sa.BigInteger),
    )
    op.create_index("ix_reservations_reserved_at", "reservations", ["reserved_at"])
    op.create_index("ix_reservations_decision_id", "reservations", ["decision_id"])
