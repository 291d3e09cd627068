"""Training a classifier: candidates are tried on held-out folds, the cheapest that is good enough is fitted on all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedKFold

from appliance.encoders.bounds import CONFIDENCE, SHOWN_BOUNDS, threshold_for
from appliance.encoders.embedders import Embedder, StaticEmbedder
from appliance.encoders.examples import Examples
from appliance.encoders.heads import (
    RECIPES,
    TIERS,
    Calibration,
    Linear,
    Recipe,
    Tier,
    fit_calibration,
    fit_linear,
    named_blocks,
    possible,
    softmax_of,
    split_weights,
    stacked,
    strangeness,
)
from appliance.encoders.measures import report
from appliance.encoders.words import MOST_PER_BLOCK, Lexicon

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

FOLDS: Final = 5
FEW_FOLDS_ROWS: Final = 20_000
"""From so many examples on three folds tell enough."""
WORTH_A_TIER: Final = 0.02
"""Where no accuracy was asked for, a dearer tier must win so much."""
STRANGE_SHARE: Final = 0.02
"""Of the held-out texts, which are all in scope, so many are called out of scope."""
_WEIGHT_NUMBERS: Final = 24_000_000
"""A head's weights hold at most about so many: many labels leave room for fewer features."""

Progress = Callable[[str, float], None]
"""What is being done, and what share of the whole is done."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One recipe on held-out rows: scores of rows that it was not fitted on."""

    recipe: Recipe
    scores: Floats
    accuracy: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Trained:
    """A fitted head in numbers, before it is written down."""

    labels: tuple[str, ...]
    recipe: Recipe
    lexicon: Lexicon
    linear: Linear
    calibration: Calibration
    strange_from: float
    report: Mapping[str, Any]
    held_confidences: Floats
    """Of each example by a head that had not seen it; in the examples' order."""
    held_right: npt.NDArray[np.bool_]
    held_strangeness: Floats


@dataclass(frozen=True, slots=True)
class Models:
    """What there is to make features of. None: not on this machine."""

    vectors: StaticEmbedder | None
    encoder: Embedder | None


def train(
    examples: Examples,
    models: Models,
    *,
    wanted_accuracy: float | None,
    dearest: Tier,
    progress: Progress,
    clock: Callable[[], float],
) -> Trained:
    """Fit the cheapest recipe that reaches `wanted_accuracy` on held-out rows, up to the tier `dearest`.

    Without a wanted accuracy, the cheapest tier unless a dearer one is better by WORTH_A_TIER.
    """
    bench = _Bench(examples, models)
    tried: list[Tried] = []
    tiers = [tier for tier in TIERS if TIERS.index(tier) <= TIERS.index(dearest)]
    recipes = [one for one in RECIPES if one.tier in tiers and possible(one, models.vectors, models.encoder)]
    chosen: Tried | None = None
    for tier in tiers:
        for recipe in (one for one in recipes if one.tier == tier):
            progress(f"trying {recipe.name} on held-out folds", 0.1 + 0.7 * len(tried) / len(recipes))
            began = clock()
            tried.append(bench.try_out(recipe, clock() - began, clock))
        chosen = _better(chosen, [one for one in tried if one.recipe.tier == tier], wanted_accuracy)
        if chosen is not None and wanted_accuracy is not None and chosen.accuracy >= wanted_accuracy:
            break
    assert chosen is not None, "the first recipe needs nothing but words"
    progress(f"fitting {chosen.recipe.name} on all {len(examples.texts)} examples", 0.85)
    lexicon, linear = bench.fit_all(chosen.recipe)
    return _finished(examples, chosen, tried, lexicon, linear, wanted_accuracy)


def _better(chosen: Tried | None, found: Sequence[Tried], wanted: float | None) -> Tried | None:
    """The best of a tier, where it is worth its price over what was chosen from the tiers before it."""
    best = max(found, key=lambda one: one.accuracy, default=None)
    if best is None or chosen is None:
        return best or chosen
    needed = WORTH_A_TIER if wanted is None else 0.0
    return best if best.accuracy > chosen.accuracy + needed else chosen


