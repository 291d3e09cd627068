"""The ledger as a node uses it: money reserved before it is spent, outcomes queued, stories and reports read back.

Nothing here touches the database on the event loop: the writer's thread writes, two reader threads read.
"""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine

from appliance.config import KeySettings
from appliance.core import Outcome, Target
from appliance.errors import LedgerUnavailable
from appliance.ledger.budgets import SpendCap, utc_day
from appliance.ledger.commands import FlushCommand, Reservation, Settlement, WakeCommand, WriteResult, WriterState
from appliance.ledger.database import explaining_errors, open_reader, open_writer
from appliance.ledger.decision_story import read_decision
from appliance.ledger.keys import read_keys, read_keys_mark
from appliance.ledger.report import Report, read_report
from appliance.ledger.rows import to_nano, to_usd
from appliance.ledger.writer import LedgerWriter

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class LedgerHealth:
    """`ok` is False while the last write failed or the queue is full; `reason` then says why and what to do."""

    ok: bool
    reason: str
    pending: int
    """Outcomes and settlements not written yet."""
    dropped: int
    """Outcomes lost since the start."""


class Ledger:
    """One node's ledger. `open` it, and `close` it: what is queued is written then.

    All methods are called on one event loop. Neither prompts nor answers come in here: an Outcome has none.
    """

    def __init__(
        self,
        url: str,
        writer: LedgerWriter,
        shared: WriterState,
        reader: Engine,
        max_pending: int,
        clock: Callable[[], float],
    ) -> None:
        self._url = url
        self._writer = writer
        self._shared = shared
        self._reader = reader
        self._readers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="ledger-reader")
        self._max_pending = max_pending
        self._clock = clock
        self._accepted = 0
        self._refused = 0
        self._is_closed = False
        self._spent_day = 0
        self.spent_today: dict[str, float] = {}
        """US dollars by budget scope as of its last reservation on this UTC day."""

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        max_pending: int = 10_000,
        retention_days: int = 90,
        clock: Callable[[], float] = time.time,
    ) -> "Ledger":
        """Open or make the ledger at `url`, its tables migrated.

        Raises LedgerUnavailable, naming the place and what to do, when it cannot be written, is damaged, is no ledger
        or was written by a newer appliance. `max_pending` bounds what is kept while it cannot be written. `clock` gives
        wall-clock seconds.
        """
        shared = WriterState()
        engine, reader = await asyncio.to_thread(_open_both, url)
        writer = LedgerWriter(engine, shared, retention_days=retention_days, clock=clock)
        writer.start()
        return cls(url, writer, shared, reader, max_pending, clock)

    async def reserve(self, *, decision_id: str, target: Target, usd: float, caps: Sequence[SpendCap] = ()) -> str:
        """Put down that up to `usd` may be spent at `target`; returns the reservation's id.

        It is on disk before this returns, and counts as spent until settled, so a crash never loses money spent. Raises
        BudgetExceeded where it would exceed one of `caps`, and LedgerUnavailable when it cannot be written: then the
        call must not be made.
        """
        if self._is_closed:
            raise LedgerUnavailable("the ledger is closed: the node is stopping")
        reservation_id = f"res_{secrets.token_hex(12)}"
        now = self._clock()
        row = {
            "reservation_id": reservation_id,
            "decision_id": decision_id,
            "target": target.name,
            "location": target.location,
            "reserved_at": now,
            "reserved_nano_usd": to_nano(usd),
            "day": utc_day(now) if caps else None,
            "scopes": json.dumps([cap.scope for cap in caps]) if caps else None,
        }
        reservation = Reservation(row, caps, _answer())
        self._shared.urgent.put(reservation)
        try:
            await reservation.answer.future
        except asyncio.CancelledError:
            # Nobody is going to make the call. The writer does reservations first, so this finds it.
            self.settle(reservation_id, usd=0.0)
            raise
        self._note_spent(utc_day(now), reservation.spent)
        return reservation_id

    def _note_spent(self, day: int, spent: Mapping[str, int]) -> None:
        if day != self._spent_day:
            self._spent_day, self.spent_today = day, {}
        self.spent_today.update({scope: to_usd(nano) for scope, nano in spent.items()})

    def settle(self, reservation_id: str, *, usd: float) -> None:
        """Put down what a reserved call really cost. Queued and never dropped: there are no more than reservations.

        The first settlement of a reservation stands; later ones change nothing.
        """
        self._append(Settlement(reservation_id, to_nano(usd), self._clock()))

    def record(self, outcome: Outcome) -> None:
        """Queue `outcome`. Never waits; when the queue is full the outcome is dropped and counted."""
        if self._is_closed or len(self._shared.entries) + self._shared.held >= self._max_pending:
            self._refused += 1
            return
        self._append(outcome)

    def _append(self, entry: Outcome | Settlement) -> None:
        shared = self._shared
        shared.entries.append(entry)
        self._accepted += 1
        if shared.is_asleep:
            shared.is_asleep = False
            shared.urgent.put(WakeCommand())

    async def read_decision(self, decision_id: str) -> Mapping[str, Any] | None:
        """The whole story of a decision, or None if there is none. Raises LedgerUnavailable when it cannot be read."""
        return await self._read(lambda connection: read_decision(connection, decision_id))

    async def read_report(self, *, since_at: float, until_at: float) -> Report:
        """What happened from `since_at` up to, not including, `until_at` (wall clock). Raises LedgerUnavailable."""
        return await self._read(lambda connection: read_report(connection, since_at=since_at, until_at=until_at))

    async def read_keys_mark(self) -> tuple[Any, ...]:
        """Changes when an API key was added or revoked. Raises LedgerUnavailable when it cannot be read."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._query, read_keys_mark)

    async def list_keys(self) -> Sequence[KeySettings]:
        """The API keys made by command that are in use. Raises LedgerUnavailable when they cannot be read."""
        stored = await asyncio.get_running_loop().run_in_executor(self._readers, self._query, read_keys)
        return [one.key for one in stored if one.revoked_at is None]

    async def flush(self) -> None:
        """Wait until all that was queued is written. Raises LedgerUnavailable when it cannot be; it stays queued."""
        if self._is_closed:
            return
        answer = _answer()
        self._shared.urgent.put(FlushCommand(self._accepted, answer))
        await answer.future

    async def close(self) -> None:
        """Write what is queued and let go of the file. Raises LedgerUnavailable, after letting go, if that failed."""
        if self._is_closed:
            return
        self._is_closed = True
        loop = asyncio.get_running_loop()
        # Readers first: the last connection to close puts the write-ahead log back into the file, and readers cannot.
        await loop.run_in_executor(self._readers, self._reader.dispose)
        answer = _answer()
        self._shared.urgent.put(FlushCommand(self._accepted, answer, is_last=True))
        try:
            await answer.future
        finally:
            await loop.run_in_executor(self._readers, self._writer.join)
            self._readers.shutdown(wait=False)

    def health(self) -> LedgerHealth:
        shared = self._shared
        pending = len(shared.entries) + shared.held
        reason = shared.reason
        if not reason and pending >= self._max_pending:
            reason = f"{pending} outcomes wait to be written and more are dropped: the disk is too slow"
        return LedgerHealth(not reason, reason, pending, self._refused + shared.spoiled)

    async def _read(self, query: Callable[[Connection], Found]) -> Found:
        # A caller who has just been answered may ask about it at once, so what waits is written first.
        if self._shared.entries or self._shared.held:
            with contextlib.suppress(LedgerUnavailable):
                await self.flush()
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._query, query)

    def _query(self, query: Callable[[Connection], Found]) -> Found:
        with explaining_errors(self._url, "read"), self._reader.connect() as connection:
            return query(connection)


def _open_both(url: str) -> tuple[Engine, Engine]:
    writer = open_writer(url)
    try:
        return writer, open_reader(url)
    except BaseException:
        writer.dispose()
        raise


def _answer() -> WriteResult:
    loop = asyncio.get_running_loop()
    return WriteResult(loop, loop.create_future())
