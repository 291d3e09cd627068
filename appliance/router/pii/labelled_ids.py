"""Numbers that only the word before them makes personal: passports, licences, records, national ids without a form."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from stdnum import bic
from stdnum.au import tfn
from stdnum.be import nn
from stdnum.br import cnpj, cpf
from stdnum.ca import sin
from stdnum.de import idnr
from stdnum.dk import cpr
from stdnum.es import dni, nie
from stdnum.fr import nif as french_tax
from stdnum.fr import nir
from stdnum.gb import nhs, utr
from stdnum.ie import pps
from stdnum.il import idnr as israeli
from stdnum.in_ import aadhaar
from stdnum.jp import in_ as my_number
from stdnum.nl import bsn
from stdnum.no import fodselsnummer
from stdnum.pl import pesel
from stdnum.pt import cc
from stdnum.pt import nif as portuguese_tax
from stdnum.se import personnummer
from stdnum.tr import tckimlik
from stdnum.za import idnr as south_african

from appliance.core import PersonalKind
from appliance.router.pii.spans import CONTEXT_CHARACTERS, Span, strip_to_digits

_VALUE: Final = re.compile(
    r"(?<![\w.,$€£+-])[A-Za-z]{0,4}[-#]?\d[A-Za-z0-9]{0,20}(?:[ ./-][A-Za-z]{0,2}\d[A-Za-z0-9]{0,12}){0,6}(?!\w)"
)
_DATE: Final = re.compile(r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}")
_SHORTEST: Final = 5
_TO_SPACE: Final = str.maketrans(dict.fromkeys(".,;:!?()[]{}<>\"'`*_/\\|=-#\t\n\r", " "))
_SENTENCE_END: Final = re.compile(r"\n|(?<!\bno)(?<!\bnr)(?<!\bNo)(?<!\bNr)[.!?](?=\s)")


@dataclass(frozen=True, slots=True)
class IdLabel:
    kind: PersonalKind
    gate_words: frozenset[str]
    gate_parts: tuple[str, ...]
    """Words and parts of text, in lower case, without one of which nothing needs to be tried."""
    pattern: re.Pattern[str]
    check: Callable[[str], bool]
    """Given the value in upper case."""


def _label(kind: PersonalKind, gates: str, pattern: str, check: Callable[[str], bool]) -> IdLabel:
    """`gates`: words apart by spaces, parts of words or phrases with a * before them, their spaces written as _."""
    marks = gates.split()
    parts = tuple(mark[1:].replace("_", " ") for mark in marks if mark.startswith("*"))
    compiled = re.compile(rf"(?<![^\W\d_])(?:{pattern})(?![^\W\d_])")
    return IdLabel(kind, frozenset(mark for mark in marks if not mark.startswith("*")), parts, compiled, check)


def _digits(least: int, most: int) -> Callable[[str], bool]:
    return lambda value: least <= len(strip_to_digits(value)) <= most and not _DATE.fullmatch(value)


def _is_bic(value: str) -> bool:
    return bic.is_valid(value)


def _either(*checks: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda value: any(check(value) for check in checks)


LABELS: Final = (
    _label(
        "passport",
        "*passport *reisepass pasaporte passeport",
        r"\w*passport\w*|reisepass\w*|pasaporte|passeport",
        _digits(5, 10),
    ),
    _label(
        "driver_license",
        "*licen *führerschein *permis_de dl dln",
        r"(?:driver'?s?|driving|dl)[ _]{0,2}licen[cs]e|führerschein\w*|permis de conduire|dln?[ ]?#",
        _digits(4, 16),
    ),
    _label(
        "medical_record",
        "*mrn *medical patient *health_p *health_i *health_c",
        r"mrn|medical[ _-](?:records?|supplies|history|id)|patient(?:[ _-](?:id|number|no|record|identifier))?"
        r"|health (?:plan|insurance|card)(?: beneficiary)?(?: id| number| no)?",
        _digits(5, 16),
    ),
    _label(
        "national_id",
        "*ssn *social soc",
        r"\w*ssn|social[ _-]security|social (?:number|ins)\w*|soc sec",
        _digits(9, 9),
    ),
    _label("national_id", "itin taxpayer", r"itin|taxpayer(?: identification)?", _digits(9, 9)),
    _label("national_id", "nhs", r"nhs", nhs.is_valid),
    _label("national_id", "utr *unique_tax", r"utr|unique taxpayer reference", utr.is_valid),
    _label("national_id", "sin *social_ins", r"sin|social insurance", sin.is_valid),
    _label("national_id", "tfn *tax_file", r"tfn|tax file", tfn.is_valid),
    _label(
        "national_id",
        "*steuer idnr *identifikationsnummer *tax_id",
        r"\w*steuer\w*|idnr|tax[ _-]id\w*|\w*identifikationsnummer",
        idnr.is_valid,
    ),
    _label("national_id", "bsn *burgerservice sofi *sofinummer", r"bsn|burgerservice\w*|sofi\w*", bsn.is_valid),
    _label("national_id", "nir insee *curit *vitale", r"nir|s[ée]curit[ée] sociale|insee|carte vitale", nir.is_valid),
    _label("national_id", "fiscal spi", r"num[ée]ro fiscal|spi", french_tax.is_valid),
    _label("national_id", "dni nie nif", r"dni|nie|nif", _either(dni.is_valid, nie.is_valid, portuguese_tax.is_valid)),
    _label(
        "national_id",
        "contribuinte *cidad",
        r"contribuinte|cart[ãa]o de cidad[ãa]o",
        _either(portuguese_tax.is_valid, cc.is_valid),
    ),
    _label("national_id", "cpf", r"cpf", cpf.is_valid),
    _label("national_id", "cnpj", r"cnpj", cnpj.is_valid),
    _label("national_id", "*aadha uidai", r"aadhaa?r\w*|uidai", aadhaar.is_valid),
    _label("national_id", "pesel", r"pesel", pesel.is_valid),
    _label(
        "national_id",
        "personnummer *personal_n *personal_id",
        r"personnummer|personal (?:identity )?number",
        _either(personnummer.is_valid, fodselsnummer.is_valid),
    ),
    _label("national_id", "*dselsnummer", r"f[øo]dselsnummer", fodselsnummer.is_valid),
    _label("national_id", "*cpr", r"cpr\w*", cpr.is_valid),
    _label(
        "national_id",
        "*rijksregister *registre_n *national_reg",
        r"rijksregister\w*|registre national|national register",
        nn.is_valid,
    ),
    _label("national_id", "*pps", r"pps\w*", pps.is_valid),
    _label("national_id", "*kimlik", r"(?:t\.?c\.? )?kimlik\w*", tckimlik.is_valid),
    _label(
        "national_id",
        "*identity_n *identity_d *id_n *teudat",
        r"identity (?:number|no|document)|id (?:number|no)|teudat zehut",
        _either(south_african.is_valid, israeli.is_valid),
    ),
    _label("national_id", "*my_number *マイナンバー *個人番号", r"my number|マイナンバー|個人番号", my_number.is_valid),
    _label(
        "national_id",
        "*national_i *national-i *nationali *identity_card *tax_id",
        r"national[ _-](?:id|identity|identification|insurance)\w*|identity card|tax (?:id|identification|identity)\w*",
        _digits(7, 14),
    ),
)

_BIC_WORDS: Final = re.compile(r"\b(?:bic|swift)\b", re.IGNORECASE)
_BIC: Final = re.compile(r"\b[A-Z]{6}[A-Z0-9]{2}(?:[A-Z0-9]{3})?\b")
_BIRTH_WORDS: Final = re.compile(
    r"\b(?:born|birth ?(?:day|date)?|date_of_birth|dob|d\.o\.b|geboren|geburtsdatum|né[e]? le|naissance|nacimiento)\b",
    re.IGNORECASE,
)
_BIRTH_DATE: Final = re.compile(
    r"(?<!\d)(?:(?:19|20)\d\d[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.](?:(?:19|20)\d\d|\d\d)"
    r"|\d{1,2}(?:st|nd|rd|th)?\.?[ ](?:of )?[A-Za-zéû]{3,9}\.?,?[ ](?:19|20)\d\d"
    r"|[A-Za-z]{3,9}\.?[ ]\d{1,2}(?:st|nd|rd|th)?,?[ ](?:19|20)\d\d)(?!\d)"
)


def labels_in(lowered: str, wanted: Collection[PersonalKind]) -> tuple[IdLabel, ...]:
    """Those that have any of their words in the text: the others need not be tried on any part of it."""
    vocabulary = frozenset(lowered.translate(_TO_SPACE).split())
    return tuple(
        label
        for label in LABELS
        if label.kind in wanted
        and (not label.gate_words.isdisjoint(vocabulary) or any(part in lowered for part in label.gate_parts))
    )


def find_labelled(text: str, lowered: str, labels: Iterable[IdLabel]) -> Iterator[Span]:
    for label in labels:
        for word in label.pattern.finditer(lowered):
            for start, end in _values(text, word.end()):
                if end - start >= _SHORTEST and label.check(text[start:end].upper()):
                    yield Span(label.kind, start, end)


def find_bics(text: str, lowered: str) -> Iterator[Span]:
    if "bic" in lowered or "swift" in lowered:
        for word in _BIC_WORDS.finditer(text):
            for found in _BIC.finditer(text, word.end(), word.end() + CONTEXT_CHARACTERS):
                if bic.is_valid(found[0]):
                    yield Span("bic", *found.span())


def find_birth_dates(text: str, lowered: str) -> Iterator[Span]:
    if any(word in lowered for word in ("born", "birth", "dob", "d.o.b", "gebor", "geburt", "né", "nac", "naiss")):
        for word in _BIRTH_WORDS.finditer(text):
            found = _BIRTH_DATE.search(text, word.end(), word.end() + CONTEXT_CHARACTERS)
            if found:
                yield Span("date_of_birth", *found.span())


def _values(text: str, start: int) -> Iterator[tuple[int, int]]:
    """Numbers after a label, up to the end of its sentence; a label may have several ("numbers 1 and 2")."""
    for found in _VALUE.finditer(text, start, start + CONTEXT_CHARACTERS + 24):
        if found.start() > start + CONTEXT_CHARACTERS or _SENTENCE_END.search(text, start, found.start()):
            return
        yield found.span()
