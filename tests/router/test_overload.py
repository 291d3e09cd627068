"""Overload in simulated time: what stays, what leaves, and when it begins. The figures are promises of the design."""

from typing import Any

import pytest

from tests.router.simulation import Arrival, Result, poisson, simulate

BUDGET = 2.0
POLICY = """
[defaults]
latency_budget_seconds = 2.0
max_wait_seconds = 120.0

[[routes]]
name = "all"
targets = ["onsite", "hosted"]
"""
ALL_HERE = (
    '[defaults]\nmax_wait_seconds = 10000\ntotal_seconds = 80000\n[[routes]]\nname = "all"\ntargets = ["onsite"]\n'
)

LAPTOP: dict[str, Any] = {"prefill": 600.0, "decode": 450.0, "sequences": 16, "noise": 0.2}


def arrivals(times_capacity: float, slow: float, prompt: int, output: int, seconds: float = 60.0) -> list[Arrival]:
    capacity = 1 / (prompt / LAPTOP["prefill"] + output / LAPTOP["decode"]) / slow
    return poisson(times_capacity * capacity, seconds, prompt=prompt, output=output, bound=0.1)


def bound_ones_stayed(result: Result) -> bool:
    return set(result.places(bound=True)) == {"onsite"}


@pytest.mark.parametrize(("prompt", "output"), [(160, 40), (40, 120)])
def test_at_three_times_capacity_almost_all_begin_in_time_and_the_engine_stays_full(prompt: int, output: int) -> None:
    work = arrivals(3.0, 1.0, prompt, output)
    result = simulate(LAPTOP, work, POLICY)
    full = simulate(LAPTOP, work, ALL_HERE, to_the_end=False)
    assert result.within(BUDGET) >= 0.99
    assert result.tokens_per_second >= 0.95 * full.tokens_per_second
    assert bound_ones_stayed(result)


@pytest.mark.parametrize("slow", [0.6, 1.6])
def test_an_engine_that_is_not_as_quick_as_it_says_is_seen_through(slow: float) -> None:
    result = simulate({**LAPTOP, "slow": slow}, arrivals(3.0, slow, 160, 40), POLICY)
    assert result.within(BUDGET) >= 0.98
    assert bound_ones_stayed(result)


def test_below_its_capacity_nearly_all_stays_here() -> None:
    result = simulate(LAPTOP, arrivals(0.5, 1.0, 160, 40), POLICY)
    places = result.places(bound=False)
    assert places["onsite"] >= 0.9 * sum(places.values())
    assert result.within(BUDGET) >= 0.99


def test_bound_requests_do_not_wait_behind_those_that_may_leave() -> None:
    result = simulate(LAPTOP, arrivals(3.0, 1.0, 160, 40), POLICY)
    waits = sorted(one.first_byte_seconds for one in result.ended if one.arrival.is_bound)
    assert bound_ones_stayed(result) and waits[int(0.9 * len(waits))] < 3.0
