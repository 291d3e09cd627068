"""Figures of evaluations: values known by hand, and intervals that tell chance from difference."""

import numpy as np
import pytest

from appliance.quality.evaluation import metrics


def test_a_share_of_few_rows_has_a_wide_interval() -> None:
    few, many = metrics.share(8, 10), metrics.share(800, 1_000)
    assert few.value == many.value == 0.8
    # Wilson's interval for 8 of 10, as published tables have it.
    assert few.low == pytest.approx(0.4902, abs=1e-4) and few.high == pytest.approx(0.9433, abs=1e-4)
    assert many.high - many.low < 0.06
    assert metrics.share(10, 10).high == pytest.approx(1.0) and metrics.share(10, 10).low < 0.75
    assert metrics.share(0, 0) == metrics.MetricInterval(0.0, 0.0, 1.0)


def test_calibration_error_is_the_gap_between_confidence_and_truth() -> None:
    assert metrics.ece([0.95] * 10, [True] * 9 + [False]) == pytest.approx(0.05)
    assert metrics.ece([1.0, 1.0], [False, False]) == pytest.approx(1.0)
    assert metrics.ece([], []) is None


def test_macro_f1_counts_every_class_alike() -> None:
    truth = np.array([0] * 9 + [1])
    always = metrics.class_f1(truth, np.zeros(10, np.int64), 2)
    assert always.value == pytest.approx((2 * 9 / 19 + 0) / 2)
    assert metrics.class_f1(truth, truth, 2).value == 1.0
    nobody = metrics.class_f1(truth, np.full(10, -1), 2)
    assert nobody.value == 0.0


def test_micro_f1_counts_every_value_alike() -> None:
    right, said, there = np.array([[1, 0], [1, 0]]), np.array([[1, 1], [1, 0]]), np.array([[1, 0], [1, 2]])
    found = metrics.overlap(right, said, there)
    assert found.micro.value == pytest.approx(2 * 2 / (3 + 4))
    assert found.macro.value == pytest.approx((1.0 + 0.0) / 2)
    assert found.precision == pytest.approx(2 / 3) and found.recall == pytest.approx(2 / 4)
    nothing = np.zeros((2, 2), np.int64)
    assert metrics.overlap(nothing, nothing, nothing).micro.value == 1.0


def test_a_difference_that_chance_explains_is_no_difference() -> None:
    rng = np.random.default_rng(1)
    same = rng.integers(0, 2, 50).astype(float)
    other = np.roll(same, 1)
    assert metrics.verdict(metrics.difference(list(same), list(other))) == "no difference shown"
    better = np.minimum(1.0, same + (rng.random(50) < 0.5))
    assert metrics.verdict(metrics.difference(list(better), list(same))) == "better"
    assert metrics.verdict(metrics.difference(list(same), list(better))) == "worse"


def test_the_same_seed_gives_the_same_interval() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert metrics.mean(values, seed=3) == metrics.mean(values, seed=3)
