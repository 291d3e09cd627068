"""Training a classifier: candidates are tried on held-out folds, the cheapest that is good enough is fitted on all.

Where words alone are not good enough and the encoder is, both are used: the encoder for as few texts as will do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedKFold

from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.encoders.embedders import Embedder, StaticEmbedder
from appliance.encoders.features import MOST_PER_BLOCK, FeatureVocabulary
from appliance.encoders.linear_models import (
    RECIPES,
    TIERS,
    FeatureMatrices,
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
"""Where no accuracy was asked for, a more expensive tier must win so much."""
FEW_PER_LABEL: Final = 20
LEFT_OUT: Final = 0.005
"""Where no accuracy was asked for, so much less than asking the encoder about every text would give is good enough."""
OOD_SHARE: Final = 0.02
"""Of the held-out texts, which are all in scope, so many count as out of scope."""
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
        self._fold_blocks: list[FeatureMatrices] = []
        self._tried: dict[str, Trial] = {}
        self._vocabulary: FeatureVocabulary | None = None
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
        """On all examples. The recipes share one vocabulary."""
        texts, truth = self._examples.texts, self._examples.truth
        vocabulary = self._vocabulary = self._vocabulary or FeatureVocabulary.learn(
            texts, self._models.vectors, self._most
        )
        new = [recipe for recipe in recipes if recipe.name not in self._linears]
        found = vocabulary.blocks(texts) if new else None
        for recipe in new:
            assert found is not None
            blocks = name_blocks(found, self._encode(recipe))
            weights, bias = fit_linear(
                stack_blocks(blocks, recipe), truth, len(self._examples.labels), recipe.closeness
            )
            self._linears[recipe.name] = LinearModel(split_weights(weights, blocks, recipe), bias)
        return vocabulary, [self._linears[recipe.name] for recipe in recipes]

    def _blocks(self, number: int, recipe: FeatureRecipe) -> FeatureMatrices:
        """The features of all rows, as a vocabulary learned from the fold's other rows alone gives them."""
        if number == len(self._fold_blocks):
            texts = self._examples.texts
            vocabulary = FeatureVocabulary.learn(
                [texts[place] for place in self._folds[number][0]], self._models.vectors, self._most
            )
            self._fold_blocks.append(name_blocks(vocabulary.blocks(texts), None))
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
    max_tier: Tier,
    progress: Progress,
    clock: Callable[[], float],
    trainer: Trainer | None = None,
) -> TrainedClassifier:
    """Fit the cheapest recipe that reaches `wanted_accuracy` on held-out rows, up to `max_tier`.

    Without a wanted accuracy, the cheapest tier unless a more expensive one is better by WORTH_A_TIER. `trainer`: of an
    earlier training on the same examples and models.
    """
    trainer = trainer or Trainer(examples, models)
    tiers = [tier for tier in TIERS if TIERS.index(tier) <= TIERS.index(max_tier)]
    recipes = _worth_trying(tiers, examples, models)
    trials: list[Trial] = []
    best: list[Trial] = []
    """Of each tier."""
    for tier in tiers:
        for recipe in (one for one in recipes if one.tier == tier):
            progress(f"trying {recipe.name} on held-out folds", 0.1 + 0.7 * len(trials) / len(recipes))
            trials.append(trainer.run_trial(recipe, clock))
        best += sorted((one for one in trials if one.recipe.tier == tier), key=lambda one: -one.accuracy)[:1]
        if wanted_accuracy is not None and best[-1].accuracy >= wanted_accuracy:
            break
    chosen = _choose(best, examples.truth, wanted_accuracy)
    progress(f"fitting {chosen.name} on all {len(examples.texts)} examples", 0.85)
    vocabulary, linears = trainer.fit_all([one.recipe for one in chosen.stages])
    return _build_classifier(examples, chosen, trials, vocabulary, linears, wanted_accuracy)


def _worth_trying(tiers: Sequence[Tier], examples: Examples, models: CandidateModels) -> Sequence[FeatureRecipe]:
    found = [one for one in RECIPES if one.tier in tiers and is_possible(one, models.vectors, models.encoder)]
    if len(examples.texts) < FEW_PER_LABEL * len(examples.labels):
        return found
    fuller = {one.tier for one in found if not one.for_few}
    return [one for one in found if not one.for_few or one.tier not in fuller]


@dataclass(frozen=True, slots=True)
class _Chosen:
    """One stage, or two and which texts go to the second."""

    first: Trial
    second: Trial | None = None
    asking: EscalationThreshold | None = None

    @property
    def stages(self) -> Sequence[Trial]:
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def name(self) -> str:
        return "; where unsure ".join(one.recipe.name for one in self.stages)


