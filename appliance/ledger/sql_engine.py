"""Opening a database the way every store of a node opens its own: file, pragmas, transactions, damage, and reasons.

SQLite for one node, PostgreSQL for many: what SQLite alone needs is done here and nowhere else. The ledger, the jobs'
store and the learning store build on it. Blocking: called from threads.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, text

from appliance.files import OWNER_ONLY

_FULLY_CHECKED_BYTES: Final = 16 * 1024 * 1024
"""Up to this size (some 30,000 decisions) every page is looked at when opening, which takes less than 60 ms. Larger
files show damage in use."""
_READERS: Final = 2


def is_sqlite(address: URL) -> bool:
    return address.get_backend_name() == "sqlite"


def sqlite_path(address: URL) -> Path:
    """The file of a SQLite address."""
    return Path(address.database or "")


def open_sql_engine(
    address: URL, *, busy_seconds: float, pragmas: Sequence[str] = (), durable: bool | None = None
) -> Engine:
    """An engine that may write, its file made where it is missing.

    `busy_seconds` is how long to wait for another process's lock, `pragmas` are SQLite's, set on each connection. With
    `durable` each transaction sets how the log is synced: FULL syncs it before commit returns, NORMAL may lose the last
    commits to a power cut but never to a crash of ours. `engine.execution_options(durable=...)` changes it for some.
    """
    if not is_sqlite(address):
        return create_engine(address, pool_pre_ping=True, hide_parameters=True)
    path = sqlite_path(address)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Made by us, for its owner alone: people's texts may lie in it. SQLite gives its companions the same mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, OWNER_ONLY))
    return _create_sqlite_engine(address, busy_seconds, pragmas, begin="BEGIN IMMEDIATE", durable=durable)


def open_read_only_engine(address: URL, *, busy_seconds: float) -> Engine:
    """An engine that can only read, for a few threads that never wait for the writer. The database must be there."""
    if not is_sqlite(address):
        return create_engine(address, pool_pre_ping=True, hide_parameters=True)
    file = f"file:{quote(str(sqlite_path(address)))}"
    read_only = URL.create("sqlite", database=file, query={"mode": "ro", "uri": "true"})
    return _create_sqlite_engine(read_only, busy_seconds, (), begin="BEGIN", connections=_READERS)


def find_damage(connection: Connection, address: URL) -> str | None:
    """What SQLite finds wrong with the pages of its file; None where nothing is, or the file is too large to look."""
    if not is_sqlite(address) or sqlite_path(address).stat().st_size > _FULLY_CHECKED_BYTES:
        return None
    found = str(connection.execute(text("PRAGMA quick_check(1)")).scalar_one())
    return None if found == "ok" else found.splitlines()[-1]


def read_reason(error: BaseException) -> str:
    """The first line of what the database's driver or the operating system said."""
    cause = getattr(error, "orig", None) or error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    said = str(cause).strip()
    return said.splitlines()[0] if said else type(cause).__name__


def _create_sqlite_engine(
    address: URL,
    busy_seconds: float,
    pragmas: Sequence[str],
    *,
    begin: str,
    connections: int = 1,
    durable: bool | None = None,
) -> Engine:
    engine = create_engine(
        address,
        pool_size=connections,
        max_overflow=0,
        hide_parameters=True,
        connect_args={"timeout": busy_seconds},
        execution_options={} if durable is None else {"durable": durable},
    )

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: Any) -> None:
        # The driver's own transaction handling leaves DDL outside; "begin" below opens every transaction instead.
        connection.isolation_level = None
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def start_transaction(connection: Connection) -> None:
        is_durable = connection.get_execution_options().get("durable")
        if is_durable is not None:
            connection.exec_driver_sql(f"PRAGMA synchronous={'FULL' if is_durable else 'NORMAL'}")
        connection.exec_driver_sql(begin)

    return engine
