"""The migrations make exactly the tables that the code uses, whole or not at all, and cost nothing when up to date."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_mock_engine
from sqlalchemy.dialects import postgresql

from appliance.errors import LedgerUnavailable
from appliance.ledger import database, migrate
from appliance.ledger import tables as schema
from appliance.ledger.report import offline_report
from appliance.ledger.store import Ledger
from appliance.ledger.writer import _PROBE
from tests.ledger.samples import NOW_AT, outcome, url_in


def test_the_migrations_make_the_tables_that_the_code_uses(tmp_path: Path) -> None:
    engine = database.open_writer(url_in(tmp_path))
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), schema.metadata)
    engine.dispose()

    assert differences == []


def test_every_revision_is_known_by_name() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrate.__file__).with_name("migrations")))
    revisions = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]

    assert tuple(reversed(revisions)) == schema.REVISIONS


def test_a_migration_that_breaks_off_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks_off(connection: object) -> None:
        upgrade(connection)  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    upgrade = migrate.upgrade
    monkeypatch.setattr(migrate, "upgrade", breaks_off)
    with pytest.raises(LedgerUnavailable, match="No space left on device; free space"):
        database.open_writer(url_in(tmp_path))

    connection = sqlite3.connect(tmp_path / "ledger.db")
    tables = connection.execute("SELECT name FROM sqlite_master").fetchall()
    connection.close()
    assert tables == []


@pytest.mark.anyio
async def test_an_older_ledger_keeps_its_rows_and_a_reader_says_it_must_be_migrated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = await Ledger.open(url_in(tmp_path))
    ledger.record(outcome())
    await ledger.close()

    monkeypatch.setattr(database, "REVISIONS", (*schema.REVISIONS, "9999"))

    with pytest.raises(LedgerUnavailable, match="older schema"):
        offline_report(url_in(tmp_path), since_at=0, until_at=NOW_AT + 1)
    again = await Ledger.open(url_in(tmp_path))
    assert await again.read_decision("dec_1") is not None
    await again.close()


_OPENS_TWICE = """
import sys
from appliance.ledger.database import open_writer
open_writer(sys.argv[1]).dispose()
print("alembic" in sys.modules)
"""


def test_alembic_is_imported_only_when_there_is_something_to_migrate(tmp_path: Path) -> None:
    printed = [
        subprocess.run(
            [sys.executable, "-c", _OPENS_TWICE, url_in(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        ).stdout.strip()
        for _ in range(2)
    ]

    assert printed == ["True", "False"]


def test_the_same_tables_and_statements_are_valid_postgresql() -> None:
    statements: list[str] = []
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    engine = create_mock_engine(
        "postgresql+psycopg://", lambda sql, *_: statements.append(str(sql.compile(dialect=dialect)))
    )
    schema.metadata.create_all(engine, checkfirst=False)

    assert sum("CREATE TABLE" in statement for statement in statements) == 6
    assert str(_PROBE.compile(dialect=dialect)).startswith("UPDATE alembic_version")
