"""What a trained classifier is made of: linear scores over features of a text, and what makes probabilities of them."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.special import expit, softmax

from appliance.encoders.embedders import Embedder, StaticEmbedder, normalise_rows
from appliance.encoders.features import FeatureBlocks, FeatureVocabulary, build_incidence, split_words

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
FeatureMatrices = Mapping[str, Any]
"""A matrix for each block of features, by name, with a row for each text; sparse or dense."""
Tier = Literal["words", "encoder"]

TIERS: Final[tuple[Tier, ...]] = ("words", "encoder")
"""From the cheapest to the most expensive."""
_TABLE_BYTES: Final = 64_000_000
"""What one head may remember of words. When it is full it begins anew."""
CLIP: Final = 1e-6
"""Shares nearer to 0 or 1 count as this far from it."""
_SMALLEST_SHARE: Final = 1e-30


@dataclass(frozen=True, slots=True)
class FeatureRecipe:
    """Which blocks of features a head is fitted on, each by how much, and how closely it follows the examples."""

    name: str
    tier: Tier
    shares: Mapping[str, float]
    closeness: float = 1.0
    for_few: bool = False
    """Worth trying only with few examples of each label: with more, words tell more than vectors alone."""


RECIPES: Final = (
    FeatureRecipe("words and pieces", "words", {"words": 1.0, "pieces": 1.0}),
    FeatureRecipe("words, pieces and static vectors", "words", {"words": 1.0, "pieces": 1.0, "static": 1.5}),
    FeatureRecipe("static vectors", "words", {"static": 3.0}, for_few=True),
    FeatureRecipe("encoder", "encoder", {"encoder": 3.0}, for_few=True),
    FeatureRecipe(
        "encoder, words and static vectors", "encoder", {"encoder": 2.0, "static": 1.0, "words": 1.0, "pieces": 1.0}
    ),
)


@dataclass(frozen=True, slots=True)
class LinearModel:
    """Scores of texts: features by label, and a bias."""

    weights: Mapping[str, Floats]
    """By block, (features, labels), the block's share already in it."""
    bias: Floats


def stack_blocks(blocks: FeatureMatrices, recipe: FeatureRecipe) -> Any:
    """All features of `recipe` side by side, in the order of its shares."""
    parts = [sparse.csr_matrix(blocks[name]) * np.float32(share) for name, share in recipe.shares.items()]
    return sparse.hstack(parts, format="csr")


def split_weights(weights: Floats, blocks: FeatureMatrices, recipe: FeatureRecipe) -> Mapping[str, Floats]:
    """The rows of `weights` by block, the shares multiplied in."""
    found, start = {}, 0
    for name, share in recipe.shares.items():
        width = blocks[name].shape[1]
        found[name] = (weights[start : start + width] * np.float32(share)).astype(np.float32)
        start += width
    return found


def compute_softmax(scores: Floats, temperature: float) -> Floats:
    shares: Floats = softmax(scores / np.float32(temperature), axis=1).astype(np.float32)
    return shares


@dataclass(frozen=True, slots=True)
class ProbabilityCalibration:
    """Scores become probabilities by a temperature; then the highest one is brought to how often it is right, by a
    beta curve (Kull, Silva Filho, Flach, "Beta calibration", 2017), and the others share what is left. The order of the
    labels never changes."""

    temperature: float
    sure: float = 1.0
    unsure: float = 1.0
    offset: float = 0.0

    def probabilities(self, scores: Floats) -> Floats:
        shares = compute_softmax(scores, self.temperature)
        rows = np.arange(len(shares))
        best = shares.argmax(axis=1)
        top = np.clip(shares[rows, best].astype(np.float64), CLIP, 1 - CLIP)
        calibrated_top = expit(self.sure * np.log(top) - self.unsure * np.log1p(-top) + self.offset)
        rest = shares.copy()
        rest[rows, best] = 0.0
        others = np.maximum(rest.sum(axis=1, dtype=np.float64), _SMALLEST_SHARE)
        second = rest.max(axis=1) / others
        calibrated_top = np.maximum(calibrated_top, second / (1 + second))
        rest *= ((1 - calibrated_top) / others)[:, None].astype(np.float32)
        rest[rows, best] = calibrated_top
        calibrated: Floats = rest
        return calibrated


def compute_ood_scores(scores: Floats) -> Floats:
    """Out-of-distribution scores: the highest label score with its sign turned. Scores of one label against the
    rest are all low for a text that is like none of them, which their softmax hides."""
    highest: Floats = -scores.max(axis=1)
    return highest


