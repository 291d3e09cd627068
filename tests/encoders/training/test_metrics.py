"""Figures of a report."""

import numpy as np
import pytest

from appliance.encoders.training.metrics import build_report, compute_brier, compute_ece


def test_confidence_that_is_as_often_right_as_it_says_has_no_calibration_error() -> None:
    assert compute_ece([0.75] * 4, [True, True, True, False]) == pytest.approx(0.0)
    assert compute_ece([0.9] * 4, [False] * 4) == pytest.approx(0.9)
    assert compute_ece([], []) == 0.0


def test_brier_is_0_for_the_truth_and_2_for_its_opposite() -> None:
    shares = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    assert compute_brier(shares, np.array([0, 1])) == pytest.approx(0.0)
    assert compute_brier(shares, np.array([1, 0])) == pytest.approx(2.0)


def test_a_report_counts_what_was_taken_for_what() -> None:
    shares = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], dtype=np.float32)
    told = build_report(shares, np.array([0, 1, 1]), ["a", "b"])
    assert told["accuracy"] == pytest.approx(2 / 3)
    assert told["confusions"] == [{"label": "b", "answer": "a", "count": 1}]
    assert [row["recall"] for row in told["per_class"]] == [1.0, 0.5]
    at_70 = next(row for row in told["coverage"] if row["threshold"] == 0.7)
    assert at_70["coverage"] == pytest.approx(2 / 3)
    assert at_70["accuracy"] == 1.0
