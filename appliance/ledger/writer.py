"""The one thread that writes the ledger, on a connection of its own.

A request waits for each reservation, so they are committed at once. All else is gathered for a moment and written in
one transaction. What cannot be written is kept, up to a bound, and tried again until it can.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from sqlalchemy import Connection, Engine, delete, insert, select, text
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, InterfaceError, NotSupportedError, ProgrammingError

from appliance.core import Outcome
from appliance.errors import BudgetExceeded, LedgerUnavailable
from appliance.ledger import rows
from appliance.ledger.budgets import SpendSums, utc_day
from appliance.ledger.commands import FlushCommand, Reservation, Settlement, WakeCommand, WriterState
from appliance.ledger.database import LedgerFile, explain_error
from appliance.ledger.tables import attempts, decisions, exclusions, reservations, spend

logger = logging.getLogger(__name__)

LINGER_SECONDS = 0.25
"""How long outcomes gather: a transaction for one costs about as much as one for fifty. A crash loses this much of the
story, and no money: reservations do not wait."""
BATCH = 200
"""Entries in one transaction: about 20 ms, which a reservation may have to wait for."""
FIRST_RETRY_SECONDS = 0.1
LAST_RETRY_SECONDS = 5.0
PRUNE_SECONDS = 3600.0
PRUNE_PAUSE_SECONDS = 0.05
_SECONDS_PER_DAY = 86_400

# A write that changes nothing: whether there is space again can only be found out by writing.
_PROBE = text("UPDATE alembic_version SET version_num = version_num")
_ABOUT_THE_ROW = (IntegrityError, DataError, ProgrammingError, InterfaceError, NotSupportedError)


class LedgerWriter(threading.Thread):
    """Owns `engine` and disposes of it at the end."""

    def __init__(self, engine: Engine, shared: WriterState, *, retention_days: int, clock: Callable[[], float]) -> None:
        super().__init__(name="ledger-writer", daemon=True)
        self._engine = engine
        self._durable = engine.execution_options(durable=True)
        self._file: LedgerFile | None = None
        self._shared = shared
        self._retention_seconds = retention_days * _SECONDS_PER_DAY
        self._clock = clock
        self._reservations: list[Reservation] = []
        self._flushes: list[FlushCommand] = []
        self._held: list[Outcome | Settlement] = []
        self._done = 0
        self._gather_until: float | None = None
        self._retry_at: float | None = None
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._prune_at = time.monotonic()
        self._last: FlushCommand | None = None

    def run(self) -> None:
        self._file = LedgerFile(self._engine)
        while self._last is None:
            try:
                self._wait()
                self._write_reservations()
                self._write_entries()
                self._prune()
            except Exception as error:
                # Nothing here may end the thread: spend could not be reserved any more until the next start.
                logger.exception("the ledger's writer met an error it does not know")
                self._failed(error)
            self._answer_flushes()
        self._engine.dispose()
        self._last.answer.set_result(self._unavailable() if self._backlog() else None)

    # -- waiting ---------------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Wait until there is something to do, and take all that is urgent."""
        shared = self._shared
        # The flag goes up before the entries are looked at: one that came in between has not woken us, but is seen.
        shared.is_asleep = not shared.entries
        with contextlib.suppress(queue.Empty):
            self._take(shared.urgent.get(timeout=self._wait_seconds()))
            self._take_urgent()
        shared.is_asleep = False

    def _take_urgent(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._take(self._shared.urgent.get_nowait())

    def _take(self, urgent: Reservation | FlushCommand | WakeCommand) -> None:
        if isinstance(urgent, Reservation):
            self._reservations.append(urgent)
        elif isinstance(urgent, FlushCommand):
            self._flushes.append(urgent)

    def _wait_seconds(self) -> float:
        now = time.monotonic()
        until = self._prune_at
        if self._retry_at is not None:
            until = self._retry_at
        elif self._backlog():
            if self._gather_until is None:
                self._gather_until = now + LINGER_SECONDS
            until = now if self._backlog() >= BATCH else self._gather_until
        return max(0.0, until - now)

    def _backlog(self) -> int:
        return len(self._held) + len(self._shared.entries)

    def _is_due(self) -> bool:
        now = time.monotonic()
        if self._flushes:
            return True
        if self._retry_at is not None:
            return now >= self._retry_at
        if self._backlog() >= BATCH:
            return True
        return self._gather_until is not None and now >= self._gather_until

    # -- writing ---------------------------------------------------------------------------------------------------

    def _write_reservations(self) -> None:
        waiting, self._reservations = self._reservations, []
        if not waiting:
            return
        refused: dict[int, BudgetExceeded] = {}
        try:
            if self._file is not None:
                self._file.check()
            with self._durable.begin() as connection:
                refused = _reserve(connection, waiting)
        except Exception as error:
            # Whatever it was, a request waits for each of these and must not call without it.
            self._failed(error)
            for reservation in waiting:
                reservation.answer.set_result(self._unavailable())
        else:
            # With a backlog left the trouble may not be over: a small write can fit where a large one does not.
            if not self._backlog():
                self._succeeded()
            for index, reservation in enumerate(waiting):
                reservation.answer.set_result(refused.get(index))

    def _write_entries(self) -> None:
        """Write until nothing is left or a reservation waits."""
        if not self._is_due():
            return
        is_probe = self._retry_at is not None
        while self._backlog() or is_probe:
            self._hold()
            # A settlement that is held now may be of a reservation made meanwhile, and must find it.
            self._take_urgent()
            self._write_reservations()
            try:
                self._write_held()
            except DBAPIError as error:
                self._failed(error)
                return
            self._succeeded()
            is_probe = False
            if not self._shared.urgent.empty():
                break
        self._gather_until = None

    def _hold(self) -> None:
        entries = self._shared.entries
        while entries and len(self._held) < BATCH:
            self._held.append(entries.popleft())
            self._shared.held = len(self._held)

    def _write_held(self) -> None:
        try:
            self._write(self._held)
        except Exception as error:
            if _is_about_the_database(error):
                raise
            self._write_one_by_one()
        self._done += len(self._held)
        self._held.clear()
        self._shared.held = 0

    def _write_one_by_one(self) -> None:
        """An entry that the database can never take must not hold up those behind it."""
        while self._held:
            try:
                self._write(self._held[:1])
            except Exception as error:
                if _is_about_the_database(error):
                    raise
                self._shared.spoiled += 1
                logger.error("an entry of the ledger cannot be stored and is dropped: %s", error)
            del self._held[0]
            self._done += 1
            self._shared.held = len(self._held)

    def _write(self, entries: list[Outcome | Settlement]) -> None:
        settled = [entry for entry in entries if isinstance(entry, Settlement)]
        outcomes = [entry for entry in entries if isinstance(entry, Outcome)]
        tables = (
            (decisions, [rows.make_decision_row(outcome) for outcome in outcomes]),
            (attempts, [row for outcome in outcomes for row in rows.make_attempt_rows(outcome)]),
            (exclusions, [row for outcome in outcomes for row in rows.make_exclusion_rows(outcome)]),
        )
        with self._engine.begin() as connection:
            if not entries:
                connection.execute(_PROBE)
            if settled:
                counting = SpendSums(connection)
                counting.settle(settled)
                counting.write()
            for table, values in tables:
                if values:
                    connection.execute(insert(table), values)

    # -- how it goes -----------------------------------------------------------------------------------------------

    def _failed(self, error: BaseException) -> None:
        reason = explain_error(error, self._engine.url, "written")
        if not self._shared.reason:
            logger.error("%s", reason)
        self._shared.reason = reason
        self._retry_at = time.monotonic() + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, LAST_RETRY_SECONDS)

    def _succeeded(self) -> None:
        if self._shared.reason:
            logger.info("the ledger can be written again")
        self._shared.reason = ""
        self._retry_at = None
        self._retry_seconds = FIRST_RETRY_SECONDS

    def _unavailable(self) -> LedgerUnavailable:
        return LedgerUnavailable(self._shared.reason, retry_after_seconds=self._retry_seconds)

    def _answer_flushes(self) -> None:
        waiting, self._flushes = self._flushes, []
        for flush in waiting:
            if flush.is_last:
                self._last = flush
            elif self._done >= flush.accepted:
                flush.answer.set_result()
            elif self._shared.reason:
                flush.answer.set_result(self._unavailable())
            else:
                self._flushes.append(flush)

    # -- forgetting ------------------------------------------------------------------------------------------------

    def _prune(self) -> None:
        """Remove one small batch of what is older than the retention, when there is nothing else to do."""
        if time.monotonic() < self._prune_at or self._backlog() or self._retry_at is not None:
            return
        self._prune_at = time.monotonic() + PRUNE_SECONDS
        with self._engine.begin() as connection:
            is_more = prune_old(connection, self._clock() - self._retention_seconds)
        if is_more:
            self._prune_at = time.monotonic() + PRUNE_PAUSE_SECONDS