class LinearScorer:
    """Scores by a vocabulary's words; every word's share of the scores is computed once. Safe to use from threads."""

    def __init__(self, vocabulary: FeatureVocabulary, linear: LinearModel) -> None:
        self._vocabulary, self._linear = vocabulary, linear
        self._labels = len(linear.bias)
        self._lock = threading.Lock()
        weights, words = linear.weights, len(vocabulary.words)
        self._uses_words, self._uses_pieces = "words" in weights, "pieces" in weights
        self._uses_static = "static" in weights
        if self._uses_words:
            rarity, pair_rarity = vocabulary.weights["words"], vocabulary.weights["pairs"]
            self._word_scores = weights["words"][:words] * rarity[:, None]
            self._pair_scores = weights["words"][words:] * pair_rarity[:, None]
            self._word_squares, self._pair_squares = rarity**2, pair_rarity**2
        self._begin()

    def _begin(self) -> None:
        self._place: dict[str, int] = {}
        self._rows = _WordRows.empty(self._labels, self._dimensions)

    @property
    def _dimensions(self) -> int:
        return self._vocabulary.vectors.dimensions if self._vocabulary.vectors is not None and self._uses_static else 0

    def scores(self, texts: Sequence[str]) -> Floats:
        split = [split_words(text) for text in texts]
        with self._lock:
            unique = self._learn_words(split)
            rows = self._rows
            place = self._place
            places = [[place[word] for word in words] for words in unique]
            total = np.tile(self._linear.bias, (len(texts), 1))
            member = build_incidence(places, len(place))
            if self._uses_words:
                pairs = build_incidence(self._vocabulary.pair_rows(split), len(self._vocabulary.pairs))
                squares = member @ rows.word_squares + pairs @ self._pair_squares
                total += (member @ rows.word_scores + pairs @ self._pair_scores) / _roots(squares)
            if self._uses_pieces:
                total += (member @ rows.piece_scores) / _roots(member @ rows.piece_squares)
            if self._uses_static:
                total += normalise_rows(member @ rows.sums) @ self._linear.weights["static"]
            return total

    def _learn_words(self, split: Sequence[Sequence[str]]) -> list[set[str]]:
        unique = [set(words) for words in split]
        new = [word for word in set().union(*unique) if word not in self._place]
        if new and self._rows.bytes_with(len(self._place) + len(new)) > _TABLE_BYTES and self._place:
            self._begin()
            new = list(set().union(*unique))
        if new:
            self._rows = self._rows.extended(self._rows_of(new))
            self._place.update({word: len(self._place) + at for at, word in enumerate(new)})
        return unique

    def _rows_of(self, words: Sequence[str]) -> "_WordRows":
        vocabulary, count = self._vocabulary, len(words)
        rows = _WordRows.zeros(count, self._labels, self._dimensions)
        if self._uses_words:
            for at, word in enumerate(words):
                place = vocabulary.word_place.get(word)
                if place is not None:
                    rows.word_scores[at] = self._word_scores[place]
                    rows.word_squares[at] = self._word_squares[place]
        if self._uses_pieces:
            pieces = vocabulary.piece_rows(words)
            rows.piece_scores[:] = pieces @ self._linear.weights["pieces"]
            rows.piece_squares[:] = np.asarray(pieces.multiply(pieces).sum(axis=1)).ravel()
        if vocabulary.vectors is not None and self._uses_static:
            rows.sums[:] = vocabulary.vectors.sums(words)
        return rows


@dataclass(frozen=True, slots=True)
class _WordRows:
    """What each remembered word brings with it."""

    word_scores: Floats
    word_squares: Floats
    piece_scores: Floats
    piece_squares: Floats
    sums: Floats

    @classmethod
    def zeros(cls, words: int, labels: int, dimensions: int) -> "_WordRows":
        shapes = ((words, labels), (words,), (words, labels), (words,), (words, dimensions))
        return cls(*(np.zeros(shape, dtype=np.float32) for shape in shapes))

    @classmethod
    def empty(cls, labels: int, dimensions: int) -> "_WordRows":
        return cls.zeros(0, labels, dimensions)

    def bytes_with(self, words: int) -> int:
        width: int = 2 * self.word_scores.shape[1] + 2 + self.sums.shape[1]
        return 4 * width * words

    def extended(self, more: "_WordRows") -> "_WordRows":
        return _WordRows(
            np.concatenate([self.word_scores, more.word_scores]),
            np.concatenate([self.word_squares, more.word_squares]),
            np.concatenate([self.piece_scores, more.piece_scores]),
            np.concatenate([self.piece_squares, more.piece_squares]),
            np.concatenate([self.sums, more.sums]),
        )


def name_blocks(blocks: FeatureBlocks, encoded: Floats | None) -> FeatureMatrices:
    """The blocks there are, by name."""
    found = {
        "words": blocks.words,
        "pieces": blocks.pieces,
        "static": blocks.static,
        "encoder": encoded,
    }
    return {name: block for name, block in found.items() if block is not None}


def is_possible(recipe: FeatureRecipe, vectors: StaticEmbedder | None, encoder: Embedder | None) -> bool:
    """Whether the models that are here suffice for it."""
    return (vectors is not None or "static" not in recipe.shares) and (
        encoder is not None or "encoder" not in recipe.shares
    )


def _roots(squares: npt.ArrayLike) -> Floats:
    roots: Floats = np.sqrt(np.maximum(np.asarray(squares, dtype=np.float32), 1e-12))[:, None]
    return roots
