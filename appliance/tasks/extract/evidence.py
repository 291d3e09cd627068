"""Where in its text an extracted value stands, and which values stand nowhere in it.

A value is looked for as it is written, then without regard to case, blanks and the shape of quotes and dashes, then,
if it is a number or a date, by what it means. Places are counted in characters (Unicode code points). What is found
nowhere was made up, or put into other words.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal, InvalidOperation
from typing import Any, Final

from appliance.core.json_types import JsonObject, JsonSchema
from appliance.tasks.extract.normalise.dates import find_dates
from appliance.tasks.extract.normalise.normalised_value import ANY
from appliance.tasks.extract.normalise.numerals import NUMERAL, find_numbers, list_readings
from appliance.tasks.extract.value_spans import Span, escape_pointer_key

_SAME: Final = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"', "\u2010": "-",
        "\u2011": "-", "\u2012": "-", "\u2013": "-", "\u2014": "-", "\u2212": "-", "\u00a0": " ", "\u202f": " ",
    }
)  # fmt: skip
"""One character for one, so that places stay where they are."""
_SHORT_CHARS: Final = 3
"""So short a value counts only where it stands as a word of its own."""
_MAX_WORDS: Final = 400
_EDGES: Final = " \t\r\n,;."


@dataclass(frozen=True, slots=True)
class Evidence:
    places: Mapping[str, Span | None]
    """By JSON pointer of every leaf: the characters it was taken from."""
    missing: tuple[str, ...]
    """Pointers of values that should stand in the text and do not."""


Piece = tuple[int, str]
"""A piece of a text: the place of its first character, and what it says."""


def find_evidence(found: Any, schema: JsonSchema, piece_of: Callable[[str], Piece]) -> Evidence:
    """`piece_of` says for a JSON pointer from which piece the value was taken."""
    searched: dict[int, _Searched] = {}
    places: dict[str, Span | None] = {}
    missing: list[str] = []
    for pointer, value, rules in iter_leaves(found, schema, schema, ""):
        offset, text = piece_of(pointer)
        if offset not in searched:
            searched[offset] = _Searched(text)
        place = searched[offset].find(value)
        places[pointer] = None if place is None else (place[0] + offset, place[1] + offset)
        if place is None and _is_copied(value, rules):
            missing.append(pointer)
    return Evidence(places, tuple(missing))


def iter_leaves(value: Any, schema: Any, root: JsonSchema, pointer: str) -> Iterator[tuple[str, Any, JsonObject]]:
    """(JSON pointer, value, its schema as far as it can be told) of every scalar of an object."""
    rules = _resolved(schema, root)
    if isinstance(value, dict):
        for key, inner in value.items():
            below = rules.get("properties", {}).get(key, rules.get("additionalProperties"))
            yield from iter_leaves(inner, below, root, f"{pointer}/{escape_pointer_key(key)}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from iter_leaves(inner, rules.get("items"), root, f"{pointer}/{index}")
    else:
        yield pointer, value, rules


def _resolved(schema: Any, root: JsonSchema) -> JsonObject:
    for _ in range(8):
        if not isinstance(schema, dict):
            return {}
        if isinstance(schema.get("$ref"), str):
            schema = _at(schema["$ref"], root)
        elif isinstance(schema.get("anyOf"), list):
            schema = next((one for one in schema["anyOf"] if isinstance(one, dict) and one.get("type") != "null"), {})
        else:
            return schema
    return {}


def _at(reference: str, root: JsonSchema) -> Any:
    place: Any = root
    for key in reference.removeprefix("#").strip("/").split("/"):
        place = place.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(place, dict) else None
    return place


def _is_copied(value: Any, rules: JsonSchema) -> bool:
    """Whether a value ought to stand in the text: answers out of a list, yes and no, and nothing at all need not."""
    if value is None or isinstance(value, bool) or "enum" in rules or "const" in rules:
        return False
    return not isinstance(value, str) or bool(value.strip())


class _Searched:
    """One text in which several values are looked for; what must be worked out is worked out once."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._plain = text.translate(_SAME)
        self._numbers: list[tuple[int, int, frozenset[Decimal]]] | None = None
        self._dates: list[tuple[int, int, frozenset[date], str | None]] | None = None

    def find(self, value: Any) -> Span | None:
        if isinstance(value, bool) or value is None:
            return None
        if isinstance(value, int | float):
            return self._number(frozenset({abs(Decimal(str(value)))}))
        wanted = value.strip()
        if not wanted:
            return None
        return self._exactly(wanted) or self._loosely(wanted) or self._by_meaning(wanted)

    def _exactly(self, wanted: str) -> Span | None:
        whole = re.search(_as_word(re.escape(wanted)), self._text)
        if whole is not None:
            return whole.span()
        is_part = len(wanted) >= _SHORT_CHARS and any(map(str.isalpha, wanted))
        place = self._text.find(wanted) if is_part else -1
        return None if place < 0 else (place, place + len(wanted))

    def _loosely(self, wanted: str) -> Span | None:
        words = [word.strip(_EDGES) or word for word in wanted.translate(_SAME).split()]
        if len(words) > _MAX_WORDS:
            return None
        pattern = r"[\s,;.]+".join(re.escape(word) for word in words)
        found = re.search(_as_word(pattern), self._plain, re.IGNORECASE)
        return None if found is None else found.span()

    def _by_meaning(self, wanted: str) -> Span | None:
        days = [days for start, end, days, _ in find_dates(wanted, ANY) if end - start >= len(wanted) - 1]
        if days:
            return self._date(days[0])
        if NUMERAL.fullmatch(wanted.lstrip("+-")):
            return self._number(list_readings(wanted.lstrip("+-")))
        return None

    def _number(self, wanted: frozenset[Decimal]) -> Span | None:
        if self._numbers is None:
            self._numbers = list(find_numbers(self._plain))
        try:
            return next(((start, end) for start, end, numbers in self._numbers if numbers & wanted), None)
        except InvalidOperation:
            return None

    def _date(self, wanted: frozenset[date]) -> Span | None:
        if self._dates is None:
            self._dates = list(find_dates(self._plain, ANY))
        return next(((start, end) for start, end, days, _ in self._dates if days & wanted), None)


def _as_word(pattern: str) -> str:
    """Not as a part of a longer word or number."""
    return rf"(?<!\w)(?<!\d[.,]){pattern}(?!\w|[.,]\d)"
