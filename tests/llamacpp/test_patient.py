"""Work that can wait: it holds still while anything urgent runs, and its steps are short."""

import pytest

from appliance.llamacpp.scheduler import NOTHING_URGENT, PATIENT_STEP_SECONDS, TILE_TOKENS, most_urgent, step_budget


@pytest.mark.parametrize(
    ("running", "labels", "expected"),
    [([], None, NOTHING_URGENT), ([1, 0], None, 0), ([1], 0, 0), ([], 1, 1), ([1], None, 1)],
)
def test_the_least_priority_of_what_runs_is_the_most_urgent(
    running: list[int], labels: int | None, expected: int
) -> None:
    assert most_urgent(running, labels) == expected


def test_a_step_without_anything_urgent_is_short() -> None:
    rate = 2000.0
    alone = step_budget(512, 0, 0, rate, 0.1)
    patient = step_budget(512, 0, 0, rate, 0.1, can_wait=True)
    assert alone == 512
    assert TILE_TOKENS <= patient <= max(TILE_TOKENS, rate * PATIENT_STEP_SECONDS)
    assert step_budget(512, 80, 0, rate, 0.1, can_wait=True) > 80  # those that generate are in it all the same


def test_an_unmeasured_engine_still_computes_something() -> None:
    assert step_budget(512, 0, 0, 0.0, 0.1, can_wait=True) > 0
