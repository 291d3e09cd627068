"""Labelled examples as they come in, checked: JSON Lines or CSV as text, or a list of objects."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from appliance.errors import RequestError

MAX_EXAMPLES: Final = 200_000
MAX_LABELS: Final = 1_000
MAX_LABEL_CHARS: Final = 200
MAX_TEXT_CHARS: Final = 20_000
"""Of one example: what is longer is no text to be put under one label. A line may be a few times as long."""
MAX_LINE_CHARS: Final = 100_000
MIN_PER_LABEL: Final = 2
"""One to learn from and one to be measured on."""
_TEXT_NAMES: Final = ("text", "input")


@dataclass(frozen=True, slots=True)
class Examples:
    """`truth[i]` is the place of the label of `texts[i]` in `labels`."""

    texts: tuple[str, ...]
    truth: npt.NDArray[np.int64]
    labels: tuple[str, ...]
    notes: tuple[str, ...]
    """What was left out, and why."""


def read_examples(given: Any, format: str | None, labels: Sequence[str] | None, *, at_least: int = 1) -> Examples:
    """`given`: a list of {text, label}, or the text of a JSONL or CSV file (`format`). Raises RequestError.

    Texts that came under several labels are left out and counted; repeated rows count once. `at_least`: of each label.
    """
    rows = _rows(given, format)
    seen: dict[str, set[str]] = {}
    total = 0
    for place, row in rows:
        text, label = _pair(row, place)
        seen.setdefault(text, set()).add(label)
        total += 1
        if total > MAX_EXAMPLES:
            raise RequestError(f"more than {MAX_EXAMPLES} examples came: send a sample of them", param="examples")
    if not seen:
        raise RequestError("there are no examples: give objects with text and label", param="examples")
    clear = {text: next(iter(found)) for text, found in seen.items() if len(found) == 1}
    known = _labels(labels, [label for found in seen.values() for label in found])
    _check_counts(Counter(clear.values()), known, len(seen) - len(clear), at_least)
    notes = _notes(total, len(seen), sum(len(found) > 1 for found in seen.values()))
    places = {label: index for index, label in enumerate(known)}
    truth = np.array([places[label] for label in clear.values()], dtype=np.int64)
    return Examples(tuple(clear), truth, known, notes)


def _notes(total: int, texts: int, contradictory: int) -> tuple[str, ...]:
    """They are kept with the classifier and shown to all who may use it, so they quote no text."""
    notes = []
    if contradictory:
        notes.append(f"{contradictory} texts came under more than one label and were left out")
    if total > texts:
        notes.append(f"{total - texts} rows repeated a text and counted once")
    return tuple(notes)


def _rows(given: Any, format: str | None) -> Iterator[tuple[str, Any]]:
    """Each row with its place in words."""
    if isinstance(given, list):
        return ((f"examples[{index}]", row) for index, row in enumerate(given))
    if not isinstance(given, str):
        raise RequestError("examples must be a list of {text, label}, or a JSONL or CSV file as text", param="examples")
    if format == "csv" or (format is None and not given.lstrip().startswith("{")):
        return _csv_rows(given)
    if format not in (None, "jsonl"):
        raise RequestError(f"format is {format!r}: it must be jsonl or csv", param="format")
    return _jsonl_rows(given)


def _jsonl_rows(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        place = f"line {number}"
        _check_line(line, place)
        try:
            yield place, orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise RequestError(f"{place} is not JSON: {error}", param="examples") from error


def _csv_rows(text: str) -> Iterator[tuple[str, Any]]:
    """With a heading that names text and label."""
    head = text[:4096].splitlines()[:1]
    if not head:
        return
    delimiter = max(",;\t", key=head[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    names: list[str] | None = None
    try:
        for row in reader:
            place = f"line {reader.line_num}"
            if names is None:
                names = [name.strip().lower().lstrip("\ufeff") for name in row]
                if "label" not in names or not set(_TEXT_NAMES) & set(names):
                    raise RequestError(
                        f"the first line names the columns {', '.join(names)[:200]}: a CSV file needs text and label",
                        param="examples",
                    )
            elif row:
                if len(row) != len(names):
                    raise RequestError(
                        f"{place} has {len(row)} columns, the heading {len(names)}: quote texts with {delimiter!r}",
                        param="examples",
                    )
                yield place, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise RequestError(f"line {reader.line_num} is not CSV: {error}", param="examples") from error


def _check_line(line: str, place: str) -> None:
    if len(line) > MAX_LINE_CHARS:
        raise RequestError(
            f"{place} has {len(line)} characters, and at most {MAX_LINE_CHARS} are read: a line is one example",
            param="examples",
        )


def _pair(row: Any, place: str) -> tuple[str, str]:
    if not isinstance(row, Mapping):
        raise RequestError(f"{place} is no object: give {{text, label}}", param="examples")
    text = next((row[name] for name in _TEXT_NAMES if name in row), None)
    label = row.get("label")
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"{place} has no text: give {{text, label}}", param="examples")
    if not isinstance(label, str) or not label.strip():
        raise RequestError(f"{place} has no label, or one that is no string", param="examples")
    if len(text) > MAX_TEXT_CHARS:
        raise RequestError(
            f"the text of {place} has {len(text)} characters, and at most {MAX_TEXT_CHARS} are read: shorten it",
            param="examples",
        )
    if len(label) > MAX_LABEL_CHARS:
        raise RequestError(f"the label of {place} has more than {MAX_LABEL_CHARS} characters", param="examples")
    return text, label.strip()


def _labels(given: Sequence[str] | None, found: Sequence[str]) -> tuple[str, ...]:
    counted = Counter(found)
    if len(counted) > MAX_LABELS:
        raise RequestError(
            f"the examples have {len(counted)} labels, and a classifier has at most {MAX_LABELS}: group them, or "
            "check that the column of labels is the right one",
            param="examples",
        )
    if given is None:
        return tuple(sorted(counted))
    known = set(given)
    unknown = sorted(label for label in counted if label not in known)
    if unknown:
        raise RequestError(
            f"the examples have {unknown[0]!r}, which is not among the labels given: add or rename it", param="labels"
        )
    return tuple(dict.fromkeys(given))


def _check_counts(counts: Counter[str], labels: Sequence[str], contradictory: int, at_least: int) -> None:
    aside = f" ({contradictory} texts came under several labels and were left out)" if contradictory else ""
    if at_least < MIN_PER_LABEL:
        return
    if len(labels) < 2:
        raise RequestError(
            f"all examples have the label {labels[0]!r}: a classifier needs at least two{aside}", param="examples"
        )
    scarce = [label for label in labels if counts[label] < at_least]
    if scarce:
        named = ", ".join(f"{label!r} ({counts[label]})" for label in scarce[:5])
        more = f" and {len(scarce) - 5} more" if len(scarce) > 5 else ""
        raise RequestError(
            f"too few examples of {named}{more}: each label needs at least {at_least}, or leave it out{aside}",
            param="examples",
        )
