"""The result files of one batch: what is written counts once it is committed, and what is not is cut off again.

A crash between writing and committing leaves bytes behind the committed size; opening removes them, and their lines,
which still wait, are answered again. So no line is lost and none is there twice.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson

from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.errors import StorageFull
from appliance.files import OWNER_ONLY, is_disk_full
from appliance.jobs.models import BadLine, BatchProblem, LineAnswer


@dataclass(frozen=True, slots=True)
class WrittenRow:
    """Where a row lies in its file."""

    offset: int
    length: int


class ResultFile:
    """One of a batch's two files. Blocking; `size` is what may be committed."""

    def __init__(self, path: Path, committed_bytes: int) -> None:
        self._path = path
        self.size = committed_bytes
        self._file: BinaryIO | None = None

    def append_rows(self, rows: Iterable[bytes]) -> Sequence[WrittenRow]:
        """Write rows and see them on the disk. Raises StorageFull, and then the file is as it was."""
        before, written = self.size, []
        try:
            file = self._opened()
            for row in rows:
                file.write(row)
                written.append(WrittenRow(self.size, len(row)))
                self.size += len(row)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            self.size = before
            self._drop()
            if is_disk_full(error):
                text = f"no space is left for results in {self._path.parent}: free some, and the job goes on"
                raise StorageFull(text, retry_after_seconds=30) from error
            raise
        return written

    def read_row(self, offset: int, length: int) -> bytes:
        with self._path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def truncate(self, committed_bytes: int) -> None:
        """What was written since is not to count."""
        self.size = committed_bytes
        self._drop()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, OWNER_ONLY), "r+b", buffering=1_048_576)
            file.truncate(self.size)
            file.seek(self.size)
            self._file = file
        return self._file

    def _drop(self) -> None:
        """Let go without writing what is still buffered: the next opening cuts off what got through."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:
                return


def format_answer(batch_id: str, number: int, custom_id: str, answer: LineAnswer) -> bytes:
    """A line's answer, good or bad, in OpenAI's shape, with its decision for `/v1/explain`."""
    response: MutableJsonObject = {"status_code": answer.status, "request_id": answer.request_id, "body": answer.body}
    if answer.decision_id is not None:
        response["decision_id"] = answer.decision_id
    return _row(batch_id, number, custom_id, response, None)


def format_problem(batch_id: str, number: int, custom_id: str | None, problem: BatchProblem) -> bytes:
    """A line that was never asked, and why."""
    return _row(batch_id, number, custom_id, None, problem.to_json())


def format_bad_line(batch_id: str, bad: BadLine) -> bytes:
    return format_problem(batch_id, bad.number, bad.custom_id, bad.problem)


def format_copy(batch_id: str, number: int, custom_id: str, row: bytes) -> bytes:
    """Another line's row as that of an identical line."""
    original = orjson.loads(row)
    return _row(batch_id, number, custom_id, original["response"], original["error"])


def _row(
    batch_id: str,
    number: int,
    custom_id: str | None,
    response: JsonObject | None,
    error: JsonObject | None,
) -> bytes:
    name = f"batch_req_{batch_id.removeprefix('batch_')}_{number}"
    row = {"id": name, "custom_id": custom_id, "line": number, "response": response, "error": error}
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
