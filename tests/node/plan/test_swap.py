"""Models that do not all fit: who is loaded and unloaded when, and never back and forth."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.engines.base import EngineMemory, EngineShape, GpuShare, Placement
from appliance.node.plan.swap import (
    RAM,
    LoadedModel,
    SwapMove,
    SwapRules,
    decide_swaps,
    find_initially_unloaded,
    list_memory_pools,
)

POOLS = {RAM: 100}
RULES = SwapRules(idle_unload_seconds=300, least_residence_seconds=60, cool_down_seconds=20)
A = LoadedModel("a", (RAM,), 70, "loaded", since=0, used_at=50)
B = LoadedModel("b", (RAM,), 70, "unloaded", since=0, used_at=0)


def _kinds(moves: tuple[SwapMove, ...]) -> list[tuple[str, str]]:
    return [(move.kind, move.model) for move in moves]


@pytest.mark.parametrize(
    ("now", "residents", "expected"),
    [
        (100, [A, B], []),
        (100, [A, replace(B, requested_at=99)], [("unload", "a")]),
        (100, [replace(A, is_busy=True), replace(B, requested_at=99)], []),
        (100, [replace(A, since=50), replace(B, requested_at=99)], []),
        (100, [replace(A, residence="moving"), replace(B, requested_at=99)], []),
        (100, [A, replace(B, bytes=30, requested_at=99)], [("load", "b")]),
        (100, [A, replace(B, bytes=130, requested_at=99)], []),
        (100, [A, replace(B, requested_at=30)], []),
        (100, [A, replace(B, requested_at=99, used_at=99.5)], []),
        (100, [A, replace(B, requested_at=99, since=90)], []),
        (349, [A], []),
        (350, [A], [("unload", "a")]),
        (350, [replace(A, is_busy=True)], []),
    ],
    ids=[
        "nobody wants anything",
        "the unused one makes way",
        "not while it works",
        "not before it has stayed a while",
        "one move at a time",
        "what fits beside it is loaded",
        "for what can never fit nobody makes way",
        "an old wish has been given up",
        "a wish that was met is over",
        "who was just put out waits",
        "not idle for long enough",
        "idle",
        "busy is not idle",
    ],
)
def test_what_is_moved(now: float, residents: list[LoadedModel], expected: list[tuple[str, str]]) -> None:
    assert _kinds(decide_swaps(now, residents, POOLS, RULES)) == expected


def test_the_longest_unused_go_and_no_more_than_it_takes() -> None:
    small = [replace(A, model=name, bytes=30, used_at=used) for name, used in (("x", 40), ("y", 10), ("z", 20))]
    assert _kinds(decide_swaps(100, [*small, replace(B, bytes=40, requested_at=99)], POOLS, RULES)) == [("unload", "y")]


def test_the_first_who_wished_is_first() -> None:
    early, late = replace(B, model="c", requested_at=90), replace(B, requested_at=95)
    assert _kinds(decide_swaps(100, [late, early], POOLS, RULES)) == [("load", "c")]


def test_pools_do_not_help_each_other() -> None:
    other = replace(A, pools=("GPU-1",))
    wanted = replace(B, pools=("GPU-0",), requested_at=99)
    assert decide_swaps(100, [other, wanted], {"GPU-0": 60, "GPU-1": 100}, RULES) == ()


@given(st.lists(st.sampled_from(["a", "b", ""]), min_size=600, max_size=600))
def test_however_they_are_wanted_swaps_are_rare(wishes: list[str]) -> None:
    """Ten minutes of wishes, one a second at most, for two models where one fits."""
    residence: dict[str, tuple[str, float]] = {"a": ("loaded", 0.0), "b": ("unloaded", 0.0)}
    wanted: dict[str, float] = {}
    used = {"a": 0.0, "b": 0.0}
    swaps = 0
    for now, wish in enumerate(wishes):
        if wish and residence[wish][0] == "loaded":
            used[wish] = float(now)
        elif wish:
            wanted[wish] = float(now)
        rows = [
            LoadedModel(name, (RAM,), 70, state, since, used[name], requested_at=wanted.get(name))  # type: ignore[arg-type]
            for name, (state, since) in residence.items()
        ]
        for move in decide_swaps(float(now), rows, POOLS, RULES):
            residence[move.model] = ("loaded" if move.kind == "load" else "unloaded", float(now))
            swaps += move.kind == "load"
    assert sum(state == "loaded" for state, _ in residence.values()) <= 1
    assert swaps <= 600 / RULES.least_residence_seconds


def _placement(model: str, size: int) -> Placement:
    shape = EngineShape(1, 1024, 1, 1024, 8)
    return Placement(model, "q", "llamacpp", Path(model), shape, EngineMemory(size, 0, 0, 0), frozenset(), ())


def test_at_first_those_are_loaded_that_fit_in_their_order() -> None:
    placements = [_placement("a", 60), _placement("b", 60), _placement("c", 30)]
    unloaded = find_initially_unloaded(placements, POOLS)
    assert unloaded == {"b": "needs 60 bytes where 40 are left; loaded when wanted"}


def test_devices_that_are_shared_in_part_are_not_promised_twice() -> None:
    both, first, second = GpuShare(("G1", "G2"), 0.9, 1, 1), GpuShare(("G1",), 0.9, 1, 1), GpuShare(("G2",), 0.9, 1, 1)
    placements = [
        replace(_placement("wide", 60), gpu=both),
        replace(_placement("narrow", 60), gpu=first),
        replace(_placement("small", 30), gpu=second),
        replace(_placement("smaller", 20), gpu=second),
    ]
    assert list(find_initially_unloaded(placements, {"G1": 100, "G2": 100})) == ["narrow", "smaller"]
    assert list_memory_pools(placements[0]) == ("G1", "G2")
    assert list_memory_pools(replace(placements[1], gpu=replace(first, unified_memory=True))) == ("G1", RAM)


def test_for_a_model_on_several_devices_those_go_that_are_in_its_way() -> None:
    pools = {"G1": 100, "G2": 100, "G3": 100}
    residents = [
        replace(A, model=name, pools=pools_, bytes=60, used_at=used)
        for name, pools_, used in (("one", ("G1",), 20), ("two", ("G2",), 30), ("three", ("G3",), 10))
    ]
    wide = replace(B, pools=("G1", "G2"), bytes=70, requested_at=99)
    assert _kinds(decide_swaps(100, [*residents, wide], pools, RULES)) == [("unload", "one"), ("unload", "two")]
    stays = [replace(residents[0], is_busy=True), *residents[1:]]
    assert decide_swaps(100, [*stays, wide], pools, RULES) == ()
    leaves = [replace(residents[0], residence="moving"), *residents[1:]]
    assert decide_swaps(100, [*leaves, wide], pools, RULES) == ()
    assert _kinds(decide_swaps(100, [*residents, replace(wide, bytes=40)], pools, RULES)) == [("load", "b")]
