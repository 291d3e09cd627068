"""Calibration of decisions on labelled examples: what temperature and biases make the probabilities true.

Of scores s the fitted probabilities are softmax(s / temperature + bias). Both are found by gradient steps on the mean
log loss, the biases held near 0 so that a label seen twice cannot claim much. How well that works is told by
examples it was not fitted on: the set is cut into folds, and each is judged by a fit on the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from appliance.tasks.decisions.decision_options import CalibrationParameters

MIN_EXAMPLES = 20
"""Two folds of ten: fewer say nothing about how far off the probabilities are."""
FOLDS = 5
BINS = 10
"""Of confidence, for the expected calibration error: ten is what published figures use."""
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.05, 50.0
_BIAS_STRENGTH = 0.5
"""Weight of the sum of squared biases against the summed log loss: as if each had been drawn with deviation 1."""
_STEPS, _RATE = 400, 0.05

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CalibrationQuality:
    """How good probabilities are: all but accuracy are better when lower."""

    accuracy: float
    ece: float
    """Expected calibration error: by how much confidence and accuracy differ, over bins of confidence."""
    brier: float
    """Mean squared distance from the truth, summed over the options (0 to 2)."""
    log_loss: float


@dataclass(frozen=True, slots=True)
class FittedCalibration:
    fit: CalibrationParameters
    before: CalibrationQuality
    after: CalibrationQuality
    """On examples that were not fitted on."""
    examples: int


def fit_question(scores: Sequence[Sequence[float]], truth: Sequence[int], *, with_bias: bool) -> FittedCalibration:
    """`scores` of each example's options, and the index of the right one.

    Raises ValueError for fewer than MIN_EXAMPLES.
    """
    if len(scores) < MIN_EXAMPLES:
        raise ValueError(f"{len(scores)} examples are too few to calibrate on: give at least {MIN_EXAMPLES}")
    rows, right = np.asarray(scores, np.float64), np.asarray(truth, np.intp)
    after = np.empty_like(rows)
    # The order examples come in may have a meaning (sorted by label), so folds are dealt like cards within labels.
    fold = np.empty(len(rows), np.intp)
    fold[np.argsort(right, kind="stable")] = np.arange(len(rows)) % FOLDS
    for number in range(FOLDS):
        out = fold == number
        after[out] = compute_probabilities(rows[out], _fit(rows[~out], right[~out], with_bias=with_bias))
    before = measure_quality(compute_probabilities(rows, CalibrationParameters(1.0)), right)
    return FittedCalibration(_fit(rows, right, with_bias=with_bias), before, measure_quality(after, right), len(rows))


def compute_probabilities(scores: Floats, fit: CalibrationParameters) -> Floats:
    """Shape (examples, options); the same as `confidence.calibrated` of every row."""
    values = scores / fit.temperature + (np.asarray(fit.bias) if fit.bias else 0.0)
    weights = np.exp(values - values.max(axis=1, keepdims=True))
    shares: Floats = weights / weights.sum(axis=1, keepdims=True)
    return shares


def measure_quality(shares: Floats, truth: npt.NDArray[np.intp]) -> CalibrationQuality:
    """How true `shares` (examples, options) are, `truth` being the indices of the right options."""
    confidence, hit = shares.max(axis=1), shares.argmax(axis=1) == truth
    bins = np.minimum((confidence * BINS).astype(np.intp), BINS - 1)
    gaps = [abs(float(hit[bins == one].sum() - confidence[bins == one].sum())) for one in range(BINS)]
    right = np.zeros_like(shares)
    right[np.arange(len(truth)), truth] = 1.0
    told = np.maximum(shares[np.arange(len(truth)), truth], 1e-12)
    return CalibrationQuality(
        accuracy=float(hit.mean()),
        ece=sum(gaps) / len(truth),
        brier=float(((shares - right) ** 2).sum(axis=1).mean()),
        log_loss=float(-np.log(told).mean()),
    )


def _fit(scores: Floats, truth: npt.NDArray[np.intp], *, with_bias: bool) -> CalibrationParameters:
    """Adam on (log temperature, bias); the loss is smooth and has one hollow for each temperature."""
    count, options = scores.shape
    right = np.zeros_like(scores)
    right[np.arange(count), truth] = 1.0
    at = np.zeros(1 + options)
    mean, square = np.zeros_like(at), np.zeros_like(at)
    for step in range(1, _STEPS + 1):
        temperature, bias = float(np.exp(at[0])), at[1:]
        off = compute_probabilities(scores, CalibrationParameters(temperature, tuple(bias))) - right
        slope = np.concatenate(([-(off * scores).sum() / temperature], off.sum(axis=0) + 2 * _BIAS_STRENGTH * bias))
        slope = slope / count
        if not with_bias:
            slope[1:] = 0.0
        mean, square = 0.9 * mean + 0.1 * slope, 0.99 * square + 0.01 * slope**2
        rate = _RATE * (1 - step / (_STEPS + 1))  # to rest in the hollow instead of circling it
        at = at - rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.99**step)) + 1e-9)
        at[0] = np.clip(at[0], np.log(_MIN_TEMPERATURE), np.log(_MAX_TEMPERATURE))
    return CalibrationParameters(float(np.exp(at[0])), tuple(float(value) for value in at[1:]) if with_bias else ())
