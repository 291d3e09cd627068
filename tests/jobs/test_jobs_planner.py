"""Windows, rates, forecasts and hours: tables of values."""

from datetime import datetime

import pytest

from appliance.core import EngineStatus, Snapshot
from appliance.errors import RequestError
from appliance.jobs.fair_share import FairShareSlots
from appliance.jobs.planner import (
    BatchPace,
    choose_concurrency,
    count_open_seconds,
    is_within_hours,
    make_forecast,
    make_pace,
    parse_window,
)
from tests.jobs.office import ENGINE, load


@pytest.mark.parametrize(("text", "seconds"), [("24h", 86_400), ("90m", 5_400), ("30s", 30), ("7d", 604_800)])
def test_windows_are_durations(text: str, seconds: float) -> None:
    assert parse_window(text) == seconds


@pytest.mark.parametrize("text", ["", "24", "h", "-1h", "1.5h", "1s", "99d", "24 h", "24h\n", "9999999999h"])
def test_what_is_no_window_is_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(RequestError, match="24h"):
        parse_window(text)


@pytest.mark.parametrize(
    ("lines", "rate", "left", "late"),
    [
        (100, None, 10, 0),  # nothing is known, nothing leaves
        (0, 1.0, 0, 0),
        (100, 10.0, 100, 0),
        (100, 1.0, 100, 10),  # a tenth of the time is kept in hand
        (100, 1.0, 50, 55),
        (100, 1.0, -5, 100),
    ],
)
def test_what_will_be_late_follows_from_the_rate(lines: int, rate: float | None, left: float, late: int) -> None:
    assert make_forecast(lines, rate, left).late_lines == late


def test_a_rate_needs_some_lines_and_some_time() -> None:
    pace = BatchPace()
    pace.start(0.0)
    pace.add_lines(8, 1.0)
    assert pace.lines_per_second(1.0) is None
    assert pace.lines_per_second(4.0) == 2.0
    pace.start(100.0)
    assert pace.lines_per_second(100.0) is None


def test_that_nothing_comes_is_known_after_a_whole_window() -> None:
    pace = make_pace(86_400.0)
    pace.start(0.0)
    assert pace.lines_per_second(1_000.0) is None
    assert pace.lines_per_second(1_800.0) == 0.0
    assert make_forecast(10, 0.0, 80_000.0).late_lines == 10


def test_a_slow_minute_is_forgiven_where_there_is_a_day() -> None:
    pace = make_pace(86_400.0)
    pace.start(0.0)
    for second in range(1, 1_600):
        pace.add_lines(2, float(second))
    assert pace.lines_per_second(1_660.0) == pytest.approx(1.93, rel=0.05)


def test_a_rate_is_that_of_the_last_minute() -> None:
    pace = BatchPace()
    pace.start(0.0)
    for second in range(1, 200):
        pace.add_lines(100 if second < 100 else 1, float(second))
    assert pace.lines_per_second(199.0) == pytest.approx(1.0, rel=0.1)


def test_calls_follow_the_engines_that_are_ready() -> None:
    ready = EngineStatus(ENGINE.name, "ready", 0.0, load(16))
    starting = EngineStatus("onsite/other", "starting", 0.0, load(16))
    assert choose_concurrency(Snapshot(0.0, (), {"a": ready, "b": starting}), None) == 18
    assert choose_concurrency(Snapshot(0.0), None) == 8
    assert choose_concurrency(Snapshot(0.0, (), {"a": ready}), 3) == 3


def test_hours_may_pass_midnight() -> None:
    hours = ("22:00-06:00", "12:00-12:30")
    for hour, minute, expected in ((23, 0, True), (5, 59, True), (6, 0, False), (12, 15, True), (13, 0, False)):
        assert is_within_hours(hours, datetime(2026, 1, 1, hour, minute)) is expected
    assert count_open_seconds(hours, datetime(2026, 1, 1, 0, 0), 86_400) == 8.5 * 3600
    assert count_open_seconds((), datetime(2026, 1, 1), 90.0) == 90.0


def test_places_are_shared_by_keys_first_and_the_late_go_before() -> None:
    places = FairShareSlots(lambda: 4)
    nudged: list[str] = []
    greedy = [places.register("a", lambda: nudged.append("a")) for _ in range(3)]
    other = places.register("b", lambda: nudged.append("b"))
    assert all(places.try_acquire(claim) for claim in greedy)
    assert places.try_acquire(other)
    for claim in (*greedy, other):
        assert not places.try_acquire(claim)
    places.release(greedy[0])
    assert nudged == ["a", "a", "a", "b"]
    assert not places.try_acquire(greedy[0])  # the other key has fewer under way
    assert places.try_acquire(other)
    places.release(other)
    greedy[1].is_urgent = True
    assert not places.try_acquire(other)
    assert places.try_acquire(greedy[1])
