"""Budgets and API keys: what was spent by day and scope, and who may ask."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("reservations", sa.Column("day", sa.Integer))
    op.add_column("reservations", sa.Column("scopes", sa.Text))
    op.create_table(
        "spend",
        sa.Column("day", sa.Integer, primary_key=True),
        sa.Column("scope", sa.String, primary_key=True),
        sa.Column("nano_usd", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "api_keys",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("sha256", sa.String, nullable=False, unique=True),
        sa.Column("settings", sa.Text, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("revoked_at", sa.Float(53)),
    )
