"""Training a classifier: candidates are tried on held-out folds, the cheapest that is good enough is fitted on all.

Where words alone are not good enough and the encoder is, both are used: the encoder for as few texts as will do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedKFold

from appliance.encoders.embedders import Embedder, StaticEmbedder
from appliance.encoders.features import MOST_PER_BLOCK, FeatureVocabulary
from appliance.encoders.linear_models import (
    RECIPES,
    TIERS,
    FeatureRecipe,
    LinearModel,
    Tier,
    compute_ood_scores,
    compute_softmax,
    is_possible,
    name_blocks,
    split_weights,
    stack_blocks,
)
from appliance.encoders.training.examples import Examples
from appliance.encoders.training.fitting import fit_calibrations, fit_linear
from appliance.encoders.training.metrics import build_report
from appliance.encoders.training.selective_risk import tabulate_bounds
from appliance.encoders.two_stage import (
    EscalationThreshold,
    FittedStage,
    TrainedClassifier,
    calibrate_probabilities,
    choose_escalation,
    compute_margins,
    tabulate_accuracy_by_share,
)

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

FOLDS: Final = 5
FEW_FOLDS_ROWS: Final = 20_000
"""From so many examples on three folds tell enough."""
WORTH_A_TIER: Final = 0.02
"""Where no accuracy was asked for, a dearer tier must win so much."""
FEW_PER_LABEL: Final = 20
LEFT_OUT: Final = 0.005
"""Where no accuracy was asked for, so much less than asking the encoder about every text would give is good enough."""
STRANGE_SHARE: Final = 0.02
"""Of the held-out texts, which are all in scope, so many are called out of scope."""
_WEIGHT_NUMBERS: Final = 24_000_000
"""A head's weights hold at most about so many: many labels leave room for fewer features."""

Progress = Callable[[str, float], None]
"""What is being done, and what share of the whole is done."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One recipe on held-out rows: scores of rows that it was not fitted on."""

    recipe: FeatureRecipe
    scores: Floats
    accuracy: float
    seconds: float


@dataclass(frozen=True, slots=True)
class CandidateModels:
    """What there is to make features of. None: not on this machine."""

    vectors: StaticEmbedder | None
    encoder: Embedder | None


