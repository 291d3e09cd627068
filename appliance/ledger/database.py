"""Opening the database, and every sentence that depends on which one it is. Blocking: never called on the event loop.

SQLite and PostgreSQL differ here and nowhere else: pragmas, who may write, and what an error means to the operator.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from appliance.errors import LedgerUnavailable
from appliance.ledger.tables import REVISIONS

BUSY_SECONDS = 2.0
"""How long to wait for another process's lock: a hosted request waits for its reservation this long at most."""
_WAL_BYTES = 16 * 1024 * 1024
"""The log is cut back to this after a checkpoint, so that one long read does not leave a huge file behind."""
_FULLY_CHECKED_BYTES = 16 * 1024 * 1024
"""Up to this size (some 30,000 decisions) every page is looked at when opening, which takes less than 60 ms. Larger
ledgers show damage in use."""


def sqlite_url(path: Path) -> str:
    """The URL of the SQLite ledger at `path`."""
    return URL.create("sqlite", database=str(path)).render_as_string()


def open_writer(url: str) -> Engine:
    """The engine of the one writer, its tables migrated. Raises LedgerUnavailable naming place and remedy."""
    address = _parse(url)
    with explaining_errors(address, "opened"):
        _create_file(address)
        engine = _create_engine(address, address)
        try:
            _bring_up_to_date(engine, address)
        except BaseException:
            engine.dispose()
            raise
    return engine


def open_reader(url: str) -> Engine:
    """An engine that can only read, for two threads at most. Raises LedgerUnavailable when there is nothing to read."""
    address = _parse(url)
    if _is_sqlite(address):
        path = Path(address.database or "")
        if not path.exists():
            raise LedgerUnavailable(
                f"there is no ledger at {str(path)!r}: start the node once with this data directory, or name another"
            )
        read_only = URL.create("sqlite", database=f"file:{quote(str(path))}", query={"mode": "ro", "uri": "true"})
        engine = _create_engine(read_only, address)
    else:
        engine = _create_engine(address, address)
    return engine


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
    reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    if isinstance(cause, OSError):
        reason = cause.strerror or reason
    return f"the ledger {describe_place(url)} cannot be {verb}: {reason}; {_remedy(reason, cause)}"


def describe_place(url: URL | str) -> str:
    """The file, or the URL without its password: what an operator recognises."""
    address = make_url(url)
    return repr(address.database) if _is_sqlite(address) else address.render_as_string(hide_password=True)


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
    if _is_sqlite(address) and (address.database or ":memory:") == ":memory:":
        raise LedgerUnavailable("ledger.url names a database in memory, which nobody else can read: use sqlite:///PATH")
    return address


def _is_sqlite(address: URL) -> bool:
    return address.get_backend_name() == "sqlite"


def _create_file(address: URL) -> None:
    """Make the file ourselves, readable by its owner alone; SQLite gives its companions the same mode."""
    if _is_sqlite(address):
        path = Path(address.database or "")
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def _create_engine(address: URL, original: URL) -> Engine:
    if not _is_sqlite(address):
        return create_engine(address, pool_pre_ping=True, hide_parameters=True)
    can_write = address is original
    # One connection for the writer; a few for readers, who never wait for it nor for each other.
    engine = create_engine(
        address,
        pool_size=1 if can_write else 2,
        max_overflow=0,
        hide_parameters=True,
        connect_args={"timeout": BUSY_SECONDS},
    )

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: Any) -> None:
        # The driver's own transaction handling leaves DDL outside; "begin" below opens every transaction instead.
        connection.isolation_level = None
        if can_write:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(f"PRAGMA journal_size_limit={_WAL_BYTES}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if not can_write:
            connection.exec_driver_sql("BEGIN")
            return
        # FULL syncs the log before commit returns. NORMAL may lose the last commits to a power cut, never to a crash of
        # ours: good enough for what is told, not for what is spent.
        durable = connection.get_execution_options().get("durable", False)
        connection.exec_driver_sql(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _bring_up_to_date(engine: Engine, address: URL) -> None:
    place = describe_place(address)
    with engine.execution_options(durable=True).begin() as connection:
        # Inside the writing transaction, so that of two nodes that start together one migrates and the other sees it.
        if _is_sqlite(address):
            _check_pages(connection, Path(address.database or ""), place)
        if _revision(connection, place) == REVISIONS[-1]:
            return
        from appliance.ledger.migrate import upgrade  # noqa: PLC0415 Alembic: 0.3 s that only a migration needs

        upgrade(connection)


def _check_pages(connection: Connection, path: Path, place: str) -> None:
    if path.stat().st_size > _FULLY_CHECKED_BYTES:
        return
    found = connection.execute(text("PRAGMA quick_check(1)")).scalar_one()
    if found != "ok":
        raise LedgerUnavailable(
            f"the ledger {place} cannot be opened: it is damaged ({str(found).splitlines()[-1]}); "
            "move the file and its -wal and -shm away (a new one is made) or restore a copy"
        )


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
    """The file that an engine has open. SQLite would go on writing into one that was deleted, and nobody would know."""

    def __init__(self, engine: Engine) -> None:
        self._path = Path(engine.url.database or "") if _is_sqlite(engine.url) else None
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
