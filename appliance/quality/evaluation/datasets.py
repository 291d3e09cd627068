"""Labelled rows from a JSONL file: read line by line, sampled, with examples to show to models."""

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from appliance.core.json_types import JsonObject
from appliance.errors import RequestError
from appliance.quality.evaluation.adapters import Adapter

MAX_LINE_BYTES: Final = 1_000_000
MAX_ROWS: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class DatasetRow:
    text: str
    right: Mapping[str, Sequence[str]]
    asked: str
    """What is asked of it."""
    given: JsonObject
    line: int


@dataclass(frozen=True, slots=True)
class Dataset:
    name: str
    adapter: Adapter
    rows: Sequence[DatasetRow]

    @property
    def labels(self) -> Sequence[str]:
        """All that occur, for decisions."""
        return sorted({value for row in self.rows for values in row.right.values() for value in values})


def read_dataset(path: Path, adapters: Sequence[Adapter]) -> Dataset:
    """The whole file. Raises RequestError naming the line that is wrong."""
    rows: list[DatasetRow] = []
    adapter: Adapter | None = None
    for number, given in _lines(path):
        if adapter is None:
            adapter = next((one for one in adapters if one.suits(given)), None)
            if adapter is None:
                known = "; ".join(f"{one.name} has {', '.join(one.fields)}" for one in adapters)
                raise RequestError(f"{path}:{number} is of no known kind ({known}): write an adapter for it")
        rows.append(_row(given, adapter, path, number))
        if len(rows) > MAX_ROWS:
            raise RequestError(f"{path} has more than {MAX_ROWS} rows: cut it")
    if adapter is None:
        raise RequestError(f"{path} holds no rows")
    return Dataset(path.stem, adapter, rows)


def _row(given: JsonObject, adapter: Adapter, path: Path, number: int) -> DatasetRow:
    if not adapter.suits(given):
        raise RequestError(f"{path}:{number} is not of kind {adapter.name}: it needs {', '.join(adapter.fields)}")
    text = given[adapter.text]
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"{path}:{number}: {adapter.text} is empty: every row needs a text")
    return DatasetRow(text, adapter.right(given), adapter.asked(given), given, number)


def _lines(path: Path) -> Iterator[tuple[int, JsonObject]]:
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > MAX_LINE_BYTES:
                    raise RequestError(f"{path}:{number} is longer than {MAX_LINE_BYTES} bytes: shorten it")
                if raw.strip():
                    yield number, _parsed(raw, path, number)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error


def _parsed(raw: bytes, path: Path, number: int) -> JsonObject:
    try:
        row = orjson.loads(raw.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        try:
            raw.decode()
        except UnicodeDecodeError as broken:
            raise RequestError(f"{path}:{number} is not UTF-8 (byte {broken.start + 1}): convert the file") from error
        raise RequestError(f"{path}:{number} is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise RequestError(f"{path}:{number} is no object: each line is one row")
    return row


def sample_rows(rows: Sequence[DatasetRow], limit: int | None, seed: int) -> Sequence[DatasetRow]:
    """`limit` rows drawn with `seed`; all of them where there are no more. The order is the file's."""
    if limit is None or limit >= len(rows):
        return rows
    drawn = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return [rows[place] for place in drawn]


def pick_examples(rows: Sequence[DatasetRow], adapter: Adapter, count: int, seed: int) -> Sequence[JsonObject]:
    """Rows to show: `count` for each label of a decision, the labels mixed; `count` in all of an extraction."""
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    if adapter.kind == "extraction":
        return [adapter.example(row.given) for row in shuffled[:count]]
    taken: defaultdict[str, int] = defaultdict(int)
    shown = []
    for row in shuffled:
        label = row.given[adapter.gold]
        if taken[label] < count:
            taken[label] += 1
            shown.append(adapter.example(row.given))
    return shown
