"""Numbers as people write them: 1,234.50 · 1.234,50 · 1 234,50 · 1'234.50."""

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Final

NUMERAL: Final = re.compile(r"(?<![\d.,])(?<!\d[/:])\d+(?:[.,'\u2019]\d+|[ \u00a0\u202f]\d{3}(?!\d))*(?!\d|[/:]\d)")
_BLANKS: Final = re.compile(r"['\u2019 \u00a0\u202f]")
_MAX_CHARS: Final = 40
_WORDS: Final = {
    word: Decimal(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905 - reads as counting
    )
}
_WORD: Final = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b", re.IGNORECASE)


def list_readings(numeral: str, decimal: str | None = None) -> frozenset[Decimal]:
    """The numbers that a numeral may mean; two where one sign might part decimals or thousands, as in 1,234.

    `decimal` says which sign parts decimals, and leaves one reading. Empty where it is no number.
    """
    text = _BLANKS.sub("", numeral)
    if len(text) > _MAX_CHARS or not re.fullmatch(r"\d+(?:[.,]\d+)*", text):
        return frozenset()
    signs = (decimal,) if decimal is not None else (".", ",")
    found = {_read(text, sign) for sign in signs}
    return frozenset(number for number in found if number is not None)


def _read(text: str, decimal: str) -> Decimal | None:
    """The number, if `decimal` parts decimals and the other sign thousands."""
    whole, _, decimals = text.partition(decimal)
    other = "," if decimal == "." else "."
    if decimal in decimals or other in decimals:
        return None
    if other in whole and not re.fullmatch(rf"[1-9]\d{{0,2}}(?:{re.escape(other)}\d{{3}})+", whole):
        return None
    digits = whole.replace(other, "")
    return Decimal(f"{digits}.{decimals}" if decimals else digits)


def find_numbers(text: str) -> Iterator[tuple[int, int, frozenset[Decimal]]]:
    """(start, end, readings) of every number in a text, small ones in English words included."""
    for match in NUMERAL.finditer(text):
        yield match.start(), match.end(), list_readings(match.group())
        if " " in match.group():  # a blank may part thousands, or two numbers
            for part in re.finditer(r"\S+", match.group()):
                yield match.start() + part.start(), match.start() + part.end(), list_readings(part.group())
    for match in _WORD.finditer(text):
        yield match.start(), match.end(), frozenset({_WORDS[match.group().lower()]})