class Trainer:
    """Folds, features and fits of one set of examples, each computed once."""

    def __init__(self, examples: Examples, models: CandidateModels) -> None:
        self._examples, self._models = examples, models
        self._most = min(MOST_PER_BLOCK, max(1_000, _WEIGHT_NUMBERS // (4 * len(examples.labels))))
        rows = len(examples.texts)
        smallest = int(np.bincount(examples.truth).min())
        count = max(2, min(3 if rows >= FEW_FOLDS_ROWS else FOLDS, smallest))
        splitter = StratifiedKFold(count, shuffle=True, random_state=0)
        self._folds = list(splitter.split(np.zeros(rows), examples.truth))
        self._encoded: Floats | None = None
        self._fold_blocks: list[Mapping[str, Any]] = []
        self._tried: dict[str, Trial] = {}
        self._lexicon: FeatureVocabulary | None = None
        self._linears: dict[str, LinearModel] = {}

    def run_trial(self, recipe: FeatureRecipe, clock: Callable[[], float]) -> Trial:
        if recipe.name not in self._tried:
            self._tried[recipe.name] = self._try_out(recipe, clock)
        return self._tried[recipe.name]

    def _try_out(self, recipe: FeatureRecipe, clock: Callable[[], float]) -> Trial:
        began = clock()
        truth = self._examples.truth
        scores = np.zeros((truth.size, len(self._examples.labels)), dtype=np.float32)
        for number, (seen, held) in enumerate(self._folds):
            features = stack_blocks(self._blocks(number, recipe), recipe)
            weights, bias = fit_linear(features[seen], truth[seen], scores.shape[1], recipe.closeness)
            scores[held] = features[held] @ weights + bias
        accuracy = float((scores.argmax(axis=1) == truth).mean())
        return Trial(recipe, scores, accuracy, clock() - began)

    def fit_all(self, recipes: Sequence[FeatureRecipe]) -> tuple[FeatureVocabulary, Sequence[LinearModel]]:
        """On all examples. The recipes share one lexicon."""
        texts, truth = self._examples.texts, self._examples.truth
        lexicon = self._lexicon = self._lexicon or FeatureVocabulary.learn(texts, self._models.vectors, self._most)
        new = [recipe for recipe in recipes if recipe.name not in self._linears]
        found = lexicon.blocks(texts) if new else None
        for recipe in new:
            assert found is not None
            blocks = name_blocks(found, self._encode(recipe))
            weights, bias = fit_linear(
                stack_blocks(blocks, recipe), truth, len(self._examples.labels), recipe.closeness
            )
            self._linears[recipe.name] = LinearModel(split_weights(weights, blocks, recipe), bias)
        return lexicon, [self._linears[recipe.name] for recipe in recipes]

    def _blocks(self, number: int, recipe: FeatureRecipe) -> Mapping[str, Any]:
        """The features of all rows, as a lexicon learned from the fold's other rows alone gives them."""
        if number == len(self._fold_blocks):
            texts = self._examples.texts
            lexicon = FeatureVocabulary.learn(
                [texts[place] for place in self._folds[number][0]], self._models.vectors, self._most
            )
            self._fold_blocks.append(name_blocks(lexicon.blocks(texts), None))
        encoded = self._encode(recipe)
        return self._fold_blocks[number] if encoded is None else {**self._fold_blocks[number], "encoder": encoded}

    def _encode(self, recipe: FeatureRecipe) -> Floats | None:
        if recipe.tier != "encoder" or self._models.encoder is None:
            return None
        if self._encoded is None:
            self._encoded = self._models.encoder.embed(self._examples.texts, truncate=True).vectors
        return self._encoded


def train_classifier(
    examples: Examples,
    models: CandidateModels,
    *,
    wanted_accuracy: float | None,
    dearest: Tier,
    progress: Progress,
    clock: Callable[[], float],
    bench: Trainer | None = None,
) -> TrainedClassifier:
    """Fit the cheapest recipe that reaches `wanted_accuracy` on held-out rows, up to the tier `dearest`.

    Without a wanted accuracy, the cheapest tier unless a dearer one is better by WORTH_A_TIER. `bench`: of an earlier
    training on the same examples and models.
    """
    bench = bench or Trainer(examples, models)
    tiers = [tier for tier in TIERS if TIERS.index(tier) <= TIERS.index(dearest)]
    recipes = _worth_trying(tiers, examples, models)
    tried: list[Trial] = []
    best: list[Trial] = []
    """Of each tier."""
    for tier in tiers:
        for recipe in (one for one in recipes if one.tier == tier):
            progress(f"trying {recipe.name} on held-out folds", 0.1 + 0.7 * len(tried) / len(recipes))
            tried.append(bench.run_trial(recipe, clock))
        best += sorted((one for one in tried if one.recipe.tier == tier), key=lambda one: -one.accuracy)[:1]
        if wanted_accuracy is not None and best[-1].accuracy >= wanted_accuracy:
            break
    chosen = _choose(best, examples.truth, wanted_accuracy)
    progress(f"fitting {chosen.name} on all {len(examples.texts)} examples", 0.85)
    lexicon, linears = bench.fit_all([one.recipe for one in chosen.steps])
    return _finished(examples, chosen, tried, lexicon, linears, wanted_accuracy)


def _worth_trying(tiers: Sequence[Tier], examples: Examples, models: CandidateModels) -> Sequence[FeatureRecipe]:
    found = [one for one in RECIPES if one.tier in tiers and is_possible(one, models.vectors, models.encoder)]
    if len(examples.texts) < FEW_PER_LABEL * len(examples.labels):
        return found
    fuller = {one.tier for one in found if not one.for_few}
    return [one for one in found if not one.for_few or one.tier not in fuller]


@dataclass(frozen=True, slots=True)
class _Chosen:
    """One step, or two and which texts go to the second."""

    first: Trial
    second: Trial | None = None
    asking: EscalationThreshold | None = None

    @property
    def steps(self) -> Sequence[Trial]:
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def name(self) -> str:
        return "; where unsure ".join(one.recipe.name for one in self.steps)


def _choose(best: Sequence[Trial], truth: Ints, wanted: float | None) -> _Chosen:
    """`best` has the best of each tier that was tried, the cheapest first."""
    first, dearest = best[0], best[-1]
    if len(best) == 1 or (wanted is None and dearest.accuracy <= first.accuracy + WORTH_A_TIER):
        return _Chosen(first)
    asking = choose_escalation(first.scores, dearest.scores, truth, wanted or dearest.accuracy - LEFT_OUT)
    if asking.share <= 0.0:
        return _Chosen(first)
    if asking.share >= 1.0:
        return _Chosen(dearest)
    return _Chosen(first, dearest, asking)


def _finished(
    examples: Examples,
    chosen: _Chosen,
    tried: Sequence[Trial],
    lexicon: FeatureVocabulary,
    linears: Sequence[LinearModel],
    wanted: float | None,
) -> TrainedClassifier:
    truth, first = examples.truth, chosen.first.scores
    second = None if chosen.second is None else chosen.second.scores
    ask_below = 0.0 if chosen.asking is None else chosen.asking.below
    asked = compute_margins(first) < ask_below
    shares = _cross_calibrated(first, second, asked, truth)
    strange = compute_ood_scores(first)
    confidences = shares.max(axis=1)
    right = shares.argmax(axis=1) == truth
    figures = dict(build_report(shares, truth, examples.labels))
    plain = compute_softmax(first, 1.0)
    if second is not None:
        plain[asked] = compute_softmax(second[asked], 1.0)
        figures["accuracy_by_share"] = tabulate_accuracy_by_share(first, second, truth)
    figures["before_calibration_ece"] = build_report(plain, truth, examples.labels)["ece"]
    figures["bounds"] = tabulate_bounds(confidences, right)
    figures["tried"] = [
        {"recipe": one.recipe.name, "tier": one.recipe.tier, "accuracy": one.accuracy, "seconds": round(one.seconds, 2)}
        for one in tried
    ]
    figures |= {"recipe": chosen.name, "tier": chosen.steps[-1].recipe.tier, "examples": len(examples.texts)}
    figures["asked_share"] = _asked_share(chosen)
    figures |= {"wanted_accuracy": wanted, "reached": wanted is None or figures["accuracy"] >= wanted}
    figures["notes"] = list(examples.notes) + _advice(figures, wanted)
    found = fit_calibrations(first, second, asked, truth)
    steps = [
        FittedStage(one.recipe, linear, own) for one, linear, own in zip(chosen.steps, linears, found, strict=True)
    ]
    return TrainedClassifier(
        labels=examples.labels,
        vocabulary=lexicon,
        first=steps[0],
        second=steps[1] if len(steps) > 1 else None,
        escalate_below=ask_below,
        ood_threshold=float(np.quantile(strange, 1 - STRANGE_SHARE)),
        report=figures,
        held_confidences=confidences,
        held_right=right,
        held_ood_scores=strange,
    )


def _asked_share(chosen: _Chosen) -> float:
    """Of all texts, that the encoder embeds."""
    if chosen.asking is not None:
        return chosen.asking.share
    return float(chosen.first.recipe.tier == "encoder")


def _cross_calibrated(first: Floats, second: Floats | None, asked: npt.NDArray[np.bool_], truth: Ints) -> Floats:
    """Probabilities of each half of the rows calibrated on the other half: what is reported was never
    fitted on."""
    shares = np.zeros_like(first)
    half = np.arange(truth.size) % 2
    for side in (0, 1):
        own, other = half == side, half != side
        of_second = (None, None) if second is None else (second[other], second[own])
        found = fit_calibrations(first[other], of_second[0], asked[other], truth[other])
        shares[own] = calibrate_probabilities(found, first[own], of_second[1], asked[own])
    return shares


def _advice(figures: Mapping[str, Any], wanted: float | None) -> list[str]:
    if wanted is None or figures["accuracy"] >= wanted:
        return []
    best = max(row["accuracy"] for row in figures["tried"])
    return [
        f"accuracy {wanted:.3f} was asked for, and the best of what is on this machine reached {best:.3f}: give more "
        "examples, pull an encoder (appliance models pull all-minilm-l6-v2), or let unsure texts go to a model"
    ]
