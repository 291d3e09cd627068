"""Numbers that are known by their form: cards, social security numbers, telephone numbers, IP addresses."""

import ipaddress
import re
from collections.abc import Iterator
from typing import Final

import phonenumbers
from stdnum import luhn

from appliance.router.pii.spans import Span, after, before, strip_to_digits

_RUN: Final = re.compile(r"\d(?:[ \t.()/\-]{0,3}\d){4,24}")
"""Digits in groups, as people write them. Separators and digits exclude each other, so there is one way to match, and
a pattern that begins with a digit is looked for as fast as one."""

_CARD: Final = re.compile(
    r"(?<!\d)(?:\d{12,19}|\d{4}[ -]\d{4}[ -]\d{4}[ -]\d{1,7}|\d{4}[ -]\d{6}[ -]\d{4,5})(?!\d)",
)
_ISSUERS: Final = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[0-8]|2[2-7])\d{14}|3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11}"
    r"|(?:60|62|64|65|67|63|68)\d{14,17}|35\d{14}|(?:1800|2131)\d{11}"
)
"""The issuers' own ranges with the lengths that they give out."""
_CARD_WORDS: Final = re.compile(
    r"\b(?:cards?|cc|visa|master ?card|maestro|amex|american express|karte|carte|tarjeta)\b"
)

_SSN: Final = re.compile(r"(?<![\d-])(\d{3})([-. ])(\d{2})\2(\d{4})(?![\d-])")

_IPV4: Final = re.compile(r"\.\d{1,3}\.\d{1,3}\.\d{1,3}(?!\w|\.\d)")
_IPV6: Final = re.compile(r":(?:[0-9A-Fa-f]{0,4}:){2,6}[0-9A-Fa-f]{1,4}(?![\w:])")
"""Both from their first separator on, which is rarer in text than what stands before it."""
_IPV4_BEGINNING: Final = re.compile(r"(?:^|[^\w.,$-])(\d{1,3})$")
_IPV6_BEGINNING: Final = re.compile(r"(?:^|[^\w:])([0-9A-Fa-f]{0,4})$")
_WHOLE_IPV4: Final = re.compile(r"\d{1,3}(?:\.\d{1,3}){3}")
_VERSION_WORDS: Final = re.compile(r"\b(?:version|release|v|build|section|chapter|firmware)\W{0,3}$")

_DATE: Final = re.compile(
    r"(?<!\d)(?<!\d[-/.])(?:(?:19|20)\d\d[-/.](?:0?[1-9]|1[0-2])[-/.](?:0?[1-9]|[12]\d|3[01])"
    r"|(?:0?[1-9]|[12]\d|3[01])[-/.](?:0?[1-9]|[12]\d|3[01])[-/.](?:(?:19|20)\d\d|\d\d))(?!\d|[-/.]\d)"
)
_DECIMAL: Final = re.compile(r"\d+\.\d+")
_GROUPS: Final = re.compile(r"\d+")
_NORTH_AMERICAN: Final = re.compile(r"(?:1[ .-]{1,3})?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-]{1,3})[2-9]\d\d[.-]\d{4}")
_PHONE_WORDS: Final = re.compile(
    r"\b(?:(?:tele)?phones?|tel|mobile|cell(?:ular)?|fax|call(?:ing|ed)?|contacts?|whatsapp|sms|text me|dial|reach|"
    r"hotline|answering|messages to|registered|ring|callback|handy|telefon[eo]?|teléfono|téléphone|"
    r"(?:desk|office|home|work)(?=\W{1,4}$)|portable|móvil|celular|telephonenum|phonenumber|phone_number|mobil|gsm)(?![a-z])"
)
_PHONE_WORDS_AFTER: Final = re.compile(r"\W{0,4}(?:office|fax|mobile|home|work|cell|phone|tel)\b")
_REGIONS: Final = ("GB", "DE", "FR", "IT", "NL", "BE", "CH", "AT", "AU", "ES", "SE", "IN", "ZA")
"""Whose national numbers are known without a word beside them: those begin with 0 or are grouped in their own way."""
_MOST_LOOKUPS: Final = 2
"""Numbering plans take some 50 microseconds each to ask; beyond this many fruitless ones in a piece of text, form
alone decides."""


def find_numbers(text: str, plans: "NumberingPlans") -> Iterator[Span]:
    for found in _RUN.finditer(text):
        start, end = found.span()
        while start and text[start - 1] in "+(" and start > found.start() - 2:
            start -= 1
        raw = text[start:end]
        if _continues(text[max(0, start - 2) : start]) or (end < len(text) and _is_letter(text[end])):
            continue
        yield from _in_run(text, raw, start, end, plans)


def find_ip_addresses(text: str) -> Iterator[Span]:
    """Public addresses: those of a private network are nobody's."""
    for pattern, beginning in ((_IPV4, _IPV4_BEGINNING), (_IPV6, _IPV6_BEGINNING)):
        for found in pattern.finditer(text):
            head = beginning.search(text[max(0, found.start() - 5) : found.start()])
            start = found.start() - len(head[1]) if head else -1
            if start >= 0 and _is_public(text[start : found.end()]) and not _VERSION_WORDS.search(before(text, start)):
                yield Span("ip_address", start, found.end())


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def _continues(two: str) -> bool:
    """Whether the number goes on from the two characters before it: a longer code, an amount."""
    last = two[-1:]
    if last in "-,.":
        return two[:-1].isalnum() if last == "-" else two[:-1].isdigit()
    return last.isalnum() or last in "_$€£"


def _is_letter(character: str) -> bool:
    return (character.isalnum() and character != "x") or character == "_"


def _in_run(text: str, raw: str, start: int, end: int, plans: "NumberingPlans") -> Iterator[Span]:
    for found in _CARD.finditer(raw):
        if is_card(strip_to_digits(found[0]), text, start + found.start()):
            yield Span("payment_card", start + found.start(), start + found.end())
            return
    if (ssn := _SSN.search(raw)) and is_ssn(*ssn.group(1, 3, 4)):
        yield Span("national_id", start + ssn.start(), start + ssn.end())
    elif not _WHOLE_IPV4.fullmatch(raw) and _is_phone(text, raw, start, end, plans):
        yield Span("phone", start, end)


def is_card(digits: str, text: str, start: int) -> bool:
    """By check digit, and by an issuer's range or a word that says so."""
    if not luhn.is_valid(digits) or len(set(digits)) < 2:
        return False
    return bool(_ISSUERS.fullmatch(digits) or _CARD_WORDS.search(before(text, start)))


def is_ssn(area: str, group: str, serial: str) -> bool:
    """US social security and taxpayer numbers; there is no check digit, only parts that are never zero."""
    return area != "000" and group != "00" and serial != "0000"


def _is_phone(text: str, raw: str, start: int, end: int, plans: "NumberingPlans") -> bool:
    groups = _GROUPS.findall(raw)
    count = sum(map(len, groups))
    if not 7 <= count <= 15 or sum(len(group) == 1 for group in groups) > 2 or _DATE.search(raw):
        return False
    if raw.startswith(("+", "(+")) and count >= 8:
        return True
    if _PHONE_WORDS.search(before(text, start)) or _PHONE_WORDS_AFTER.match(after(text, end)):
        return True
    if len(groups) == 1 or _DECIMAL.fullmatch(raw):
        return False
    if _NORTH_AMERICAN.fullmatch(raw.strip()):
        return True
    if raw.startswith("00"):
        return count >= 10
    return raw.lstrip("(").startswith("0") and 9 <= count <= 11 and plans.know(raw)


class NumberingPlans:
    """Whether some country would give out a number. One for each text that is searched, for it tires."""

    def __init__(self) -> None:
        self._fruitless = 0

    def know(self, raw: str) -> bool:
        if self._fruitless >= _MOST_LOOKUPS:
            return True
        if any(_is_given_out(raw, region) for region in _REGIONS):
            return True
        self._fruitless += 1
        return False


def _is_given_out(raw: str, region: str) -> bool:
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(raw, region))
    except phonenumbers.NumberParseException:
        return False
