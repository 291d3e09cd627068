"""A trained classifier in one stage or in two: cheap features answer all texts, and those that they leave unsure are
asked of the encoder as well.

Unsure is a text whose two highest scores of the first stage lie close together. From which distance on the first answer
stands is chosen on held-out rows, where both stages have scored every row: the encoder gets as few texts as reach the
accuracy that is wanted. Each stage is calibrated on the rows that it answers, so the answers of both together are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from appliance.core.json_types import JsonObject
from appliance.encoders.embedders import Embedder
from appliance.encoders.features import FeatureVocabulary
from appliance.encoders.linear_models import (
    FeatureRecipe,
    LinearModel,
    LinearScorer,
    ProbabilityCalibration,
    compute_ood_scores,
)

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

SHOWN_SHARES: Final = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class FittedStage:
    """A stage as numbers."""

    recipe: FeatureRecipe
    linear: LinearModel
    calibration: ProbabilityCalibration


@dataclass(frozen=True, slots=True)
class StageModel:
    """A stage, ready to score. `encoder` is None where its recipe asks for none."""

    scorer: LinearScorer
    encoder: Embedder | None
    encoder_weights: Floats | None
    calibration: ProbabilityCalibration

    def scores(self, texts: Sequence[str]) -> Floats:
        total = self.scorer.scores(texts)
        if self.encoder is not None and self.encoder_weights is not None:
            total = total + self.encoder.embed(texts, truncate=True).vectors @ self.encoder_weights
        return total


def build_stage(
    vocabulary: FeatureVocabulary, linear: LinearModel, encoder: Embedder | None, calibration: ProbabilityCalibration
) -> StageModel:
    """`encoder` is left out where the weights have nothing for it."""
    weights = linear.weights.get("encoder")
    return StageModel(LinearScorer(vocabulary, linear), None if weights is None else encoder, weights, calibration)


@dataclass(frozen=True, slots=True)
class StageAnswers:
    """A row for each text."""

    probabilities: Floats
    ood_scores: Floats
    """By the first stage, whichever answered."""
    escalated: Flags
    """Whether the second stage answered."""


@dataclass(frozen=True, slots=True)
class ClassifierHead:
    """A version of a classifier, ready to answer."""

    labels: tuple[str, ...]
    first: StageModel
    ood_threshold: float
    """OOD score from which on a text counts as out of scope."""
    second: StageModel | None = None
    escalate_below: float = 0.0
    """Texts whose margin is smaller go to the second stage."""

    def answer(self, texts: Sequence[str]) -> StageAnswers:
        scores = self.first.scores(texts)
        shares = self.first.calibration.probabilities(scores)
        asked = np.zeros(len(texts), dtype=bool)
        if self.second is not None:
            asked = compute_margins(scores) < self.escalate_below
            places = np.flatnonzero(asked).tolist()
            if places:
                found = self.second.scores([texts[place] for place in places])
                shares[places] = self.second.calibration.probabilities(found)
        return StageAnswers(shares, compute_ood_scores(scores), asked)


@dataclass(frozen=True, slots=True)
class TrainedClassifier:
    """A fitted head in numbers, before it is written down."""

    labels: tuple[str, ...]
    vocabulary: FeatureVocabulary
    first: FittedStage
    second: FittedStage | None
    """Texts with a margin below `escalate_below` go there."""
    escalate_below: float
    ood_threshold: float
    report: JsonObject
    held_confidences: Floats
    """Of each example by a head that had not seen it; in the examples' order."""
    held_right: Flags
    held_ood_scores: Floats

    def head(self, encoder: Embedder | None) -> ClassifierHead:
        """Ready to answer. `encoder`: the one that it was trained with, if there was one."""
        steps = [
            None if one is None else build_stage(self.vocabulary, one.linear, encoder, one.calibration)
            for one in (self.first, self.second)
        ]
        assert steps[0] is not None
        return ClassifierHead(self.labels, steps[0], self.ood_threshold, steps[1], self.escalate_below)


def compute_margins(scores: Floats) -> Floats:
    """How far the highest score is above the next one."""
    two = np.partition(scores, -2, axis=1)[:, -2:]
    apart: Floats = two[:, 1] - two[:, 0]
    return apart


@dataclass(frozen=True, slots=True)
class EscalationThreshold:
    """What escalating below a margin comes to on held-out rows."""

    below: float
    share: float
    accuracy: float


def choose_escalation(first: Floats, second: Floats, truth: Ints, wanted: float) -> EscalationThreshold:
    """The smallest share of texts with which `wanted` is reached; where it cannot be, the one that comes closest.

    `first` and `second` are both stages' scores of the same rows, which neither was fitted on.
    """
    apart = compute_margins(first)
    order = np.argsort(apart, kind="stable")
    gained = _accuracies(first, second, truth, order)
    enough = np.flatnonzero(gained >= wanted)
    count = int(enough[0]) if enough.size else int(gained.argmax())
    below = float("inf") if count == truth.size else float(apart[order[count]])
    asked = apart < below
    return EscalationThreshold(below, float(asked.mean()), float(gained[int(asked.sum())]))


def tabulate_accuracy_by_share(first: Floats, second: Floats, truth: Ints) -> Sequence[dict[str, float]]:
    """What accuracy comes of escalating so many of all texts, the least sure ones."""
    gained = _accuracies(first, second, truth, np.argsort(compute_margins(first), kind="stable"))
    return [{"asked_share": share, "accuracy": float(gained[round(share * truth.size)])} for share in SHOWN_SHARES]


def _accuracies(first: Floats, second: Floats, truth: Ints, order: Ints) -> npt.NDArray[np.float64]:
    """Accuracy with the first 0, 1, 2... rows of `order` escalated."""
    before = first.argmax(axis=1) == truth
    after = second.argmax(axis=1) == truth
    gains = after[order].astype(np.int64) - before[order]
    sums: npt.NDArray[np.float64] = (before.sum() + np.concatenate([[0], np.cumsum(gains)])) / truth.size
    return sums


def calibrate_probabilities(
    calibrations: Sequence[ProbabilityCalibration], first: Floats, second: Floats | None, asked: Flags
) -> Floats:
    """Each row's probabilities by the stage that answers it."""
    shares = calibrations[0].probabilities(first)
    if second is not None and asked.any():
        shares[asked] = calibrations[1].probabilities(second[asked])
    return shares
