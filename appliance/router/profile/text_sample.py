"""The part of a prompt that the rules look at, taken apart once: lowered text, words, edges."""

import re
from dataclasses import dataclass
from typing import Final

_HEAD_CHARACTERS: Final = 2000
_TAIL_CHARACTERS: Final = 1000
"""Instructions stand before or after a document, seldom in its middle, so the middle of a long text is not read."""

_EDGE_CHARACTERS: Final = 300

_SIGNS: Final = ".,;:!?()[]{}<>\"'`*_/\\|="
_TO_SPACE: Final = str.maketrans(dict.fromkeys(_SIGNS, " "))
_WORD: Final = re.compile(rf"[^\s{re.escape(_SIGNS)}]+")


@dataclass(frozen=True, slots=True)
class TextSample:
    text: str
    """Lower case."""
    edges: str
    """Its first and last few hundred characters: where an instruction is, if there is one."""
    words: tuple[str, ...]
    vocabulary: frozenset[str]
    edge_vocabulary: frozenset[str]


def take_sample(text: str) -> TextSample:
    if len(text) > _HEAD_CHARACTERS + _TAIL_CHARACTERS:
        text = f"{text[:_HEAD_CHARACTERS]}\n{text[-_TAIL_CHARACTERS:]}"
    lowered = text.lower()
    words = _words_of(lowered)
    vocabulary = frozenset(words)
    if len(lowered) <= 2 * _EDGE_CHARACTERS:
        return TextSample(lowered, lowered, words, vocabulary, vocabulary)
    edges = f"{lowered[:_EDGE_CHARACTERS]}\n{lowered[-_EDGE_CHARACTERS:]}"
    return TextSample(lowered, edges, words, vocabulary, frozenset(_words_of(edges)))


def _words_of(text: str) -> tuple[str, ...]:
    # translate is the faster one for ASCII, and seven times slower for anything else
    return tuple(text.translate(_TO_SPACE).split() if text.isascii() else _WORD.findall(text))
