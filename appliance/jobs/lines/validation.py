"""A batch's first stage: every line of its input is looked at once, and what is to be asked is put down."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from appliance.jobs.lines.reader import DuplicateTracker, parse_line, scan_lines
from appliance.jobs.models import BadLine, Batch, BatchLine, BatchProblem, LineCounts
from appliance.jobs.storage.files import JobFolder
from appliance.jobs.storage.results import BatchResults
from appliance.jobs.storage.store import JobStore

MAX_LISTED_PROBLEMS: Final = 100
"""So many are listed in the batch itself; the error file has them all."""
_MODELS_TOLD_APART: Final = 2
"""A batch has a model where all its lines have the same."""
_MOST_MODEL_CHARS: Final = 200
_LINES_AT_ONCE: Final = 500
_BYTES_AT_ONCE: Final = 2_000_000
"""Looked at in one go, in a thread: the event loop gets its turn in between."""


class UnusableInput(Exception):
    """The file as a whole cannot be worked with."""

    def __init__(self, problem: BatchProblem) -> None:
        super().__init__(problem.message)
        self.problem = problem


@dataclass(slots=True)
class _Seen:
    good: list[tuple[BatchLine, int | None]] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    models: set[str] = field(default_factory=set)

    @property
    def lines(self) -> int:
        return len(self.good) + len(self.bad)


async def validate_batch(
    batch: Batch, results: BatchResults, folder: JobFolder, store: JobStore, *, max_lines: int, max_line_bytes: int
) -> Batch:
    """The batch with its counts and problems; its lines wait in the store. Starts from the beginning however often.

    Raises Unusable, and StorageFull.
    """
    try:
        await asyncio.to_thread(folder.link_input, batch.input_file_id, batch.id)
    except FileNotFoundError as error:
        text = f"file {batch.input_file_id} is not there any more: upload it again"
        raise UnusableInput(BatchProblem("file_not_found", text)) from error
    await store.clear_lines(batch.id)
    total, failed, problems, models = 0, 0, list[BatchProblem](), set[str]()
    chunks = _chunks(folder.input_path(batch.id), batch.endpoint, max_line_bytes)
    while (seen := await asyncio.to_thread(next, chunks, None)) is not None:
        total, failed = total + seen.lines, failed + len(seen.bad)
        if total > max_lines:
            text = f"the file has more than {max_lines} lines (jobs.max_lines): split it"
            raise UnusableInput(BatchProblem("too_many_lines", text))
        problems += [bad.problem for bad in seen.bad[: MAX_LISTED_PROBLEMS - len(problems)]]
        models |= seen.models if len(models) < _MODELS_TOLD_APART else set()
        await results.append_bad_lines(seen.bad)
        await store.add_lines(batch.id, seen.good)
    if not total:
        raise UnusableInput(BatchProblem("empty_file", "the file has no lines: write one request a line, as JSON"))
    model = models.pop() if len(models) == 1 else None
    made = replace(batch, counts=LineCounts(total=total, failed=failed), problems=tuple(problems), model=model)
    return results.with_sizes(made)


def _chunks(path: Path, endpoint: str, max_line_bytes: int) -> Iterator[_Seen]:
    with path.open("rb") as file:
        duplicates, seen, size = DuplicateTracker(), _Seen(), 0
        for raw in scan_lines(file, max_line_bytes):
            _look(parse_line(raw, endpoint), duplicates, seen)
            size += 0 if raw.data is None else raw.length
            if seen.lines >= _LINES_AT_ONCE or size >= _BYTES_AT_ONCE:
                yield seen
                seen, size = _Seen(), 0
        if seen.lines:
            yield seen


def _look(found: BatchLine | BadLine, duplicates: DuplicateTracker, seen: _Seen) -> None:
    if isinstance(found, BatchLine):
        checked = duplicates.check_line(found)
        if not isinstance(checked, BadLine):
            seen.good.append((replace(found, body={}), checked))
            model = found.body.get("model")
            if len(seen.models) < _MODELS_TOLD_APART:
                seen.models.add(model[:_MOST_MODEL_CHARS] if isinstance(model, str) else "auto")
            return
        found = checked
    seen.bad.append(found)


def describe_problem(problems: Sequence[BatchProblem]) -> str:
    """The first of them, in a sentence."""
    first = problems[0]
    return first.message if first.line is None else f"line {first.line}: {first.message}"
