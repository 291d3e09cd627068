"""Dates as people write them, to ISO 8601. Which of 3/4/2024 is the month is never guessed."""

import re
from collections.abc import Iterator, Mapping
from datetime import date, time
from functools import cache
from typing import Final, Literal

from babel import Locale

from appliance.tasks.extract.normalise.normalised_value import DateOrder, LocaleRules, NormalisedValue

LANGUAGES: Final = (
    "en", "de", "fr", "es", "it", "pt", "nl", "pl", "sv", "da", "nb", "fi", "cs", "sk", "hu", "ro", "tr", "id", "ms",
)  # fmt: skip
"""Whose names of months are known."""

_NUMERIC: Final = re.compile(r"(?<![\d./-])(\d{1,4})\s?([./-])\s?(\d{1,2})\s?\2\s?(\d{1,4})(?![\d/-]|\.\d)")
_COMPACT: Final = re.compile(r"(?<!\d)((?:19|20)\d\d)(\d\d)(\d\d)(?!\d)")
_ASIAN: Final = re.compile(r"(\d{4})\s?[年년]\s?(\d{1,2})\s?[月월]\s?(\d{1,2})\s?[日일]")
_GAP: Final = r"(?:\s*[,./-]\s*|\s+(?:of|de|del)\s+|\s+)"
_ORDINAL: Final = r"(?:st|nd|rd|th|er|º|ª|\.)?"
_DAY_FIRST: Final = re.compile(
    rf"(?<!\d)(\d{{1,2}}){_ORDINAL}{_GAP}([^\W\d_]{{3,12}})\.?(?:{_GAP}['\u2019]?|['\u2019])(\d{{4}}|\d\d)(?!\d)"
)
_MONTH_FIRST: Final = re.compile(
    rf"\b([^\W\d_]{{3,12}})\.?{_GAP}(\d{{1,2}}){_ORDINAL}(?:{_GAP}['\u2019]?|['\u2019])(\d{{4}}|\d\d)(?![\d:])"
)
_TIME: Final = re.compile(r"\b(\d{1,2})[:.h](\d\d)(?:[:.](\d\d))?\s*([ap])?\.?(?:m\b\.?)?", re.IGNORECASE)
_FIRST_TWO_DIGIT_YEAR: Final = 69
"""As POSIX has it: 69 to 99 are 19xx, 00 to 68 are 20xx."""

_SHORT_YEAR: Final = "of the year's two digits it is assumed that they stand last, and the century"
_ORDERS: Final[Mapping[DateOrder, tuple[int, int, int]]] = {"DMY": (2, 1, 0), "MDY": (2, 0, 1), "YMD": (0, 1, 2)}
"""Where year, month and day stand."""


def read_date(raw: str, customs: LocaleRules, kind: Literal["date", "datetime"] = "date") -> NormalisedValue:
    found = next(find_dates(raw, customs), None)
    if found is None:
        return NormalisedValue(kind, raw, reason=_why_none(raw))
    start, end, days, assumed = found
    if not days:
        return NormalisedValue(kind, raw, reason=f"{raw[start:end]!r} is not a day of the calendar")
    if len(days) > 1:
        ways = " or ".join(day.isoformat() for day in sorted(days))
        return NormalisedValue(kind, raw, reason=f"it may be {ways}: say the order (`date_order`) or give a locale")
    (day,) = days
    if kind == "date":
        return NormalisedValue(kind, raw, day.isoformat(), reason=assumed)
    clock = _time(raw[:start] + " " + raw[end:])
    if clock is None:
        return NormalisedValue(kind, raw, reason="it has no time of day")
    return NormalisedValue(kind, raw, f"{day.isoformat()}T{clock.isoformat()}", reason=assumed)


def find_dates(text: str, customs: LocaleRules) -> Iterator[tuple[int, int, frozenset[date], str | None]]:
    """(start, end, the days it may mean, what was assumed) of every date with day, month and year."""
    for pattern, read in (
        (_NUMERIC, _numeric),
        (_COMPACT, _year_first),
        (_ASIAN, _year_first),
        (_DAY_FIRST, _day_first),
        (_MONTH_FIRST, _month_first),
    ):
        for match in pattern.finditer(text):
            days = read(match, customs)
            if days is not None:
                assumed = _SHORT_YEAR if _is_short(match) else None
                yield match.start(), match.end(), days, assumed


def _is_short(match: "re.Match[str]") -> bool:
    return all(len(group) < 4 for group in match.groups() if group and group.isdigit())


def _numeric(match: "re.Match[str]", customs: LocaleRules) -> frozenset[date] | None:
    first, sign, middle, last = match.groups()
    rows = (first, middle, last)
    if len(first) == 4:
        orders: tuple[DateOrder, ...] = ("YMD",) if len(last) <= 2 else ()
    elif len(first) == 3 or len(last) not in (2, 4):
        return None
    elif customs.date_order is not None and not (customs.date_order == "YMD" and len(last) == 4):
        orders = (customs.date_order,)
    else:
        # With points between them the day comes first, wherever dates are written so.
        orders = ("DMY",) if sign == "." else ("DMY", "MDY")
    days = (_in_order(rows, order) for order in orders)
    return frozenset(day for day in days if day is not None)


def _in_order(rows: tuple[str, str, str], order: DateOrder) -> date | None:
    year, month, day = (rows[place] for place in _ORDERS[order])
    return _day(_year(year), int(month), int(day))


def _year_first(match: "re.Match[str]", customs: LocaleRules) -> frozenset[date] | None:
    year, month, day = map(int, match.groups())
    found = _day(year, month, day)
    return None if found is None else frozenset({found})


def _day_first(match: "re.Match[str]", customs: LocaleRules) -> frozenset[date] | None:
    day, month, year = match.groups()
    return _worded(day, month, year)


def _month_first(match: "re.Match[str]", customs: LocaleRules) -> frozenset[date] | None:
    month, day, year = match.groups()
    return _worded(day, month, year)


def _worded(day: str, month: str, year: str) -> frozenset[date] | None:
    months = _months().get(month.casefold())
    if months is None:
        return None
    days = (_day(_year(year), one, int(day)) for one in months)
    return frozenset(found for found in days if found is not None)


def _year(digits: str) -> int:
    number = int(digits)
    if len(digits) > 2:
        return number
    return number + (1900 if number >= _FIRST_TWO_DIGIT_YEAR else 2000)


def _day(year: int, month: int, day: int) -> date | None:
    try:
        return date(year, month, day)
    except ValueError:
        return None


def _time(text: str) -> time | None:
    match = _TIME.search(text)
    if match is None:
        return None
    hour, minute, second, half = match.groups()
    hours = int(hour)
    if half is not None:
        hours = hours % 12 + (12 if half.lower() == "p" else 0)
    try:
        return time(hours, int(minute), int(second or 0))
    except ValueError:
        return None


def _why_none(raw: str) -> str:
    if any(word.casefold() in _months() for word in re.findall(r"[^\W\d_]{3,}", raw)):
        return "it names no day, or no year"
    return "it is not a date with day, month and year"


@cache
def _months() -> Mapping[str, frozenset[int]]:
    """Months by the names they have in the languages known here; a name may stand for two in different languages."""
    found: dict[str, set[int]] = {}
    for language in LANGUAGES:
        names = Locale(language).months
        for context in ("format", "stand-alone"):
            for width in ("wide", "abbreviated"):
                for month, name in names[context][width].items():
                    found.setdefault(name.casefold().rstrip("."), set()).add(month)
    return {name: frozenset(months) for name, months in found.items() if not name.isdigit()}