class _Bench:
    """Folds and features, computed once for all recipes."""

    def __init__(self, examples: Examples, models: Models) -> None:
        self._examples, self._models = examples, models
        self._most = min(MOST_PER_BLOCK, max(1_000, _WEIGHT_NUMBERS // (4 * len(examples.labels))))
        rows = len(examples.texts)
        smallest = int(np.bincount(examples.truth).min())
        count = max(2, min(3 if rows >= FEW_FOLDS_ROWS else FOLDS, smallest))
        splitter = StratifiedKFold(count, shuffle=True, random_state=0)
        self._folds = list(splitter.split(np.zeros(rows), examples.truth))
        self._encoded: Floats | None = None
        self._fold_blocks: list[Mapping[str, Any]] = []

    def try_out(self, recipe: Recipe, seconds: float, clock: Callable[[], float]) -> Tried:
        began = clock()
        truth = self._examples.truth
        scores = np.zeros((truth.size, len(self._examples.labels)), dtype=np.float32)
        for number, (seen, held) in enumerate(self._folds):
            features = stacked(self._blocks(number, recipe), recipe)
            weights, bias = fit_linear(features[seen], truth[seen], scores.shape[1], recipe.closeness)
            scores[held] = features[held] @ weights + bias
        accuracy = float((scores.argmax(axis=1) == truth).mean())
        return Tried(recipe, scores, accuracy, seconds + clock() - began)

    def fit_all(self, recipe: Recipe) -> tuple[Lexicon, Linear]:
        texts, truth = self._examples.texts, self._examples.truth
        lexicon = Lexicon.learn(texts, self._models.vectors, self._most)
        blocks = named_blocks(lexicon.blocks(texts), self._encode(recipe))
        weights, bias = fit_linear(stacked(blocks, recipe), truth, len(self._examples.labels), recipe.closeness)
        return lexicon, Linear(split_weights(weights, blocks, recipe), bias)

    def _blocks(self, number: int, recipe: Recipe) -> Mapping[str, Any]:
        """The features of all rows, as a lexicon learned from the fold's other rows alone gives them."""
        if number == len(self._fold_blocks):
            texts = self._examples.texts
            lexicon = Lexicon.learn(
                [texts[place] for place in self._folds[number][0]], self._models.vectors, self._most
            )
            self._fold_blocks.append(named_blocks(lexicon.blocks(texts), None))
        encoded = self._encode(recipe)
        return self._fold_blocks[number] if encoded is None else {**self._fold_blocks[number], "encoder": encoded}

    def _encode(self, recipe: Recipe) -> Floats | None:
        if recipe.tier != "encoder" or self._models.encoder is None:
            return None
        if self._encoded is None:
            self._encoded = self._models.encoder.embed(self._examples.texts, truncate=True).vectors
        return self._encoded


def _finished(
    examples: Examples,
    chosen: Tried,
    tried: Sequence[Tried],
    lexicon: Lexicon,
    linear: Linear,
    wanted: float | None,
) -> Trained:
    truth = examples.truth
    shares = _cross_calibrated(chosen.scores, truth)
    strange = strangeness(chosen.scores)
    confidences = shares.max(axis=1)
    right = shares.argmax(axis=1) == truth
    figures = dict(report(shares, truth, examples.labels))
    figures["before_calibration_ece"] = report(softmax_of(chosen.scores, 1.0), truth, examples.labels)["ece"]
    figures["bounds"] = bounds_table(confidences, right)
    figures["tried"] = [
        {"recipe": one.recipe.name, "tier": one.recipe.tier, "accuracy": one.accuracy, "seconds": round(one.seconds, 2)}
        for one in tried
    ]
    figures |= {"recipe": chosen.recipe.name, "tier": chosen.recipe.tier, "examples": len(examples.texts)}
    figures |= {"wanted_accuracy": wanted, "reached": wanted is None or figures["accuracy"] >= wanted}
    figures["notes"] = list(examples.notes) + _advice(figures, wanted)
    return Trained(
        labels=examples.labels,
        recipe=chosen.recipe,
        lexicon=lexicon,
        linear=linear,
        calibration=fit_calibration(chosen.scores, truth),
        strange_from=float(np.quantile(strange, 1 - STRANGE_SHARE)),
        report=figures,
        held_confidences=confidences,
        held_right=right,
        held_strangeness=strange,
    )


def _cross_calibrated(scores: Floats, truth: Ints) -> Floats:
    """Probabilities of each half of the rows calibrated on the other half: what is reported was never
    fitted on."""
    shares = np.zeros_like(scores)
    half = np.arange(truth.size) % 2
    for side in (0, 1):
        own, other = half == side, half != side
        shares[own] = fit_calibration(scores[other], truth[other]).probabilities(scores[own])
    return shares


def bounds_table(confidences: npt.ArrayLike, right: npt.ArrayLike) -> Sequence[Mapping[str, Any]]:
    """For each bound that is shown: from which confidence on answers may stand, and what share of texts that is."""
    scores = list(zip(np.asarray(confidences).tolist(), np.asarray(right).tolist(), strict=True))
    rows = []
    for bound in SHOWN_BOUNDS:
        found = threshold_for(bound, CONFIDENCE, scores)
        rows.append(
            {
                "bound": bound,
                "confidence": CONFIDENCE,
                "threshold": found.threshold,
                "local_share": found.local_share,
                "disagreement": found.disagreement,
                "upper_limit": found.upper_limit,
            }
        )
    return rows


def _advice(figures: Mapping[str, Any], wanted: float | None) -> list[str]:
    if wanted is None or figures["accuracy"] >= wanted:
        return []
    best = max(row["accuracy"] for row in figures["tried"])
    return [
        f"accuracy {wanted:.3f} was asked for, and the best of what is on this machine reached {best:.3f}: give more "
        "examples, pull an encoder (appliance models pull all-minilm-l6-v2), or let unsure texts go to a model"
    ]
