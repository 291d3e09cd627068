"""Features of a text that are sums over its words, so that each word is looked at once and then remembered.

Three blocks, each brought to length 1: words and pairs of neighbours (TF-IDF), pieces of 2 to 5 characters within words
(TF-IDF), and the sum of static word vectors. A head over them is linear, so at serving time every word brings its share
of all labels' scores with it: no text is taken apart into characters twice.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import sparse

from appliance.encoders.embedders import StaticEmbedder, normalise_rows

Floats = npt.NDArray[np.float32]
Rows = list[list[int]]

WORD: Final = re.compile(r"\w+|[^\w\s]")
MAX_WORDS_PER_TEXT: Final = 512
MAX_WORD_CHARS: Final = 32
"""Scripts without spaces give long words; they are cut into pieces of this length."""
MOST_PER_BLOCK: Final = 40_000
_MIN_PIECE_TEXTS: Final = 2
_PIECE_CHARS: Final = (2, 3, 4, 5)
_SMALLEST: Final = 1e-12


def split_words(text: str) -> list[str]:
    """The text's words and marks in lower case, in order."""
    found = WORD.findall(text.lower())[:MAX_WORDS_PER_TEXT]
    if any(len(word) > MAX_WORD_CHARS for word in found):
        found = [word[at : at + MAX_WORD_CHARS] for word in found for at in range(0, len(word), MAX_WORD_CHARS)]
    return found[:MAX_WORDS_PER_TEXT]


def split_pieces(word: str) -> list[str]:
    padded = f" {word} "
    return [padded[at : at + size] for size in _PIECE_CHARS for at in range(len(padded) - size + 1)]


@dataclass(frozen=True, slots=True)
class FeatureBlocks:
    """A row for each text and block. `static` is None without static vectors."""

    words: Any
    pieces: Any
    static: Floats | None


class FeatureVocabulary:
    """What was learned of words from the texts of a training set: which count, and how much."""

    def __init__(
        self,
        words: Sequence[str],
        pairs: Sequence[str],
        pieces: Sequence[str],
        weights: dict[str, Floats],
        vectors: StaticEmbedder | None,
    ) -> None:
        self.words, self.pairs, self.pieces = words, pairs, pieces
        self.weights, self.vectors = weights, vectors
        self.word_place = {word: place for place, word in enumerate(words)}
        self.pair_place = {pair: place for place, pair in enumerate(pairs)}
        self.piece_place = {piece: place for place, piece in enumerate(pieces)}

    @classmethod
    def learn(
        cls, texts: Sequence[str], vectors: StaticEmbedder | None, most: int = MOST_PER_BLOCK
    ) -> "FeatureVocabulary":
        split = [split_words(text) for text in texts]
        word_texts: Counter[str] = Counter()
        pair_texts: Counter[str] = Counter()
        for words in split:
            word_texts.update(set(words))
            pair_texts.update(set(list_pairs(words)))
        piece_texts: Counter[str] = Counter()
        by_word = {word: set(split_pieces(word)) for word in word_texts}
        for words in split:
            piece_texts.update(set().union(*(by_word[word] for word in set(words))))
        words, pairs = _most(word_texts, most, 1), _most(pair_texts, most, 1)
        pieces = _most(piece_texts, most, _MIN_PIECE_TEXTS)
        weights = {
            "words": _rarity([word_texts[one] for one in words], len(texts)),
            "pairs": _rarity([pair_texts[one] for one in pairs], len(texts)),
            "pieces": _rarity([piece_texts[one] for one in pieces], len(texts)),
        }
        return cls(words, pairs, pieces, weights, vectors)

    def blocks(self, texts: Sequence[str]) -> FeatureBlocks:
        """The features of `texts` as they are trained on."""
        split = [split_words(text) for text in texts]
        table: dict[str, int] = {}
        rows = [sorted({table.setdefault(word, len(table)) for word in words}) for words in split]
        known = list(table)
        membership = build_incidence(rows, len(known))
        pieces = self.piece_rows(known)
        piece_squares = np.asarray(pieces.multiply(pieces).sum(axis=1), dtype=np.float32).ravel()
        by_piece = scale_rows(membership @ pieces, membership @ piece_squares)
        by_word = self._word_block(split)
        if self.vectors is None:
            return FeatureBlocks(by_word, by_piece, None)
        return FeatureBlocks(by_word, by_piece, normalise_rows(membership @ self.vectors.sums(known)))

    def piece_rows(self, words: Sequence[str]) -> Any:
        """Weighted piece counts of single words, as a sparse matrix."""
        rows = [[self.piece_place[one] for one in split_pieces(word) if one in self.piece_place] for word in words]
        counted = build_incidence(rows, len(self.pieces))
        counted.sum_duplicates()
        return counted.multiply(self.weights["pieces"]).tocsr()

    def pair_rows(self, split: Iterable[Sequence[str]]) -> Rows:
        place = self.pair_place
        return [sorted({place[pair] for pair in list_pairs(words) if pair in place}) for words in split]

    def _word_block(self, split: Sequence[Sequence[str]]) -> Any:
        place = self.word_place
        words = build_incidence(
            [sorted({place[word] for word in row if word in place}) for row in split], len(self.words)
        )
        pairs = build_incidence(self.pair_rows(split), len(self.pairs))
        both = sparse.hstack(
            [words.multiply(self.weights["words"]), pairs.multiply(self.weights["pairs"])], format="csr"
        )
        return scale_rows(both, np.asarray(both.multiply(both).sum(axis=1)).ravel())


def list_pairs(words: Sequence[str]) -> list[str]:
    return [f"{one} {other}" for one, other in pairwise(words)]


def build_incidence(rows: Rows, width: int) -> Any:
    """Row i has a 1 for every place in `rows[i]`."""
    counts = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    ends = np.concatenate([[0], np.cumsum(counts)])
    places = np.fromiter((place for row in rows for place in row), dtype=np.int64, count=int(ends[-1]))
    return sparse.csr_matrix((np.ones(len(places), dtype=np.float32), places, ends), shape=(len(rows), width))


def scale_rows(rows: Any, squares: npt.ArrayLike) -> Any:
    """Sparse `rows` over the root of `squares`, one for each row."""
    norms = np.sqrt(np.maximum(np.asarray(squares, dtype=np.float32), _SMALLEST))
    return sparse.diags((1.0 / norms).astype(np.float32)) @ rows


def _most(counts: Counter[str], most: int, at_least: int) -> list[str]:
    """The most frequent ones, in a fixed order."""
    kept = [(count, one) for one, count in counts.items() if count >= at_least]
    kept.sort(key=lambda row: (-row[0], row[1]))
    return sorted(one for _, one in kept[:most])


def _rarity(counts: Sequence[int], texts: int) -> Floats:
    """Smoothed inverse document frequency."""
    return (np.log((1 + texts) / (1 + np.array(counts, dtype=np.float32))) + 1).astype(np.float32)
