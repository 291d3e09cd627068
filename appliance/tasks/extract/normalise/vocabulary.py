"""Terms of a list, however they are spelt: each has one name and any number of others."""

import re
from collections.abc import Mapping, Sequence
from typing import Final

from appliance.tasks.extract.normalise.normalised_value import NormalisedValue

_BETWEEN: Final = re.compile(r"[\W_]+")
_SHOWN: Final = 8


def read_term(raw: str, terms: Mapping[str, Sequence[str]]) -> NormalisedValue:
    """`terms`: the name of each, and what else it is called. Case, blanks and punctuation do not count."""
    wanted = _folded(raw)
    found = [
        name for name, others in terms.items() if raw == name or wanted in {_folded(one) for one in (name, *others)}
    ]
    if raw in terms:
        found = [raw]
    if len(found) == 1:
        return NormalisedValue("term", raw, found[0])
    if found:
        return NormalisedValue("term", raw, reason=f"it may be {' or '.join(map(repr, found[:_SHOWN]))}")
    return NormalisedValue("term", raw, reason=f"it is none of {', '.join(map(repr, list(terms)[:_SHOWN]))}")


def _folded(text: str) -> str:
    return _BETWEEN.sub(" ", text.casefold()).strip() or text.strip()
