"""What is known of files, batches and lines, durably: every method is one transaction, in the store's own thread."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from sqlalchemy import (
    Connection,
    RowMapping,
    Select,
    Table,
    and_,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)

from appliance.core import Usage
from appliance.errors import JobsUnavailable
from appliance.jobs.models import ENDED, Batch, BatchLine, BatchProblem, LineCounts, ProviderBatch, StoredFile
from appliance.jobs.storage.tables import (
    ADDS_TO,
    ANSWERED,
    FAILED,
    POSTED,
    VERSION,
    WAITING,
    batches,
    files,
    lines,
    metadata,
    parcels,
    tickets,
)
from appliance.ledger.sqlite_store import SqliteStore, StoreSpec


@dataclass(frozen=True, slots=True)
class ResultPosition:
    """Where in its batch's input a line is."""

    number: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class CopiedLine:
    """A line that waits for nothing but the answer of an identical, deterministic one."""

    position: ResultPosition
    state: int
    result_offset: int
    result_length: int


@dataclass(frozen=True, slots=True)
class FinishedLine:
    """A line's end: its state, and where its result lies if others are to copy it."""

    number: int
    state: int
    result_offset: int | None = None
    result_length: int | None = None


STORE_SPEC: Final = StoreSpec(
    name="jobs-store",
    metadata=metadata,
    version=VERSION,
    adds_to=ADDS_TO,
    # A commit is on disk when it returns: results that were paid for must not be asked for again after a power cut.
    pragmas=("journal_mode=WAL", "synchronous=FULL"),
    unavailable=JobsUnavailable,
    cannot_grow="the jobs' database cannot grow ({reason}): free space on its disk",
    cannot_be_used="the jobs' database cannot be used ({reason}): check its folder and its disk",
    other_version="the jobs' database has tables of version {found}, this appliance knows {known}",
)