def _reserve(connection: Connection, waiting: Sequence[Reservation]) -> dict[int, BudgetExceeded]:
    """Write those that no budget refuses; the refusals by position."""
    refused: dict[int, BudgetExceeded] = {}
    counting = SpendSums(connection)
    for index, reservation in enumerate(waiting):
        row = reservation.row
        try:
            reservation.spent = counting.reserve(reservation.caps, row["reserved_nano_usd"], row["reserved_at"])
        except BudgetExceeded as refusal:
            refused[index] = refusal
    granted = [reservation.row for index, reservation in enumerate(waiting) if index not in refused]
    if granted:
        connection.execute(insert(reservations), granted)
    counting.write()
    return refused


def prune_old(connection: Connection, before_at: float) -> bool:
    """Remove up to a batch of decisions and of reservations from before `before_at`; whether there may be more."""
    old = select(decisions.c.decision_id).where(decisions.c.received_at < before_at).limit(BATCH)
    ids = connection.execute(old).scalars().all()
    for table in (attempts, exclusions, decisions) if ids else ():
        connection.execute(delete(table).where(table.c.decision_id.in_(ids)))
    spent = select(reservations.c.reservation_id).where(reservations.c.reserved_at < before_at).limit(BATCH)
    spent_ids = connection.execute(spent).scalars().all()
    if spent_ids:
        connection.execute(delete(reservations).where(reservations.c.reservation_id.in_(spent_ids)))
    connection.execute(delete(spend).where(spend.c.day < utc_day(before_at)))
    return BATCH in (len(ids), len(spent_ids))


def _is_about_the_database(error: BaseException) -> bool:
    """Whether it is the database's state (full, locked, damaged, gone), so that trying again later may help."""
    return isinstance(error, DBAPIError) and (error.connection_invalidated or not isinstance(error, _ABOUT_THE_ROW))
