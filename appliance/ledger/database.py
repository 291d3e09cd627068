"""Opening the ledger's database, its migrations, and what its errors mean to the operator. Blocking: for threads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from appliance.errors import LedgerUnavailable
from appliance.ledger.sql_engine import (
    find_damage,
    is_sqlite,
    open_read_only_engine,
    open_sql_engine,
    read_reason,
    sqlite_path,
)
from appliance.ledger.tables import REVISIONS

BUSY_SECONDS = 2.0
"""How long to wait for another process's lock: a hosted request waits for its reservation this long at most."""
_WAL_BYTES = 16 * 1024 * 1024
"""The log is cut back to this after a checkpoint, so that one long read does not leave a huge file behind."""


def sqlite_url(path: Path) -> str:
    """The URL of the SQLite ledger at `path`."""
    return URL.create("sqlite", database=str(path)).render_as_string()


def open_writer(url: str) -> Engine:
    """The engine of the one writer, its tables migrated. Raises LedgerUnavailable naming place and remedy."""
    address = _parse(url)
    with explaining_errors(address, "opened"):
        pragmas = ("journal_mode=WAL", f"journal_size_limit={_WAL_BYTES}")
        # Not durable unless asked: NORMAL is good enough for outcomes, not for spend.
        engine = open_sql_engine(address, busy_seconds=BUSY_SECONDS, pragmas=pragmas, durable=False)
        try:
            _bring_up_to_date(engine, address)
        except BaseException:
            engine.dispose()
            raise
    return engine


def open_reader(url: str) -> Engine:
    """An engine that can only read, for two threads at most. Raises LedgerUnavailable when there is nothing to read."""
    address = _parse(url)
    if is_sqlite(address) and not sqlite_path(address).exists():
        raise LedgerUnavailable(
            f"there is no ledger at {address.database!r}: start the node once with this data directory, or name another"
        )
    return open_read_only_engine(address, busy_seconds=BUSY_SECONDS)


def check_revision(connection: Connection, place: str) -> None:
    """Raise LedgerUnavailable unless the tables are those of this version."""
    revision = _revision(connection, place)
    if revision != REVISIONS[-1]:
        raise LedgerUnavailable(
            f"the ledger {place} has an older schema ({revision}): start the node once to migrate it"
        )


@contextmanager
def explaining_errors(url: URL | str, verb: str) -> Iterator[None]:
    """Turn the database's errors into LedgerUnavailable. `verb` is what could not be done: opened, written, read."""
    address = _parse(url) if isinstance(url, str) else url
    try:
        yield
    except (SQLAlchemyError, OSError, ImportError) as error:
        raise LedgerUnavailable(explain_error(error, address, verb)) from error


def explain_error(error: BaseException, url: URL | str, verb: str) -> str:
    """What happened, where, and what to do about it, in one line."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    reason = read_reason(cause)
    return f"the ledger {describe_place(url)} cannot be {verb}: {reason}; {_remedy(reason, cause)}"


def describe_place(url: URL | str) -> str:
    """The file, or the URL without its password: what an operator recognises."""
    address = make_url(url)
    return repr(address.database) if is_sqlite(address) else address.render_as_string(hide_password=True)


_REMEDIES = (
    ("full", "free space on its file system (hosted calls stay refused until it can be written)"),
    ("no space", "free space on its file system (hosted calls stay refused until it can be written)"),
    ("locked", "another process holds it: stop that process"),
    ("readonly", "make the file and its folder writable for this user, or set ledger.url to another place"),
    ("read-only", "make the file and its folder writable for this user, or set ledger.url to another place"),
    ("permission", "make the file and its folder writable for this user, or set ledger.url to another place"),
    ("not a directory", "set ledger.url to a file in a folder"),
    ("unable to open", "check that its folder exists and is writable for this user and that the disk has space"),
    ("not a database", "it is damaged or no ledger: move the file away (a new one is made) or restore a copy"),
    ("malformed", "it is damaged: move the file and its -wal and -shm away (a new one is made) or restore a copy"),
    ("deleted or replaced", "put the file back, or restart the node (hosted calls stay refused until then)"),
    ("disk i/o", "check the disk and the space left on it"),
)


def _remedy(reason: str, cause: BaseException) -> str:
    if isinstance(cause, ImportError | NoSuchModuleError):
        return "install the driver that ledger.url names, or use sqlite:///PATH"
    if isinstance(cause, ArgumentError):
        return "write ledger.url as sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME"
    lowered = reason.lower()
    return next((remedy for words, remedy in _REMEDIES if words in lowered), "check the database and ledger.url")


def _parse(url: str) -> URL:
    try:
        address = make_url(url)
    except ArgumentError as error:
        # The URL may hold a password, so it is not repeated.
        raise LedgerUnavailable(
            "ledger.url is not a database URL: write sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME"
        ) from error
    if is_sqlite(address) and (address.database or ":memory:") == ":memory:":
        raise LedgerUnavailable("ledger.url names a database in memory, which nobody else can read: use sqlite:///PATH")
    return address


def _bring_up_to_date(engine: Engine, address: URL) -> None:
    place = describe_place(address)
    with engine.execution_options(durable=True).begin() as connection:
        # Inside the writing transaction, so that of two nodes that start together one migrates and the other sees it.
        damage = find_damage(connection, address)
        if damage is not None:
            raise LedgerUnavailable(
                f"the ledger {place} cannot be opened: it is damaged ({damage}); "
                "move the file and its -wal and -shm away (a new one is made) or restore a copy"
            )
        if _revision(connection, place) == REVISIONS[-1]:
            return
        from appliance.ledger.migrate import upgrade  # noqa: PLC0415 Alembic: 0.3 s that only a migration needs

        upgrade(connection)


def _revision(connection: Connection, place: str) -> str | None:
    """The revision the tables have; None for an empty database. Raises LedgerUnavailable for one not ours."""
    tables = inspect(connection).get_table_names()
    if "alembic_version" not in tables:
        if tables:
            raise LedgerUnavailable(
                f"the database {place} holds other tables ({', '.join(sorted(tables)[:3])}) and no ledger: "
                "set ledger.url to a place of its own"
            )
        return None
    revision: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    if revision is not None and revision not in REVISIONS:
        raise LedgerUnavailable(
            f"the ledger {place} was written by a newer appliance (schema {revision}; this one knows up to "
            f"{REVISIONS[-1]}): update the appliance, or set ledger.url to another place"
        )
    return revision


class LedgerFile:
    """The file that an engine has open. SQLite would go on writing into one that was deleted, unnoticed."""

    def __init__(self, engine: Engine) -> None:
        self._path = sqlite_path(engine.url) if is_sqlite(engine.url) else None
        self._identity = self._look()

    def check(self) -> None:
        """Raises OSError where the file is not the one that was opened."""
        if self._path is not None and self._look() != self._identity:
            raise OSError("its file was deleted or replaced while the node runs")

    def _look(self) -> tuple[int, int] | None:
        if self._path is None:
            return None
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino
