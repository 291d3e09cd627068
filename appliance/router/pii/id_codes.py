"""Codes of letters and digits that are known by their form and their check digits: IBANs, national ids, wallets."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from stdnum import bitcoin, iban
from stdnum.br import cnpj, cpf
from stdnum.ch import ssn as ahv
from stdnum.cn import ric
from stdnum.es import dni, nie
from stdnum.fi import hetu
from stdnum.fr import nir
from stdnum.in_ import pan
from stdnum.it import codicefiscale
from stdnum.kr import rrn
from stdnum.mx import curp

from appliance.core import PersonalKind
from appliance.router.pii.spans import Span

Check = Callable[[str], bool]

_TOKEN: Final = re.compile(r"\d[A-Za-z0-9]*")
_LONGEST: Final = 64
_LETTERS_BEFORE: Final = 12

_NINO: Final = re.compile(r"[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z]\d{6}[A-D]")
_NINO_SPACED: Final = re.compile(r"\d\d ?\d\d ?\d\d ?[A-D]\b")
_NO_NINO: Final = frozenset({"BG", "GB", "NK", "KN", "TN", "NT", "ZZ"})
_DVLA: Final = re.compile(r"[A-Z9]{5}\d[0156]\d[0-3]\d{2}[A-Z9]{2}\d[A-Z]{2}")
_PAN: Final = re.compile(r"\d{4}[A-Z](?!\w)")
_FORMATTED: Final = re.compile(
    r"\d(?:(?P<cpf>\d\d\.\d{3}\.\d{3}-\d\d)|(?P<cnpj>\d\.\d{3}\.\d{3}/\d{4}-\d\d)"
    r"|(?P<ahv>56\.\d{4}\.\d{4}\.\d\d)|(?P<rrn>\d{5}-\d{7})|(?P<hetu>\d{5}[-+A-FU-Y]\d{3}[0-9A-FHJ-NPR-Y]))(?!\w)"
)
_FORMATTED_CHECKS: Final[Mapping[str, Check]] = {
    "cpf": cpf.is_valid,
    "cnpj": cnpj.is_valid,
    "ahv": ahv.is_valid,
    "rrn": rrn.is_valid,
    "hetu": hetu.is_valid,
}

_IBAN: Final = re.compile(r"\d\d(?: ?[A-Za-z0-9]){11,30}")
_IBAN_LENGTHS: Final[Mapping[str, int]] = {
    country: length
    for length, countries in {
        15: "NO",
        16: "BE",
        18: "DK FI FO GL NL SD",
        19: "MK SI",
        20: "AT BA EE KZ LT LU MN XK",
        21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA",
        23: "AE GI IL IQ OM SO TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST",
        26: "IS TR",
        27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HU LB NI PL SV",
        29: "BR EG PS QA UA",
        30: "JO KW MU YE",
        31: "MT SC",
        32: "LC",
        33: "RU",
    }.items()
    for country in countries.split()
}


def _is_nino(code: str) -> bool:
    return bool(_NINO.fullmatch(code)) and code[:2] not in _NO_NINO


_SHAPES: Final[Mapping[str, tuple[PersonalKind, Check]]] = {
    "AA999999A": ("national_id", _is_nino),
    "99999999A": ("national_id", dni.is_valid),
    "A9999999A": ("national_id", nie.is_valid),
    "AAAAAA99A99A999A": ("national_id", codicefiscale.is_valid),
    "AAAA999999AAAAAA99": ("national_id", curp.is_valid),
    "AAAA999999AAAAAAA9": ("national_id", curp.is_valid),
    "99999999999999999A": ("national_id", ric.is_valid),
    "99999A999999999": ("national_id", nir.is_valid),
    "999999A99999999": ("national_id", nir.is_valid),
}
"""By the sequence of letters and digits. A check digit that one code in 23 passes by chance is enough for a shape that
is rare by itself; shapes of digits alone need a word beside them (see labels.py), but for those below."""
_DIGITS: Final[Mapping[int, Check]] = {15: nir.is_valid, 18: ric.is_valid}
"""Digits alone that hold a date and two check digits: one number in thousands passes by chance."""

_SHAPE: Final = str.maketrans(
    {**dict.fromkeys("0123456789", "9"), **dict.fromkeys("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", "A")}
)
_MRN: Final = re.compile(r"MRN[-:# ]{0,3}\d{4,12}\b")
_MAC: Final = re.compile(r"[:-][0-9A-Fa-f]{2}([:-])(?:[0-9A-Fa-f]{2}\1){3}[0-9A-Fa-f]{2}(?![0-9A-Fa-f:-])")
_MAC_BEGINNING: Final = re.compile(r"(?:^|[^0-9A-Fa-f:-])[0-9A-Fa-f]{2}$")
_WALLETS: Final = (
    re.compile(r"0x[0-9a-fA-F]{40}(?!\w)"),
    re.compile(r"[13][a-km-zA-HJ-NP-Z1-9]{25,34}(?!\w)"),
    re.compile(r"bc1[a-z0-9]{25,60}(?!\w)"),
)


def find_codes(text: str) -> Iterator[Span]:
    """Only where a digit stands is anything tried."""
    for found in _TOKEN.finditer(text):
        start, end = found.span()
        if end - start > _LONGEST or (start and text[start - 1].isdigit()):
            continue
        while start > max(0, found.start() - _LETTERS_BEFORE) and _is_letter(text[start - 1]):
            start -= 1
        if kind := _kind_of(text[start:end]):
            yield Span(kind, start, end)
    for found in _FORMATTED.finditer(text):
        alone = not text[max(0, found.start() - 1) : found.start()].isalnum()
        if alone and _FORMATTED_CHECKS[found.lastgroup or ""](found[0]):
            yield Span("national_id", *found.span())
    for found in _NINO_SPACED.finditer(text):
        start = found.start() - 3
        if start >= 0 and _is_nino(text[start : found.end()].replace(" ", "")):
            yield Span("national_id", start, found.end())


def _is_letter(character: str) -> bool:
    return character.isalpha() and character.isascii()


def find_ibans(text: str) -> Iterator[Span]:
    for found in _IBAN.finditer(text):
        start = found.start() - 2
        length = _IBAN_LENGTHS.get(text[start : start + 2].upper()) if start >= 0 else None
        raw = text[start : found.end()]
        if length is None or len(raw) - raw.count(" ") < length or text[max(0, start - 1) : start].isalnum():
            continue
        cut = _cut(raw, length)
        if iban.is_valid(cut.upper()):
            yield Span("iban", start, start + len(cut))


def find_wallets(text: str) -> Iterator[Span]:
    """Ethereum addresses by their form, Bitcoin's by their check digits too."""
    for pattern in _WALLETS:
        for found in pattern.finditer(text):
            inside = text[max(0, found.start() - 1) : found.start()].isalnum()
            if not inside and (found[0].startswith("0x") or bitcoin.is_valid(found[0])):
                yield Span("crypto_wallet", *found.span())


def find_record_numbers(text: str) -> Iterator[Span]:
    """Medical record numbers that say so themselves."""
    for found in _MRN.finditer(text):
        yield Span("medical_record", *found.span())


def find_pans(text: str) -> Iterator[Span]:
    """Indian tax numbers: five letters, four digits, a letter."""
    for found in _PAN.finditer(text):
        start = found.start() - 5
        code = text[max(0, start) : found.end()]
        if len(code) == 10 and code.isupper() and pan.is_valid(code) and not text[max(0, start - 1) : start].isalnum():
            yield Span("national_id", start, found.end())


def find_mac_addresses(text: str) -> Iterator[Span]:
    for found in _MAC.finditer(text):
        start = found.start() - 2
        if found[0][0] == found[1] and _MAC_BEGINNING.search(text[max(0, start - 1) : found.start()]):
            yield Span("mac_address", start, found.end())


def _kind_of(token: str) -> PersonalKind | None:
    if token.isdigit():
        check = _DIGITS.get(len(token))
        return "national_id" if check is not None and check(token) else None
    code = token.upper()
    known = _SHAPES.get(code.translate(_SHAPE))
    if known is not None and known[1](code):
        return known[0]
    return "driver_license" if len(code) == 16 and _DVLA.fullmatch(code) else None


def _cut(raw: str, length: int) -> str:
    """The first `length` letters and digits, with the spaces between them."""
    for index, character in enumerate(raw):
        length -= character != " "
        if not length:
            return raw[: index + 1]
    return raw
