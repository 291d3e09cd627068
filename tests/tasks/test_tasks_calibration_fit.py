"""Temperature and biases are found again where they were put in, and quality is told honestly."""

import numpy as np
import numpy.typing as npt
import pytest

from appliance.tasks.decisions.calibration_fit import compute_probabilities, fit_question, measure_quality
from appliance.tasks.decisions.confidence import calibrate_scores
from appliance.tasks.decisions.decision_options import CalibrationParameters


def drawn(count: int, seed: int = 0, options: int = 4) -> tuple[npt.NDArray[np.float64], list[int]]:
    """True log odds, and labels drawn by them."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(size=(count, options)) * 1.5
    shares = np.exp(odds) / np.exp(odds).sum(axis=1, keepdims=True)
    return odds, [int(rng.choice(options, p=row)) for row in shares]


def test_a_temperature_that_was_put_in_is_found() -> None:
    odds, truth = drawn(600)
    fitted = fit_question((odds * 4).tolist(), truth, with_bias=False)
    assert fitted.fit.temperature == pytest.approx(4, rel=0.2)
    assert fitted.fit.bias == ()
    assert fitted.after.ece < 0.06 < 0.15 < fitted.before.ece
    assert fitted.after.brier < fitted.before.brier and fitted.after.log_loss < fitted.before.log_loss
    assert fitted.after.accuracy == fitted.before.accuracy, "a temperature changes no order"


def test_a_bias_that_was_put_in_is_taken_out() -> None:
    odds, truth = drawn(600)
    skewed = odds - np.array([3.0, 0.0, -1.0, 0.5])
    with_bias = fit_question(skewed.tolist(), truth, with_bias=True)
    assert with_bias.after.accuracy > with_bias.before.accuracy + 0.05
    shift = np.array(with_bias.fit.bias) * 1.0
    assert shift[0] - shift[2] == pytest.approx(4.0, abs=1.0)


def test_noise_is_not_learnt() -> None:
    rng = np.random.default_rng(1)
    fitted = fit_question(rng.normal(size=(40, 3)).tolist(), rng.integers(0, 3, 40).tolist(), with_bias=True)
    assert max(map(abs, fitted.fit.bias)) < 1.5
    assert fitted.after.log_loss < 1.35, "near to even shares, whose loss is 1.10"


def test_the_fitted_are_the_probabilities_that_answers_get() -> None:
    odds, _ = drawn(5)
    fit = CalibrationParameters(3.0, (0.5, 0.0, -0.5, 0.1))
    for row, shares in zip(odds.tolist(), compute_probabilities(odds, fit), strict=True):
        assert calibrate_scores(row, fit.temperature, fit.bias) == pytest.approx(shares)


def test_quality_is_what_its_names_say() -> None:
    shares = np.array([[0.9, 0.1], [0.6, 0.4]])
    told = measure_quality(shares, np.array([0, 1]))
    assert told.accuracy == 0.5
    assert told.ece == pytest.approx((0.1 + 0.6) / 2)
    assert told.brier == pytest.approx((2 * 0.01 + 2 * 0.36) / 2)
    assert told.log_loss == pytest.approx(-(np.log(0.9) + np.log(0.4)) / 2)


def test_a_handful_of_examples_is_not_enough() -> None:
    odds, truth = drawn(19)
    with pytest.raises(ValueError, match="at least 20"):
        fit_question(odds.tolist(), truth, with_bias=False)


def test_examples_sorted_by_label_are_judged_alike() -> None:
    odds, truth = drawn(300)
    order = np.argsort(truth, kind="stable")
    fitted = fit_question((odds[order] * 4).tolist(), [truth[place] for place in order], with_bias=True)
    assert fitted.after.ece < 0.08
