"""A database that one room keeps for itself beside the ledger: a thread of its own, one transaction a call, and tables
of one version, which is written into a table `about`."""

import asyncio
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from sqlalchemy import URL, Connection, Engine, MetaData, create_engine, event, insert, make_url, select, update
from sqlalchemy.exc import SQLAlchemyError

from appliance.errors import ApplianceError, StorageFull, Unavailable
from appliance.files import OWNER_ONLY

Found = TypeVar("Found")

_BUSY_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """What a room keeps, and the words for what can go wrong with it."""

    name: str
    """Of its thread."""
    metadata: MetaData
    version: int
    pragmas: tuple[str, ...]
    """For SQLite, at each connection."""
    unavailable: type[Unavailable]
    cannot_grow: str
    """With `{reason}`, as `cannot_be_used`."""
    cannot_be_used: str
    other_version: str
    """With `{place}`, and what versions it has (`{found}`) and should have (`{known}`)."""
    adds_to: int | None = None
    """An older version that this one only adds tables to."""

    def explain_error(self, error: Exception) -> ApplianceError:
        cause = getattr(error, "orig", None) or error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        if "full" in reason or "No space" in reason:
            return StorageFull(self.cannot_grow.format(reason=reason), retry_after_seconds=30)
        return self.unavailable(self.cannot_be_used.format(reason=reason))


class SqliteStore:
    """Open it with what the room keeps, and `close` it. Raises its `unavailable`, or StorageFull where the disk has no
    room, from any method."""

    def __init__(self, engine: Engine, kept: StoreSpec) -> None:
        self._engine, self._kept = engine, kept
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=kept.name)

    @classmethod
    async def _opened(cls, url: URL | str, kept: StoreSpec) -> Self:
        """The database at `url`, an SQLAlchemy address, made where it is not there."""
        return cls(await asyncio.to_thread(_open, url, kept), kept)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.dispose)
        self._thread.shutdown(wait=False)

    async def _transact(self, work: Callable[[Connection], Found]) -> Found:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact_blocking, work)

    def _transact_blocking(self, work: Callable[[Connection], Found]) -> Found:
        try:
            with self._engine.begin() as connection:
                return work(connection)
        except SQLAlchemyError as error:
            raise self._kept.explain_error(error) from error


def _open(url: URL | str, kept: StoreSpec) -> Engine:
    try:
        address = make_url(url)
        engine = _make_engine(address, kept)
        kept.metadata.create_all(engine)
        found = _version(engine, kept)
    except (SQLAlchemyError, OSError, ImportError) as error:
        raise kept.explain_error(error) from error
    if found != kept.version:
        engine.dispose()
        raise kept.unavailable(kept.other_version.format(place=address.database, found=found, known=kept.version))
    return engine


def _make_engine(address: URL, kept: StoreSpec) -> Engine:
    is_sqlite = address.get_backend_name() == "sqlite"
    more: Mapping[str, Any] = {"pool_size": 1, "connect_args": {"timeout": _BUSY_SECONDS}} if is_sqlite else {}
    if is_sqlite:
        path = Path(address.database or "")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Callers' texts may lie in it: its owner alone may read it.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, OWNER_ONLY))
    engine = create_engine(address, hide_parameters=True, **more)
    if is_sqlite:

        def set_up(connection: Any, _record: Any) -> None:
            connection.isolation_level = None
            for pragma in kept.pragmas:
                connection.execute(f"PRAGMA {pragma}")

        event.listen(engine, "connect", set_up)
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def _version(engine: Engine, kept: StoreSpec) -> int:
    """Of the tables that are there, brought up to date where nothing but tables was missing."""
    about = kept.metadata.tables["about"]
    with engine.begin() as connection:
        known = connection.execute(select(about.c.version)).scalars().all()
        if not known:
            connection.execute(insert(about), [{"version": kept.version}])
        elif known[0] == kept.adds_to:
            connection.execute(update(about).values(version=kept.version))
        else:
            return int(known[0])
    return kept.version
