"""Brings a database up to the newest revision. A module of its own, because importing Alembic takes 0.3 s."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection


def upgrade(connection: Connection) -> None:
    """Run what is missing on `connection`, inside its open transaction: all of it, or nothing."""
    config = Config()
    # "%" would be read as interpolation by the ini parser underneath.
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