def _choose(best: Sequence[Trial], truth: Ints, wanted: float | None) -> _Chosen:
    """`best` has the best of each tier that was tried, the cheapest first."""
    first, last = best[0], best[-1]
    if len(best) == 1 or (wanted is None and last.accuracy <= first.accuracy + WORTH_A_TIER):
        return _Chosen(first)
    asking = choose_escalation(first.scores, last.scores, truth, wanted or last.accuracy - LEFT_OUT)
    if asking.share <= 0.0:
        return _Chosen(first)
    if asking.share >= 1.0:
        return _Chosen(last)
    return _Chosen(first, last, asking)


def _build_classifier(
    examples: Examples,
    chosen: _Chosen,
    trials: Sequence[Trial],
    vocabulary: FeatureVocabulary,
    linears: Sequence[LinearModel],
    wanted: float | None,
) -> TrainedClassifier:
    truth, first = examples.truth, chosen.first.scores
    second = None if chosen.second is None else chosen.second.scores
    escalate_below = 0.0 if chosen.asking is None else chosen.asking.below
    escalated = compute_margins(first) < escalate_below
    shares = _cross_calibrate(first, second, escalated, truth)
    ood_scores = compute_ood_scores(first)
    found = fit_calibrations(first, second, escalated, truth)
    stages = [
        FittedStage(one.recipe, linear, own) for one, linear, own in zip(chosen.stages, linears, found, strict=True)
    ]
    return TrainedClassifier(
        labels=examples.labels,
        vocabulary=vocabulary,
        first=stages[0],
        second=stages[1] if len(stages) > 1 else None,
        escalate_below=escalate_below,
        ood_threshold=float(np.quantile(ood_scores, 1 - OOD_SHARE)),
        report=_build_training_report(examples, chosen, trials, shares, escalated, wanted),
        held_confidences=shares.max(axis=1),
        held_right=shares.argmax(axis=1) == truth,
        held_ood_scores=ood_scores,
    )


def _build_training_report(
    examples: Examples,
    chosen: _Chosen,
    trials: Sequence[Trial],
    shares: Floats,
    escalated: npt.NDArray[np.bool_],
    wanted: float | None,
) -> MutableJsonObject:
    """What is kept with the version and shown: figures of held-out rows, every trial, and advice."""
    truth, first = examples.truth, chosen.first.scores
    second = None if chosen.second is None else chosen.second.scores
    figures: MutableJsonObject = dict(build_report(shares, truth, examples.labels))
    plain = compute_softmax(first, 1.0)
    if second is not None:
        plain[escalated] = compute_softmax(second[escalated], 1.0)
        figures["accuracy_by_share"] = tabulate_accuracy_by_share(first, second, truth)
    figures["before_calibration_ece"] = build_report(plain, truth, examples.labels)["ece"]
    figures["bounds"] = tabulate_bounds(shares.max(axis=1), shares.argmax(axis=1) == truth)
    figures["tried"] = [
        {"recipe": one.recipe.name, "tier": one.recipe.tier, "accuracy": one.accuracy, "seconds": round(one.seconds, 2)}
        for one in trials
    ]
    figures |= {"recipe": chosen.name, "tier": chosen.stages[-1].recipe.tier, "examples": len(examples.texts)}
    figures["asked_share"] = _compute_asked_share(chosen)
    figures |= {"wanted_accuracy": wanted, "reached": wanted is None or figures["accuracy"] >= wanted}
    figures["notes"] = list(examples.notes) + _advise(figures, wanted)
    return figures


def _compute_asked_share(chosen: _Chosen) -> float:
    """Of all texts, that the encoder embeds."""
    if chosen.asking is not None:
        return chosen.asking.share
    return float(chosen.first.recipe.tier == "encoder")


def _cross_calibrate(first: Floats, second: Floats | None, asked: npt.NDArray[np.bool_], truth: Ints) -> Floats:
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


def _advise(figures: JsonObject, wanted: float | None) -> list[str]:
    if wanted is None or figures["accuracy"] >= wanted:
        return []
    best = max(row["accuracy"] for row in figures["tried"])
    return [
        f"accuracy {wanted:.3f} was asked for, and the best of what is on this machine reached {best:.3f}: give more "
        "examples, pull an encoder (appliance models pull all-minilm-l6-v2), or let unsure texts go to a model"
    ]
