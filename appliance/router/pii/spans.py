"""Where something was found, and the windows of text around it."""

from typing import Final, NamedTuple

from appliance.core import PersonalKind

CONTEXT_CHARACTERS: Final = 40
"""How far a word may stand from the number that it explains."""


class Span(NamedTuple):
    kind: PersonalKind
    start: int
    end: int


def before(text: str, start: int) -> str:
    """What stands before a number, in lower case: a form has its label on the line above."""
    return text[max(0, start - CONTEXT_CHARACTERS) : start].lower()


def after(text: str, end: int) -> str:
    return text[end : end + 16].partition("\n")[0].lower()


def strip_to_digits(raw: str) -> str:
    return "".join(filter(str.isdigit, raw))
