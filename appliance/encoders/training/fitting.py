"""Fitting: weights, temperatures and curves. Training alone does this, and alone imports what it takes."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import optimize
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from appliance.encoders.linear_models import CLIP, ProbabilityCalibration, compute_softmax

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_TEMPERATURES: Final = (0.05, 50.0)
_ITERATIONS: Final = 2_000
_LEAST_FOR_A_CURVE: Final = 25
"""Right answers, and wrong ones, that a curve needs."""
_CURVE_STRENGTH: Final = 100.0
_LEAST_TO_CALIBRATE: Final = 40
"""Rows of its own that a stage is calibrated on; with fewer it is calibrated on all."""


def fit_linear(features: Any, truth: Ints, labels: int, closeness: float) -> tuple[Floats, Floats]:
    """One label against the rest, with a squared hinge loss: weights (features, labels) and bias (labels)."""
    model = LinearSVC(C=closeness, max_iter=_ITERATIONS, dual="auto", random_state=0).fit(features, truth)
    coefficients, intercept = model.coef_, model.intercept_
    if len(model.classes_) == 2:
        coefficients, intercept = np.vstack([-coefficients, coefficients]), np.array([-intercept[0], intercept[0]])
    weights = np.zeros((features.shape[1], labels), dtype=np.float32)
    bias = np.full(labels, -1.0, dtype=np.float32)
    weights[:, model.classes_] = coefficients.T
    bias[model.classes_] = intercept
    return weights, bias


def fit_temperature(scores: Floats, truth: Ints) -> float:
    """What the scores are divided by so that their softmax has the least log loss on these rows (Guo et al., 2017)."""
    scores = scores.astype(np.float64)
    rows = np.arange(truth.size)

    def loss(log_temperature: float) -> float:
        scaled = scores / np.exp(log_temperature)
        return float((logsumexp(scaled, axis=1) - scaled[rows, truth]).mean())

    low, high = np.log(_TEMPERATURES)
    found = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded")
    return float(np.exp(found.x))


def fit_calibration(scores: Floats, truth: Ints) -> ProbabilityCalibration:
    """From rows that the scores' weights were not fitted on. Too few, or none wrong, give no curve."""
    temperature = fit_temperature(scores, truth)
    shares = compute_softmax(scores, temperature)
    right = shares.argmax(axis=1) == truth
    if min(right.sum(), truth.size - right.sum()) < _LEAST_FOR_A_CURVE:
        return ProbabilityCalibration(temperature)
    top = np.clip(shares.max(axis=1).astype(np.float64), CLIP, 1 - CLIP)
    curve = LogisticRegression(C=_CURVE_STRENGTH).fit(np.column_stack([np.log(top), -np.log1p(-top)]), right)
    sure, unsure = (float(one) for one in curve.coef_[0])
    if sure < 0 or unsure < 0:
        return ProbabilityCalibration(temperature)
    return ProbabilityCalibration(temperature, sure, unsure, float(curve.intercept_[0]))


def fit_calibrations(
    first: Floats, second: Floats | None, asked: Flags, truth: Ints
) -> Sequence[ProbabilityCalibration]:
    """Of each stage on the rows that it answers."""
    found = [_fitted(first, ~asked, truth)]
    if second is not None:
        found.append(_fitted(second, asked, truth))
    return found


def _fitted(scores: Floats, own: Any, truth: Ints) -> ProbabilityCalibration:
    enough = own.sum() >= _LEAST_TO_CALIBRATE
    return fit_calibration(scores[own], truth[own]) if enough else fit_calibration(scores, truth)
