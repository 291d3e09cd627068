"""Cheap features of a text for the learned profiler: hashed words and word pairs, and its length. Vectorised, bounded.

A text is cut to its head and tail, lowered and taken as bytes. Words are runs of letters and digits, every other sign
is a word of its own, and all digits are one digit: 17 and 42 are the same word, 170 is another. A word's hash is a
polynomial over its bytes, got for all words at once from prefix sums modulo 2^64; no Python code runs per word.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

FEATURE_VERSION: Final = 1
"""Raised whenever the same text would give other features: weights of another version do not fit."""

BITS: Final = 15
BUCKETS: Final = 1 << BITS

HEAD_CHARACTERS: Final = 2000
TAIL_CHARACTERS: Final = 1000
"""As for the rules: instructions stand before or after a document, seldom in its middle."""

HEAD_BYTES: Final = 2800
TAIL_BYTES: Final = 1400
"""Scripts of several bytes a character are cut once more."""

MAX_BYTES: Final = HEAD_BYTES + TAIL_BYTES + 1

MAX_FEATURES: Final = 2 * MAX_BYTES
"""Words and pairs, where every byte is a word."""

_FACTOR: Final = 0x9E3779B97F4A7C15
"""Odd, so that it has an inverse modulo 2^64: a word's hash does not depend on where it stands."""

_ONE: Final = np.uint64(1)
_HIGH: Final = np.uint64(32)
_SPREAD: Final = np.uint64(0xBF58476D1CE4E5B9)
_LEFT: Final = np.uint64(0x100000001B3)
_RIGHT: Final = np.uint64(0x9FB21C651E98DF25)
_MASK: Final = np.uint64(BUCKETS - 1)

Hashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Features:
    buckets: NDArray[np.int64]
    """Sorted, each once, below BUCKETS; at most MAX_FEATURES."""
    log_words: float
    """log(1 + words) of the whole text, guessed from those looked at."""


def extract_features(text: str) -> Features:
    sample = _sample(text)
    words = _words(np.frombuffer(sample, np.uint8))
    # blanks stand for words: signs are none, and what was not looked at is taken to be alike
    log_words = math.log1p(len(sample.split()) * max(1.0, len(text) / max(1, len(sample))))
    if not len(words):
        return Features(np.empty(0, np.int64), log_words)
    pairs = _mixed(words[:-1] * _LEFT + words[1:] * _RIGHT)
    buckets = (np.concatenate((words, pairs)) & _MASK).astype(np.int64)
    buckets.sort()  # four times as fast as numpy's own `unique`
    is_first = np.concatenate((_TRUE, buckets[1:] != buckets[:-1]))
    return Features(buckets[is_first], log_words)


def _sample(text: str) -> bytes:
    if len(text) > HEAD_CHARACTERS + TAIL_CHARACTERS:
        text = f"{text[:HEAD_CHARACTERS]}\n{text[-TAIL_CHARACTERS:]}"
    data = text.lower().encode("utf-8", "replace")
    if len(data) > MAX_BYTES:
        data = data[:HEAD_BYTES] + b"\n" + data[-TAIL_BYTES:]
    return data


def _words(data: NDArray[np.uint8]) -> Hashes:
    """The hash of every word, in order."""
    kinds = _KINDS[data]
    before = np.concatenate((_NO_KIND, kinds[:-1]))
    after = np.concatenate((kinds[1:], _NO_KIND))
    starts = np.flatnonzero((kinds != 0) & ((kinds != before) | (kinds == 2)))
    ends = np.flatnonzero((kinds != 0) & ((kinds != after) | (kinds == 2))) + 1
    sums = np.concatenate((_NO_SUM, np.cumsum(_VALUES[data] * _POWERS[: len(data)])))
    return _mixed((sums[ends] - sums[starts]) * _INVERSE_POWERS[starts])


def _mixed(hashes: Hashes) -> Hashes:
    """Every bit of a hash depends on every bit of what it was."""
    hashes = (hashes ^ (hashes >> _HIGH)) * _SPREAD
    return hashes ^ (hashes >> _HIGH)


def _kinds() -> NDArray[np.uint8]:
    """For every byte: 0 nothing, 1 part of a word, 2 a word of its own. Bytes of other scripts are parts of words."""
    kinds = np.full(256, 2, np.uint8)
    kinds[: ord(" ") + 1] = 0
    for byte in range(256):
        if byte >= 128 or chr(byte).isalnum():
            kinds[byte] = 1
    return kinds


def _values() -> Hashes:
    values = _mixed(np.arange(1, 257, dtype=np.uint64) * np.uint64(_FACTOR)) | _ONE
    values[ord("0") : ord("9") + 1] = values[ord("0")]
    return values


def _powers(factor: int) -> Hashes:
    return np.cumprod(np.concatenate(([_ONE], np.full(MAX_BYTES, factor, np.uint64))), dtype=np.uint64)


_KINDS: Final = _kinds()
_NO_KIND: Final = np.zeros(1, np.uint8)
_VALUES: Final = _values()
_TRUE: Final = np.ones(1, np.bool_)
_NO_SUM: Final = np.zeros(1, np.uint64)
_POWERS: Final = _powers(_FACTOR)
_INVERSE_POWERS: Final = _powers(pow(_FACTOR, -1, 1 << 64))
