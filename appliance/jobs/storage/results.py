"""What a batch has come to, kept in step in two places: rows in its result files, and their lines in the store."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from appliance.jobs.lines.reader import parse_line, read_line_at
from appliance.jobs.models import BadLine, Batch, BatchLine, BatchProblem, LineAnswer, LineCounts
from appliance.jobs.storage.files import JobFolder
from appliance.jobs.storage.result_files import (
    ResultFile,
    WrittenRow,
    format_answer,
    format_bad_line,
    format_copy,
    format_problem,
)
from appliance.jobs.storage.store import CopiedLine, FinishedLine, JobStore, ResultPosition
from appliance.jobs.storage.tables import ANSWERED, FAILED

_COPIES_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class _Row:
    number: int
    state: int
    data: bytes


class BatchResults:
    """One batch's. `batch` is always what is committed; every method either commits or changes nothing.

    Raises StorageFull where the disk is full: then the same can be tried again.
    """

    def __init__(self, batch: Batch, folder: JobFolder, store: JobStore) -> None:
        self.batch = batch
        self._folder, self._store = folder, store
        self._output = ResultFile(folder.output_path(batch.id), batch.output_bytes)
        self._errors = ResultFile(folder.error_path(batch.id), batch.error_bytes)

    def reset(self) -> None:
        """Nothing that was written counts."""
        self._output.truncate(0)
        self._errors.truncate(0)

    async def append_bad_lines(self, bad: Sequence[BadLine]) -> None:
        """Rows of lines that are not to be asked. They count once the batch is saved, with all that was validated."""
        await asyncio.to_thread(self._errors.append_rows, [format_bad_line(self.batch.id, one) for one in bad])

    def with_sizes(self, batch: Batch) -> Batch:
        return replace(batch, output_bytes=self._output.size, error_bytes=self._errors.size)

    async def commit_answers(self, answered: Sequence[tuple[BatchLine, LineAnswer]]) -> None:
        """Answers, in the order they came. The lines are done when this returns."""
        rows = [
            _Row(
                line.number,
                ANSWERED if answer.is_good else FAILED,
                format_answer(self.batch.id, line.number, line.custom_id, answer),
            )
            for line, answer in answered
        ]
        await self._commit(rows, _counted(self.batch, [answer for _, answer in answered]))

    async def commit_unanswered(self, places: Sequence[ResultPosition], code: str, message: str) -> None:
        """Lines that are not going to be asked any more."""
        names = await asyncio.to_thread(self._custom_ids, places)
        rows = [
            _Row(
                place.number,
                FAILED,
                format_problem(self.batch.id, place.number, name, BatchProblem(code, message, place.number)),
            )
            for place, name in zip(places, names, strict=True)
        ]
        counts = replace(self.batch.counts, failed=self.batch.counts.failed + len(rows))
        await self._commit(rows, replace(self.batch, counts=counts))

    async def copy_duplicates(self) -> bool:
        """Give some lines the answer of an identical one that has ended; False where there is none to give."""
        copies = await self._store.list_copyable_lines(self.batch.id, _COPIES_AT_ONCE)
        if not copies:
            return False
        rows = await asyncio.to_thread(self._copied, copies)
        good = sum(row.state == ANSWERED for row in rows)
        old = self.batch.counts
        counts = replace(
            old,
            completed=old.completed + good,
            failed=old.failed + len(rows) - good,
            copied=old.copied + len(rows),
        )
        await self._commit(rows, replace(self.batch, counts=counts))
        return True

    async def read_lines(self, places: Sequence[ResultPosition]) -> Sequence[BatchLine]:
        """Lines as they were when they were validated. Raises FileNotFoundError where the input is gone."""
        return await asyncio.to_thread(self._read, places)

    def close(self) -> None:
        self._output.close()
        self._errors.close()

    async def _commit(self, rows: Sequence[_Row], batch: Batch) -> None:
        """What was begun is ended even where this task is cancelled meanwhile: a thread writes on in any case."""
        commit = asyncio.ensure_future(self._commit_now(rows, batch))
        try:
            await asyncio.shield(commit)
        except asyncio.CancelledError:
            await asyncio.wait({commit})
            commit.result()
            raise

    async def _commit_now(self, rows: Sequence[_Row], batch: Batch) -> None:
        good = [row for row in rows if row.state == ANSWERED]
        bad = [row for row in rows if row.state != ANSWERED]
        sizes = self._output.size, self._errors.size
        try:
            written = await asyncio.to_thread(self._write, good, bad)
            done = [
                FinishedLine(row.number, row.state, place.offset, place.length)
                for row, place in zip((*good, *bad), written, strict=True)
            ]
            batch = self.with_sizes(batch)
            await self._store.commit_lines(batch, done)
        except Exception:
            self._output.truncate(sizes[0])
            self._errors.truncate(sizes[1])
            raise
        self.batch = batch

    def _write(self, good: Sequence[_Row], bad: Sequence[_Row]) -> Sequence[WrittenRow]:
        written = [*self._output.append_rows([row.data for row in good])] if good else []
        return [*written, *self._errors.append_rows([row.data for row in bad])] if bad else written

    def _copied(self, copies: Sequence[CopiedLine]) -> Sequence[_Row]:
        rows, names = [], self._custom_ids([copy.position for copy in copies])
        for copy, name in zip(copies, names, strict=True):
            source = self._output if copy.state == ANSWERED else self._errors
            row = source.read_row(copy.result_offset, copy.result_length)
            data = format_copy(self.batch.id, copy.position.number, name or "", row)
            rows.append(_Row(copy.position.number, copy.state, data))
        return rows

    def _custom_ids(self, places: Sequence[ResultPosition]) -> Sequence[str | None]:
        """None for all where the input is gone."""
        try:
            return [line.custom_id for line in self._read(places)]
        except FileNotFoundError:
            return [None] * len(places)

    def _read(self, places: Sequence[ResultPosition]) -> Sequence[BatchLine]:
        with self._folder.input_path(self.batch.id).open("rb") as file:
            return [_line(file, place, self.batch.endpoint) for place in places]


def _line(file: BinaryIO, place: ResultPosition, endpoint: str) -> BatchLine:
    found = parse_line(read_line_at(file, place.number, place.offset, place.length), endpoint)
    if isinstance(found, BadLine):
        raise FileNotFoundError(f"line {place.number} is not what it was: the input was changed")
    return found


def _counted(batch: Batch, answers: Sequence[LineAnswer]) -> Batch:
    good = sum(answer.is_good for answer in answers)
    hosted = sum(answer.location == "hosted" for answer in answers)
    onsite = sum(answer.location == "onsite" for answer in answers)
    old = batch.counts
    counts = LineCounts(
        total=old.total,
        completed=old.completed + good,
        failed=old.failed + len(answers) - good,
        copied=old.copied,
        onsite=old.onsite + onsite,
        hosted=old.hosted + hosted,
    )
    usage = sum((answer.usage for answer in answers), batch.usage)
    cost_usd = batch.cost_usd + sum(answer.cost_usd or 0.0 for answer in answers)
    return replace(batch, counts=counts, usage=usage, cost_usd=cost_usd)
