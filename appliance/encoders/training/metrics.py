"""How good a classifier's held-out probabilities are. Pure."""

from collections.abc import Sequence
from typing import Final, TypedDict

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class ClassScore(TypedDict):
    """Of one label on held-out rows."""

    label: str
    precision: float
    recall: float
    f1: float
    examples: int


class Confusion(TypedDict):
    """So many rows of `label` were answered with `answer`."""

    label: str
    answer: str
    count: int


class CoverageRow(TypedDict):
    """Answers of at least `threshold`: their share of all, and how often they are right; None where there are none."""

    threshold: float
    coverage: float
    accuracy: float | None


class ClassifierReport(TypedDict):
    """The figures of a classifier on rows that it was not fitted on."""

    rows: int
    accuracy: float
    macro_f1: float
    ece: float
    brier: float
    per_class: Sequence[ClassScore]
    confusions: Sequence[Confusion]
    coverage: Sequence[CoverageRow]


ECE_BINS: Final = 15
COVERAGE_THRESHOLDS: Final = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
MOST_CONFUSIONS: Final = 100
"""Pairs listed in a report, the most frequent first: a whole matrix of 1,000 labels has a million cells."""


def compute_ece(confidences: npt.ArrayLike, right: npt.ArrayLike, bins: int = ECE_BINS) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy, over bins of equal width
    (Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", 2017)."""
    sure, hit = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if not sure.size:
        return 0.0
    place = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=sure - hit, minlength=bins)
    return float(np.abs(gaps).sum() / sure.size)


def compute_brier(probabilities: Floats, truth: Ints) -> float:
    """Mean squared distance to the truth over all classes; 0 is perfect, 2 the worst."""
    if not truth.size:
        return 0.0
    squares = (probabilities.astype(np.float64) ** 2).sum(axis=1)
    hit = probabilities[np.arange(truth.size), truth].astype(np.float64)
    return float((squares - 2 * hit + 1).mean())


def score_classes(predicted: Ints, truth: Ints, labels: Sequence[str]) -> Sequence[ClassScore]:
    count = len(labels)
    support = np.bincount(truth, minlength=count)
    guessed = np.bincount(predicted, minlength=count)
    hits = np.bincount(truth[predicted == truth], minlength=count)
    rows: list[ClassScore] = []
    for index, label in enumerate(labels):
        precision = float(hits[index] / guessed[index]) if guessed[index] else 0.0
        recall = float(hits[index] / support[index]) if support[index] else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        row: ClassScore = {
            "label": label,
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "examples": int(support[index]),
        }
        rows.append(row)
    return rows


def count_confusions(predicted: Ints, truth: Ints, labels: Sequence[str]) -> Sequence[Confusion]:
    """Pairs of label and answer that differ, the most frequent first."""
    wrong = predicted != truth
    pairs, counts = np.unique(truth[wrong] * len(labels) + predicted[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_CONFUSIONS]
    return [
        {
            "label": labels[int(pairs[place]) // len(labels)],
            "answer": labels[int(pairs[place]) % len(labels)],
            "count": int(counts[place]),
        }
        for place in order
    ]


def measure_coverage(confidences: npt.ArrayLike, right: npt.ArrayLike) -> Sequence[CoverageRow]:
    """What share of texts is answered with at least so much confidence, and how often those answers are right."""
    sure, hit = np.asarray(confidences), np.asarray(right, dtype=bool)
    rows: list[CoverageRow] = []
    for threshold in COVERAGE_THRESHOLDS:
        kept = sure >= threshold
        accuracy = float(hit[kept].mean()) if kept.any() else None
        rows.append(
            {"threshold": threshold, "coverage": float(kept.mean()) if kept.size else 0.0, "accuracy": accuracy}
        )
    return rows


def build_report(probabilities: Floats, truth: Ints, labels: Sequence[str]) -> ClassifierReport:
    """Every figure of a classifier on rows that it was not fitted on. `truth` are places in `labels`."""
    predicted = probabilities.argmax(axis=1).astype(np.int64)
    right = predicted == truth
    confidences = probabilities.max(axis=1)
    classes = score_classes(predicted, truth, labels)
    seen = [row["f1"] for row in classes if row["examples"]]
    return {
        "rows": int(truth.size),
        "accuracy": float(right.mean()) if truth.size else 0.0,
        "macro_f1": float(np.mean(seen)) if seen else 0.0,
        "ece": compute_ece(confidences, right),
        "brier": compute_brier(probabilities, truth),
        "per_class": classes,
        "confusions": count_confusions(predicted, truth, labels),
        "coverage": measure_coverage(confidences, right),
    }