class JobStore(SqliteStore):
    """`open` it, and `close` it. Every method raises JobsUnavailable, or StorageFull where the disk is full."""

    @classmethod
    async def open(cls, url: str) -> "JobStore":
        """Open or make the database at `url`, an SQLAlchemy address."""
        return await cls._open(url, STORE_SPEC)

    # Files.

    async def add_file(self, file: StoredFile) -> None:
        await self._transact(lambda connection: connection.execute(insert(files), [asdict(file)]))

    async def get_file(self, file_id: str) -> StoredFile | None:
        row = await self._transact(
            lambda one: one.execute(select(files).where(files.c.id == file_id)).mappings().first()
        )
        return None if row is None else StoredFile(**row)

    async def list_files(
        self, owner: str | None, *, after: str | None, limit: int, newest_first: bool, purpose: str | None
    ) -> Sequence[StoredFile]:
        """Of one owner, or of all."""
        query = select(files) if purpose is None else select(files).where(files.c.purpose == purpose)
        query = _page(query, files, owner, after, limit, newest_first=newest_first)
        return [StoredFile(**row) for row in await self._rows(query)]

    async def remove_file(self, file_id: str) -> bool:
        gone = await self._transact(lambda one: one.execute(delete(files).where(files.c.id == file_id)).rowcount)
        return bool(gone)

    async def list_expired_files(self, now: float) -> Sequence[str]:
        rows = await self._rows(select(files.c.id).where(files.c.expires_at <= now))
        return [row["id"] for row in rows]

    async def list_file_ids(self) -> frozenset[str]:
        return frozenset(row["id"] for row in await self._rows(select(files.c.id)))

    # Batches.

    async def add_batch(self, batch: Batch) -> None:
        await self._transact(lambda connection: connection.execute(insert(batches), [_batch_row(batch)]))

    async def get_batch(self, batch_id: str) -> Batch | None:
        rows = await self._rows(select(batches).where(batches.c.id == batch_id))
        return _batch_of(rows[0]) if rows else None

    async def list_batches(self, owner: str | None, *, after: str | None, limit: int) -> Sequence[Batch]:
        query = _page(select(batches), batches, owner, after, limit, newest_first=True)
        return [_batch_of(row) for row in await self._rows(query)]

    async def list_open_batches(self) -> Sequence[Batch]:
        """Those that have not ended, oldest first."""
        query = select(batches).where(batches.c.status.not_in(ENDED)).order_by(batches.c.created_at)
        return [_batch_of(row) for row in await self._rows(query)]

    async def save_batch(self, batch: Batch) -> None:
        await self._transact(lambda connection: _save(connection, batch))

    async def end_batch(self, batch: Batch, results: Sequence[StoredFile]) -> None:
        """The batch as it ended, its results as files, and no more of its lines: all or nothing."""

        def write(connection: Connection) -> None:
            _save(connection, batch)
            for table in (lines, tickets, parcels):
                connection.execute(delete(table).where(table.c.batch_id == batch.id))
            if results:
                connection.execute(insert(files), [asdict(file) for file in results])

        await self._transact(write)

    async def remove_old_batches(self, before: float) -> int:
        """Ended ones that were made before then."""
        old = and_(batches.c.created_at < before, batches.c.status.in_(ENDED))
        return await self._transact(lambda one: one.execute(delete(batches).where(old)).rowcount)

    # Lines.

    async def clear_lines(self, batch_id: str) -> None:
        """Forget what an earlier validation, that did not come to its end, put down."""
        await self._transact(lambda one: one.execute(delete(lines).where(lines.c.batch_id == batch_id)))

    async def add_lines(self, batch_id: str, found: Sequence[tuple[BatchLine, int | None]]) -> None:
        """Lines that wait, each with the first line whose answer it shares, if there is one."""
        rows = [
            {
                "batch_id": batch_id,
                "number": line.number,
                "offset": line.offset,
                "length": line.length,
                "digest": line.digest,
                "twin_of": twin_of,
                "state": WAITING,
            }
            for line, twin_of in found
        ]
        if rows:
            await self._transact(lambda connection: connection.execute(insert(lines), rows))

    async def list_ready_lines(self, batch_id: str, after: int, limit: int) -> Sequence[ResultPosition]:
        """Waiting lines beyond number `after`, without those that wait for an identical one."""
        mine = and_(lines.c.batch_id == batch_id, lines.c.state == WAITING, lines.c.number > after)
        query = select(lines.c.number, lines.c.offset, lines.c.length).where(mine, lines.c.twin_of.is_(None))
        return [ResultPosition(**row) for row in await self._rows(query.order_by(lines.c.number).limit(limit))]

    async def list_copyable_lines(self, batch_id: str, limit: int) -> Sequence[CopiedLine]:
        """Waiting lines whose identical first one has ended."""
        first = lines.alias()
        query = (
            select(
                lines.c.number, lines.c.offset, lines.c.length, first.c.state, first.c.result_offset,
                first.c.result_length,
            )
            .join(first, and_(first.c.batch_id == lines.c.batch_id, first.c.number == lines.c.twin_of))
            .where(lines.c.batch_id == batch_id, lines.c.state == WAITING, lines.c.twin_of.is_not(None))
            .where(first.c.state.in_((ANSWERED, FAILED)))
            .order_by(lines.c.number)
            .limit(limit)
        )  # fmt: skip
        return [
            CopiedLine(
                ResultPosition(row["number"], row["offset"], row["length"]),
                row["state"],
                row["result_offset"],
                row["result_length"],
            )
            for row in await self._rows(query)
        ]

    async def list_unfinished_lines(self, batch_id: str, after: int, limit: int) -> Sequence[ResultPosition]:
        """Every line that has not ended, identical ones included."""
        open_ones = lines.c.state.in_((WAITING, POSTED))
        mine = and_(lines.c.batch_id == batch_id, open_ones, lines.c.number > after)
        query = select(lines.c.number, lines.c.offset, lines.c.length).where(mine)
        return [ResultPosition(**row) for row in await self._rows(query.order_by(lines.c.number).limit(limit))]

    async def has_duplicates(self, batch_id: str) -> bool:
        query = select(lines.c.number).where(lines.c.batch_id == batch_id, lines.c.twin_of.is_not(None)).limit(1)
        return bool(await self._rows(query))

    async def commit_lines(self, batch: Batch, done: Sequence[FinishedLine]) -> None:
        """Lines that have ended, together with the batch's counts and the sizes of its results."""
        rows = [{"n": one.number, "s": one.state, "o": one.result_offset, "l": one.result_length} for one in done]
        change = (
            update(lines)
            .where(lines.c.batch_id == batch.id, lines.c.number == bindparam("n"))
            .values(state=bindparam("s"), result_offset=bindparam("o"), result_length=bindparam("l"))
        )

        gone = delete(tickets).where(tickets.c.batch_id == batch.id, tickets.c.number == bindparam("n"))

        def write(connection: Connection) -> None:
            _save(connection, batch)
            if rows:
                connection.execute(change, rows)
                connection.execute(gone, [{"n": one.number} for one in done])

        await self._transact(write)

    # Provider batches, and the lines that are in them.

    async def add_provider_batch(self, provider_batch: ProviderBatch, records: Mapping[int, str]) -> None:
        """It is going to be sent, with the records of its lines: from now on they do not wait any more."""
        mark = (
            update(lines).where(lines.c.batch_id == provider_batch.batch_id, lines.c.number == bindparam("n"))
        ).values(state=POSTED)
        rows = [
            {"batch_id": provider_batch.batch_id, "number": number, "parcel": provider_batch.name, "ticket": record}
            for number, record in records.items()
        ]

        def write(connection: Connection) -> None:
            connection.execute(insert(parcels), [asdict(provider_batch)])
            connection.execute(insert(tickets), rows)
            connection.execute(mark, [{"n": number} for number in records])

        await self._transact(write)

    async def save_provider_batch(self, provider_batch: ProviderBatch) -> None:
        await self._transact(
            lambda one: one.execute(
                update(parcels).where(parcels.c.name == provider_batch.name).values(**asdict(provider_batch))
            )
        )

    async def list_provider_batches(self, batch_id: str) -> Sequence[ProviderBatch]:
        return [ProviderBatch(**row) for row in await self._rows(select(parcels).where(parcels.c.batch_id == batch_id))]

    async def count_unanswered(self, provider_batch: ProviderBatch) -> int:
        """How many of its lines have not ended."""
        query = select(func.count()).select_from(tickets).where(tickets.c.parcel == provider_batch.name)
        return await self._transact(lambda one: one.execute(query).scalar_one())

    async def list_line_records(
        self, provider_batch: ProviderBatch, numbers: Sequence[int]
    ) -> Sequence[tuple[ResultPosition, str]]:
        """Of those of the lines that have not ended."""
        here = and_(lines.c.batch_id == tickets.c.batch_id, lines.c.number == tickets.c.number)
        query = (
            select(lines.c.number, lines.c.offset, lines.c.length, tickets.c.ticket)
            .join(tickets, here)
            .where(tickets.c.parcel == provider_batch.name, tickets.c.number.in_(numbers))
        )
        return [
            (ResultPosition(row["number"], row["offset"], row["length"]), row["ticket"])
            for row in await self._rows(query)
        ]

    async def end_provider_batch(self, provider_batch: ProviderBatch) -> Mapping[int, str]:
        """Forget it. Those of its lines that have not ended wait again; returns their records."""
        mine = tickets.c.parcel == provider_batch.name
        numbers = select(tickets.c.number).where(mine)

        def write(connection: Connection) -> Mapping[int, str]:
            rows = connection.execute(select(tickets.c.number, tickets.c.ticket).where(mine)).all()
            back = and_(lines.c.batch_id == provider_batch.batch_id, lines.c.number.in_(numbers))
            connection.execute(update(lines).where(back).values(state=WAITING))
            connection.execute(delete(tickets).where(mine))
            connection.execute(delete(parcels).where(parcels.c.name == provider_batch.name))
            return {row.number: row.ticket for row in rows}

        return await self._transact(write)

    async def _rows(self, query: Select[Any]) -> Sequence[RowMapping]:
        return await self._transact(lambda connection: connection.execute(query).mappings().all())


