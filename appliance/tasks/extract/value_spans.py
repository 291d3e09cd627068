"""Where each value stands in a JSON text. The text has been parsed before, so this only walks it."""

import re
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import orjson

_SCALAR = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s,\]}]+', re.DOTALL)
_BLANK = re.compile(r"\s*")

Span = tuple[int, int]


def find_value_spans(text: str) -> Mapping[str, Span]:
    """First character and the one after the last of every leaf (scalar, empty list, empty object), by JSON pointer.

    Strings keep their quotes. `text` must be valid JSON; of a key given twice the last value counts, as in the parser.
    """
    leaves: dict[str, Span] = {}
    _walk(text, 0, "", leaves)
    return leaves


def _walk(text: str, place: int, pointer: str, leaves: dict[str, Span]) -> int:
    """Note the leaves of the value at `place`; the place after it."""
    start = _skip(text, place)
    if text[start] not in "{[":
        end = _scalar_end(text, start)
        leaves[pointer] = (start, end)
        return end
    is_object = text[start] == "{"
    place = _skip(text, start + 1)
    if text[place] in "}]":
        leaves[pointer] = (start, place + 1)
        return place + 1
    for index in count():
        key = str(index)
        if is_object:
            end = _scalar_end(text, place)
            key = escape_pointer_key(orjson.loads(text[place:end]))
            place = _skip(text, end) + 1  # the colon
        place = _skip(text, _walk(text, place, f"{pointer}/{key}", leaves))
        if text[place] != ",":
            break
        place = _skip(text, place + 1)
    return place + 1


def _scalar_end(text: str, place: int) -> int:
    found = _SCALAR.match(text, place)
    assert found is not None, "the text is not valid JSON"
    return found.end()


def _skip(text: str, place: int) -> int:
    blank = _BLANK.match(text, place)
    return place if blank is None else blank.end()


def iter_strings(value: Any, pointer: str = "") -> Iterator[tuple[str, str]]:
    """Every string of a parsed JSON value with its JSON pointer."""
    if isinstance(value, str):
        yield pointer, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from iter_strings(inner, f"{pointer}/{escape_pointer_key(key)}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from iter_strings(inner, f"{pointer}/{index}")


def escape_pointer_key(key: str) -> str:
    """A key as it stands in a JSON pointer."""
    return key.replace("~", "~0").replace("/", "~1")
