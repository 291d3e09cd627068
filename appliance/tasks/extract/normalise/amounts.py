"""Amounts of money and plain numbers: a decimal as text, and the currency's ISO 4217 code."""

import re
from collections.abc import Mapping
from decimal import Decimal
from functools import cache
from typing import Final, Literal

from babel.core import get_global

from appliance.tasks.extract.normalise.normalised_value import LocaleRules, NormalisedValue
from appliance.tasks.extract.normalise.numerals import NUMERAL, list_readings

_SYMBOLS: Final[Mapping[str, str]] = {
    "€": "EUR", "£": "GBP", "₹": "INR", "₩": "KRW", "₽": "RUB", "₺": "TRY", "₪": "ILS", "₫": "VND", "฿": "THB",
    "₴": "UAH", "₦": "NGN", "₱": "PHP", "₸": "KZT", "₡": "CRC", "zł": "PLN", "kč": "CZK", "ft": "HUF", "rm": "MYR",
    "rp": "IDR", "r$": "BRL", "us$": "USD", "c$": "CAD", "ca$": "CAD", "a$": "AUD", "au$": "AUD", "nz$": "NZD",
    "hk$": "HKD", "s$": "SGD", "nt$": "TWD", "mx$": "MXN", "sfr": "CHF", "fr.": "CHF", "euro": "EUR", "euros": "EUR",
}  # fmt: skip
"""Signs that stand for one currency only. `$`, `¥`, `kr` and a bare `Rs` stand for several, so they settle nothing."""
_SHARED: Final[Mapping[str, str]] = {"$": "USD, CAD, AUD or others", "¥": "JPY or CNY", "kr": "SEK, NOK, DKK or ISK",
                                     "rs": "INR, PKR or LKR"}  # fmt: skip
_WORD: Final = re.compile(r"[^\W\d_]{0,3}\$|[€£₹₩₽₺₪₫฿₴₦₱₸₡¥]|[^\W\d_]+\.?", re.UNICODE)
_SIGNS: Final = re.compile(r"[-\u2212\u2013+()\s.,:*/]+")
_WORDS_TOO: Final = frozenset({"ALL", "BAM", "COP", "CUP", "GEL", "MAD", "MOP", "PEN", "RON", "SOS", "TOP", "TRY"})
"""Codes that are also words, which receipts in capitals put beside numbers."""
_NEAR_CHARS: Final = 8
"""As far from a number its currency stands."""


def read_amount(raw: str, customs: LocaleRules, kind: Literal["amount", "number"] = "amount") -> NormalisedValue:
    found = list(NUMERAL.finditer(raw))
    if len(found) != 1:
        why = "it has no digits" if not found else f"it holds {len(found)} numbers"
        return NormalisedValue(kind, raw, reason=why)
    before, after = raw[: found[0].start()], raw[found[0].end() :]
    currency, note, rest = _currency(f"{before} {after}")
    if _SIGNS.sub("", rest):
        return NormalisedValue(kind, raw, reason=f"{rest.strip()[:40]!r} beside the number is not understood")
    currency = currency or customs.currency
    numbers = list_readings(found[0].group(), customs.decimal)
    if len(numbers) != 1:
        return NormalisedValue(kind, raw, currency=currency, reason=_why(found[0].group(), numbers))
    (number,) = numbers
    negative = (
        bool(re.search(r"[-\u2212\u2013]\s*(?:\D{0,4})$", before)) or ("(" in before and ")" in after) or _trails(after)
    )
    note = None if currency is not None or kind == "number" else note
    return NormalisedValue(kind, raw, format(-number if negative else number, "f"), currency, note)


def find_currency_near(text: str, start: int, end: int) -> str | None:
    """The currency that stands right beside a number in a text, on its line."""
    before = text[max(0, start - _NEAR_CHARS) : start].rsplit("\n", 1)[-1]
    after = text[end : end + _NEAR_CHARS].split("\n", 1)[0]
    beside = [*_WORD.findall(before)[-1:], *_WORD.findall(after)[:1]]
    codes = (_code(word) for word in beside if word not in _WORDS_TOO)
    return next((code for code in codes if code is not None), None)


def _trails(after: str) -> bool:
    """Whether the minus stands behind the number, as accountants write it."""
    return bool(re.fullmatch(r"\s*[-\u2212\u2013]\s*", after))


def _why(numeral: str, numbers: frozenset[Decimal]) -> str:
    if not numbers:
        return f"{numeral!r} is not a number"
    low, high = sorted(numbers)
    return f"{numeral!r} may be {low} or {high}: say which sign parts decimals (`decimal`) or give a locale"


def _currency(text: str) -> tuple[str | None, str | None, str]:
    """The code, why there is none, and what of the text is no currency."""
    note: str | None = None
    code: str | None = None
    rest = text
    for word in _WORD.findall(text):
        found, shared = _code(word), _SHARED.get(word.lower().rstrip("."))
        if found is not None:
            code = found
        elif shared is not None:
            note = f"{word!r} may be {shared}: say which (`currency`)"
        else:
            continue
        rest = rest.replace(word, " ", 1)
    return code, note, rest


def _code(word: str) -> str | None:
    found = _SYMBOLS.get(word.lower()) or _SYMBOLS.get(word.lower().rstrip("."))
    if found is not None:
        return found
    return word if word in _codes() else None


@cache
def _codes() -> frozenset[str]:
    return frozenset(get_global("all_currencies"))


def is_currency(code: object) -> bool:
    """Whether it is an ISO 4217 code."""
    return isinstance(code, str) and code in _codes()