def _page(
    query: Select[Any], table: Table, owner: str | None, after: str | None, limit: int, *, newest_first: bool
) -> Select[Any]:
    """`limit` rows of `owner` that come after the one with the id `after`; an unknown one has nothing after it."""
    at, name = table.c.created_at, table.c.id
    if owner is not None:
        query = query.where(table.c.owner == owner)
    if after is not None:
        then = select(at).where(name == after).scalar_subquery()
        beyond = at < then if newest_first else at > then
        further = name < after if newest_first else name > after
        query = query.where(beyond | (and_(at == then, further)))
    order = (at.desc(), name.desc()) if newest_first else (at.asc(), name.asc())
    return query.order_by(*order).limit(limit)


def _save(connection: Connection, batch: Batch) -> None:
    connection.execute(update(batches).where(batches.c.id == batch.id).values(**_batch_row(batch)))


def _batch_row(batch: Batch) -> Mapping[str, Any]:
    document = asdict(batch)
    named = {name: document.pop(name) for name in ("id", "owner", "status", "created_at")}
    return {**named, "document": json.dumps(document)}


def _batch_of(row: RowMapping) -> Batch:
    document = json.loads(row["document"])
    made = Batch(**{**document, **{name: row[name] for name in ("id", "owner", "status", "created_at")}})
    problems = tuple(BatchProblem(**one) for one in document["problems"])
    return replace(made, counts=LineCounts(**document["counts"]), usage=Usage(**document["usage"]), problems=problems)
