"""What is known by the words in it: e-mail addresses, secrets, and, as far as rules go, postal addresses and names."""

import re
import string
from collections.abc import Iterator
from typing import Final

from appliance.router.pii.spans import Span

_LOCAL_PART: Final = string.ascii_letters + string.digits + "!#$%&'*+/=?^_`{|}~.-"
_LONGEST_LOCAL_PART: Final = 64
_DOMAIN: Final = re.compile(r"[A-Za-z0-9\u00a1-\uffff-]{1,63}(?:\.[A-Za-z0-9\u00a1-\uffff-]{1,63}){0,7}")
_URL_LOGIN: Final = re.compile(r"[a-z][a-z0-9+.-]{1,20}://[^\s/:@]{1,100}:[^\s/@]{1,100}@[^\s/]{1,253}", re.IGNORECASE)

_SECRETS: Final = (
    (("sk-", "sk_live_", "sk_test_", "rk_live_"), re.compile(r"\b[sr]k[-_](?:[a-z]+[-_])?[A-Za-z0-9_-]{16,200}")),
    (("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"), re.compile(r"\b(?:gh[pousr]_|github_pat_)\w{20,255}")),
    (("xox",), re.compile(r"\bxox[abeprs]-[A-Za-z0-9-]{10,250}")),
    (("AKIA", "ASIA"), re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")),
    (("AIza",), re.compile(r"\bAIza[\w-]{35}")),
    (("glpat-",), re.compile(r"\bglpat-[\w-]{20,}")),
    (("hf_", "npm_", "pypi-"), re.compile(r"\b(?:hf_|npm_|pypi-)[A-Za-z0-9_-]{30,250}")),
    (("eyJ",), re.compile(r"\beyJ[\w-]{10,4000}\.eyJ[\w-]{10,4000}\.[\w-]{10,}")),
    (("PRIVATE KEY",), re.compile(r"-----BEGIN (?:[A-Z]{2,10} ){0,2}PRIVATE KEY-----")),
)
_VALUE: Final = r"""["']?\s{0,3}(?:[:=]|\bis\b)\s{0,3}["'`]?(?P<value>[^\s"'`,;<>(){}\[\]]{6,200})"""
_NAMED_SECRETS: Final = tuple(
    (mark, re.compile(name + _VALUE))
    for mark, name in (
        ("passw", r"passw(?:or)?(?:d|t)"),
        ("passphrase", r"passphrase"),
        ("pwd", r"pwd"),
        ("secret", r"secret(?:[ _-]?key)?"),
        ("api", r"api[ _-]?key"),
        ("token", r"(?:(?<=access.)|(?<=auth.)|(?<=bearer.))token"),
        ("access", r"access[ _-]?key"),
    )
)
"""With letters that must be there; they are looked for in the lowered text."""
_HAS_DIGIT: Final = re.compile(r"\d")
_HAS_LETTER: Final = re.compile(r"[A-Za-z]")

_ADDRESS: Final = re.compile(
    r"(?<![\w.,$€£-])\d{1,6}[A-Za-z]?,?[ ](?:(?:[NSEW]\.?|[A-Z][\w.'-]{1,24}|\d{1,3}(?:st|nd|rd|th))[ ]){1,4}"
    r"(?:Street|St|Avenue|Ave|Road|Rd|Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Ct|Place|Pl|Square|Sq|Terrace|Ter|Way|"
    r"Parkway|Pkwy|Highway|Hwy|Circle|Cir|Crescent|Close|Gardens|Grove|Mews|Row|Trail|Alley)\b"
    r"|\b[A-ZÄÖÜ][\wäöüß-]{2,30}(?:straße|strasse|str\.|weg|gasse|platz|allee|gatan|vägen|katu|straat|laan)[ ]\d{1,4}\b"
    r"|\bP\.?[ ]?O\.?[ ]?Box[ ]\d{1,6}\b"
    r"|\b\d{1,4}(?:[ ]?bis)?,?[ ](?:rue|avenue|boulevard|place|chemin|quai)[ ]"
    r"(?:[\w'-]{1,20}[ ]){0,4}[A-ZÉ][\w'-]{2,20}"
    r"|\b(?:Via|Viale|Piazza|Calle|Avenida|Plaza|Rua|Travessa)[ ](?:[\w'.-]{1,20}[ ]){0,4}[\w'.-]{2,20},?[ ]\d{1,4}\b"
    r"|\b(?:Apt|Apartment|Suite|Unit|Flat)\.?[ ]#?\d{1,5}[A-Za-z]?\b"
)
_NAME: Final = re.compile(
    r"\b(?:(?:Mr|Mrs|Ms|Miss|Mx|Dr|Prof|Sir|Herr|Frau|Monsieur|Madame|Señora?|Signora?)\.?[ ]"
    r"|(?:[Mm]y name is|[Ii] am called|[Nn]ame:|Dear|Regards,|Sincerely,)\s{1,3})"
    r"(?:[^\W\d_a-zß-ÿ][\w'-]{1,24}[ ]?){1,3}"
)


def find_emails(text: str) -> Iterator[Span]:
    """Around every @: the local part by stripping to the left, the domain by one match to the right."""
    place = text.find("@")
    while place != -1:
        left = text[max(0, place - _LONGEST_LOCAL_PART) : place]
        local = left[len(left.rstrip(_LOCAL_PART)) :].lstrip(".'`|{}=/?&")
        domain = _DOMAIN.match(text, place + 1) if local else None
        if domain and _is_domain(domain[0].rstrip(".-")):
            yield Span("email", place - len(local), place + 1 + len(domain[0].rstrip(".-")))
        place = text.find("@", place + 1)


def _is_domain(name: str) -> bool:
    head, _, last = name.rpartition(".")
    return bool(head) and len(last) >= 2 and not last[0].isdigit() and not last.startswith("-")


def find_credentials(text: str, lowered: str) -> Iterator[Span]:
    if "://" in text and "@" in text:
        for found in _URL_LOGIN.finditer(text):
            yield Span("credentials", *found.span())
    for marks, pattern in _SECRETS:
        if any(mark in text for mark in marks):
            for found in pattern.finditer(text):
                if pattern is not _SECRETS[0][1] or _HAS_DIGIT.search(found[0]):
                    yield Span("credentials", *found.span())


def find_named_secrets(text: str, lowered: str) -> Iterator[Span]:
    """What is called a password or key, and looks like one: with a digit in it."""
    for mark, pattern in _NAMED_SECRETS:
        for found in pattern.finditer(lowered) if mark in lowered else ():
            if _HAS_DIGIT.search(found["value"]) and _HAS_LETTER.search(found["value"]):
                yield Span("credentials", *found.span("value"))


def find_addresses(text: str) -> Iterator[Span]:
    """Streets with numbers as some countries write them. What else makes an address is not found."""
    for found in _ADDRESS.finditer(text):
        yield Span("postal_address", *found.span())


def find_names(text: str) -> Iterator[Span]:
    """Names that a title or a phrase announces: a small part of all names."""
    for found in _NAME.finditer(text):
        yield Span("person_name", *found.span())
