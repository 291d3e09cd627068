"""Energy: joules of an attempt, and how far they and its cost are known."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("attempts", sa.Column("cost_basis", sa.String))
    op.add_column("attempts", sa.Column("energy_joules", sa.Float(53)))
    op.add_column("attempts", sa.Column("energy_basis", sa.String))
