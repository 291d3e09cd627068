"""A store that a package keeps beside the ledger: a thread of its own, one transaction a call, and tables of one
version, which is written into a table `about`."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Self, TypeVar

from sqlalchemy import URL, Connection, Engine, MetaData, insert, make_url, select, update
from sqlalchemy.exc import SQLAlchemyError

from appliance.errors import ApplianceError, StorageFull, Unavailable
from appliance.ledger.sql_engine import find_damage, open_sql_engine, read_reason

Found = TypeVar("Found")

_BUSY_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """A store's tables, and the words for what can go wrong with it."""

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
        reason = read_reason(error)
        if "full" in reason or "No space" in reason:
            return StorageFull(self.cannot_grow.format(reason=reason), retry_after_seconds=30)
        return self.unavailable(self.cannot_be_used.format(reason=reason))


class SqliteStore:
    """`open` it, and `close` it. Every method raises the spec's `unavailable`, or StorageFull for want of space."""

    def __init__(self, engine: Engine, spec: StoreSpec) -> None:
        self._engine, self._spec = engine, spec
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=spec.name)

    @classmethod
    async def _open(cls, url: URL | str, spec: StoreSpec) -> Self:
        """The database at `url`, an SQLAlchemy address, made where it is not there."""
        return cls(await asyncio.to_thread(_open_engine, url, spec), spec)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.dispose)
        self._thread.shutdown(wait=False)

    async def _transact(self, work: Callable[[Connection], Found]) -> Found:
        """Run `work` in a transaction of its own, in the store's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact_blocking, work)

    def _transact_blocking(self, work: Callable[[Connection], Found]) -> Found:
        try:
            with self._engine.begin() as connection:
                return work(connection)
        except SQLAlchemyError as error:
            raise self._spec.explain_error(error) from error


def _open_engine(url: URL | str, spec: StoreSpec) -> Engine:
    try:
        address = make_url(url)
        engine = open_sql_engine(address, busy_seconds=_BUSY_SECONDS, pragmas=spec.pragmas)
        try:
            _prepare_tables(engine, address, spec)
        except BaseException:
            engine.dispose()
            raise
    except (SQLAlchemyError, OSError, ImportError) as error:
        raise spec.explain_error(error) from error
    return engine


def _prepare_tables(engine: Engine, address: URL, spec: StoreSpec) -> None:
    """Make what is missing. Tables of another version are refused, unless only tables are missing in them."""
    about = spec.metadata.tables["about"]
    with engine.begin() as connection:
        damage = find_damage(connection, address)
        if damage is not None:
            raise spec.unavailable(spec.cannot_be_used.format(reason=f"it is damaged: {damage}"))
        spec.metadata.create_all(connection)
        found = connection.execute(select(about.c.version)).scalars().first()
        if found is None:
            connection.execute(insert(about), [{"version": spec.version}])
        elif found == spec.adds_to:
            connection.execute(update(about).values(version=spec.version))
        elif found != spec.version:
            raise spec.unavailable(spec.other_version.format(place=address.database, found=found, known=spec.version))
