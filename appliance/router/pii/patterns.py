"""All kinds over one text, and over a long one piece by piece."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final

from appliance.core import PersonalKind
from appliance.router.pii import id_codes, labelled_ids, number_formats, word_patterns
from appliance.router.pii.spans import Span

_DENSE: Final = re.compile(r"\d(?:\D{0,4}\d){4,}")
"""Five digits near each other. Numbers that identify somebody have them, and most of a text has not."""
_BEFORE_CHARACTERS: Final = 64
_AFTER_CHARACTERS: Final = 40
"""What is searched around them: the words before a number, the rest of a code behind it."""

_SPACES: Final = "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_DASHES: Final = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63"
_INVISIBLE: Final = "\u200b\u200c\u200d\u2060\ufeff\u00ad"
_FIRST_DIGITS: Final = (0x0660, 0x06F0, 0x0966, 0x09E6, *range(0x1D7CE, 0x1D7FF, 10))
_PLAIN: Final = {
    **dict.fromkeys(_SPACES, " "),
    **dict.fromkeys(_DASHES, "-"),
    **dict.fromkeys(_INVISIBLE, ""),
    **dict.fromkeys("\u2018\u2019", "'"),
    **{chr(0xFF01 + offset): chr(0x21 + offset) for offset in range(94)},
    **{chr(first + digit): str(digit) for first in _FIRST_DIGITS for digit in range(10)},
}
"""Spaces, dashes and digits of other scripts as plain ones; invisible characters go."""
_ODD: Final = re.compile(f"[{''.join(_PLAIN)}]")

_Find = Callable[[str, str], Iterator[Span]]
"""Given the text, and the text in lower case."""
_Finders = tuple[tuple[frozenset[PersonalKind], _Find], ...]

_NUMBERS: Final = frozenset({"payment_card", "phone", "national_id"})
_CODES: Final = frozenset({"national_id", "driver_license"})
_ANYWHERE: Final[_Finders] = (
    (frozenset({"email"}), lambda text, lowered: word_patterns.find_emails(text)),
    (frozenset({"credentials"}), word_patterns.find_credentials),
    (frozenset({"credentials"}), word_patterns.find_named_secrets),
    (frozenset({"bic"}), labelled_ids.find_bics),
    (frozenset({"date_of_birth"}), labelled_ids.find_birth_dates),
    (frozenset({"ip_address"}), lambda text, lowered: number_formats.find_ip_addresses(text)),
    (frozenset({"mac_address"}), lambda text, lowered: id_codes.find_mac_addresses(text)),
    (frozenset({"national_id"}), lambda text, lowered: id_codes.find_pans(text)),
    (frozenset({"medical_record"}), lambda text, lowered: id_codes.find_record_numbers(text)),
    (frozenset({"crypto_wallet"}), lambda text, lowered: id_codes.find_wallets(text)),
    (frozenset({"postal_address"}), lambda text, lowered: word_patterns.find_addresses(text)),
    (frozenset({"person_name"}), lambda text, lowered: word_patterns.find_names(text)),
)


def plain(text: str) -> str:
    """`text` with odd spaces, dashes and digits replaced."""
    return text if text.isascii() else _ODD.sub(lambda found: _PLAIN[found[0]], text)


def find_personal_data(text: str, kinds: Collection[PersonalKind]) -> list[Span]:
    """Everything of these kinds in `text`, which `plain` has gone through."""
    wanted = frozenset(kinds)
    lowered = text.lower()
    found = [span for gives, search in _ANYWHERE if not wanted.isdisjoint(gives) for span in search(text, lowered)]
    found += _near_numbers(text, wanted)
    return [span for span in found if span.kind in wanted]


def _near_numbers(text: str, wanted: frozenset[PersonalKind]) -> Iterator[Span]:
    pieces = [(start, text[start:end]) for start, end in _neighbourhoods(text)]
    if not pieces:
        return
    plans = number_formats.NumberingPlans()
    named = labelled_ids.labels_in("\n".join(piece for _, piece in pieces).lower(), wanted)
    for start, piece in pieces:
        for span in _in_piece(piece, wanted, plans, named):
            yield Span(span.kind, start + span.start, start + span.end)


def _in_piece(
    piece: str,
    wanted: frozenset[PersonalKind],
    plans: number_formats.NumberingPlans,
    named: Sequence[labelled_ids.IdLabel],
) -> Iterator[Span]:
    if not wanted.isdisjoint(_NUMBERS):
        yield from number_formats.find_numbers(piece, plans)
    if not wanted.isdisjoint(_CODES):
        yield from id_codes.find_codes(piece)
    if "iban" in wanted:
        yield from id_codes.find_ibans(piece)
    if named:
        yield from labelled_ids.find_labelled(piece, piece.lower(), named)


def _neighbourhoods(text: str) -> Iterator[tuple[int, int]]:
    """Where digits stand close, with what is around them; what overlaps is one."""
    begin = end = -1
    for run in _DENSE.finditer(text):
        start = max(0, run.start() - _BEFORE_CHARACTERS)
        if start > end:
            if end >= 0:
                yield begin, end
            begin = start
        end = run.end() + _AFTER_CHARACTERS
    if end >= 0:
        yield begin, end


def make(kinds: Collection[PersonalKind]) -> "PiiPatternDetector":
    return PiiPatternDetector(kinds)


class PiiPatternDetector:
    """The detector that is always there. Holds nothing that changes; may be used by several threads."""

    is_quick = True

    def __init__(self, kinds: Collection[PersonalKind]) -> None:
        self._kinds = tuple(kinds)

    def kinds_in(self, text: str) -> tuple[PersonalKind, ...]:
        found = {span.kind for span in find_personal_data(plain(text), self._kinds)}
        return tuple(kind for kind in self._kinds if kind in found)
