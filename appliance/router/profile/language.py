"""A cheap guess at the language: the script where that says it, else the commonest small words."""

import re
from collections.abc import Mapping, Sequence
from typing import Final

_SCRIPTS: Final = (
    ("ja", re.compile(r"[\u3041-\u30ff]")),
    ("ko", re.compile(r"[\uac00-\ud7af]")),
    ("zh", re.compile(r"[\u4e00-\u9fff]")),
    ("ru", re.compile(r"[\u0400-\u04ff]{2}")),
    ("el", re.compile(r"[\u0370-\u03ff]{2}")),
    ("he", re.compile(r"[\u0590-\u05ff]{2}")),
    ("ar", re.compile(r"[\u0600-\u06ff]{2}")),
    ("hi", re.compile(r"[\u0900-\u097f]{2}")),
    ("th", re.compile(r"[\u0e00-\u0e7f]{2}")),
)

_NOT_LATIN: Final = re.compile(r"[\u0370-\u1fff\u3041-\ud7af]")
"""Any of these scripts. Typographic signs lie between the two: quotes and dashes must not cost nine searches."""

_SMALL_WORDS: Final[Mapping[str, str]] = {
    "en": "the of and is in to what how for are this that with it from you my",
    "de": "der die das und ist nicht ein eine zu mit von den wie was auf für im ich",
    "fr": "le la les des est et une un dans que qui pour pas du sur avec je vous",
    "es": "el los las una es y en que por para con del como no se mi qué su",
    "it": "il gli che di una sono per con non del della come mi questo è si",
    "pt": "o os uma é que em para com não do da como por se meu você isso",
    "nl": "de het een en van is niet dat met voor op zijn hoe wat mijn ik",
}


def _by_word() -> Mapping[str, tuple[str, ...]]:
    codes: dict[str, tuple[str, ...]] = {}
    for code, words in _SMALL_WORDS.items():
        for word in words.split():
            codes[word] = (*codes.get(word, ()), code)
    return codes


_LANGUAGES_OF: Final = _by_word()
_MAX_WORDS: Final = 60


def guess_language(text: str, words: Sequence[str]) -> str | None:
    """An ISO 639-1 code, or None where the text does not tell. `words` are those of `text`, in lower case."""
    if not text.isascii() and _NOT_LATIN.search(text):
        for code, script in _SCRIPTS:
            if script.search(text):
                return code
    hits: dict[str, int] = {}
    for word in words[:_MAX_WORDS]:
        for code in _LANGUAGES_OF.get(word, ()):
            hits[code] = hits.get(code, 0) + 1
    best = sorted(hits, key=lambda code: -hits[code])
    if not best or (len(best) > 1 and hits[best[0]] == hits[best[1]]):
        return None
    return best[0]
