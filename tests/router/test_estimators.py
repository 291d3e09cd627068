"""What experience teaches, and what the ledger of an engine makes of it."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from appliance.core import Snapshot
from appliance.errors import Busy
from appliance.router.capacity.admission import Admission
from appliance.router.capacity.request_load import RequestLoad
from appliance.router.stats.estimators import Averages, Estimators, LatencyCorrection
from appliance.state import State
from tests.router.scene import engine_target, hosted_target, make_request_load, read_stream, view_of
from tests.router.stage import Stage, settled

pytestmark = pytest.mark.anyio

LOCAL = engine_target()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Room:
    """An admission over an engine with four sequences that computes 1,000 and writes 50 tokens/s each."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.state = State(self.clock)
        self.estimators = Estimators()
        self.admission = Admission(self.state, self.clock, self.estimators)
        self.publish()

    def publish(self, **load: object) -> None:
        self.clock.now += 0.001
        fields = {"decode_tokens_per_second": {1: 50.0, 4: 200.0}, "kv_capacity_tokens": 100_000, **load}
        view = view_of(seen=self.clock(), load=make_request_load(**fields))
        self.state.publish(Snapshot(self.clock(), (LOCAL,), {LOCAL.name: view}))

    def first_byte(self, load: RequestLoad, *, can_fall_back: bool = False) -> float:
        """As predicted, without the caution of those who have learned nothing yet."""
        return (
            self.admission.predict(LOCAL, load, can_fall_back=can_fall_back).first_byte_seconds
            / LatencyCorrection.FIRST
        )


@pytest.fixture
async def room() -> AsyncIterator[Room]:
    made = Room()
    yield made
    await made.admission.aclose()


# --- averages, pace, outputs, caches


def test_averages_believe_the_first_ones_and_then_change_slowly() -> None:
    averages = Averages(0.1)
    averages.learn("a", 10.0)
    averages.learn("a", 20.0)
    assert averages.get("a") == (15.0, 2)
    for _ in range(100):
        averages.learn("a", 30.0)
    average, seen = averages.get("a") or (0.0, 0)
    assert (round(average, 1), seen) == (30.0, 102)
    assert averages.get("b") is None


def test_what_callers_make_up_does_not_fill_the_memory() -> None:
    averages = Averages(0.1)
    for number in range(10_000):
        averages.learn(number, 1.0)
    assert averages.get(0) is None and averages.get(9_999) is not None


def test_the_pace_settles_where_few_exceed_it_and_never_beyond_its_bounds() -> None:
    pace, randomness = LatencyCorrection(), random.Random(1)
    seen = [randomness.lognormvariate(0.2, 0.3) for _ in range(20_000)]
    for ratio in seen:
        pace.learn("e", 1.0, ratio)
    exceeded = sum(ratio > pace.ratio("e") for ratio in seen) / len(seen)
    assert 0.005 < exceeded < 0.05
    for _ in range(1000):
        pace.learn("slow", 1.0, 100.0)
    assert (
        pace.ratio("slow") == pytest.approx(LatencyCorrection.MOST) and pace.ratio("other") == LatencyCorrection.FIRST
    )
    for _ in range(10_000):
        pace.learn("fast", 1.0, 0.001)
    assert pace.ratio("fast") == pytest.approx(LatencyCorrection.LEAST)
    pace.learn("short", 0.01, 5.0)
    assert pace.ratio("short") == LatencyCorrection.FIRST, "noise teaches nothing"


def test_answers_are_expected_to_be_as_long_as_those_with_about_the_same_limit() -> None:
    estimators = Estimators()
    assert estimators.output_tokens("t", "chat", 4096) == 4096, "careful until something was learned"
    for _ in range(10):
        estimators.learn_output("t", "chat", 4096, 200)
    assert estimators.output_tokens("t", "chat", 4096) == pytest.approx(250, abs=2)
    assert estimators.output_tokens("t", "chat", 32) == 32, "another limit, another answer"
    assert estimators.output_tokens("t", "extract", 4096) == 4096


def test_prompts_that_begin_alike_are_expected_to_be_cached_alike() -> None:
    estimators = Estimators()
    assert estimators.uncached_tokens("t", "p", 1000) == 1000
    estimators.learn_cached("t", "p", 1000, 0)
    for _ in range(8):
        estimators.learn_cached("t", "p", 1000, 800)
    assert estimators.uncached_tokens("t", "p", 1000) == pytest.approx(200, abs=10)
    assert estimators.uncached_tokens("t", "other", 1000) == 1000
    estimators.learn_cached("t", "whole", 100, 500)
    assert estimators.uncached_tokens("t", "whole", 100) == 5, "something is always computed"


# --- the ledger of one engine


async def test_a_stream_takes_less_and_less_while_it_runs(room: Room) -> None:
    slots = [
        await room.admission.enter(LOCAL, RequestLoad(10, 500), is_residency_bound=False, wait_seconds=0)
        for _ in range(4)
    ]
    for slot in slots:
        slot.mark_first_token()
    full = room.first_byte(RequestLoad(10, 10))
    slots[0].count_tokens(450)
    nearly = room.first_byte(RequestLoad(10, 10))
    assert full == pytest.approx(10.0, abs=0.2) and nearly == pytest.approx(1.0, abs=0.2)
    assert room.admission.inflight(LOCAL.name).output_tokens == 1550
    for slot in slots:
        slot.release()


async def test_whole_answers_are_believed_to_advance_with_time(room: Room) -> None:
    slots = [
        await room.admission.enter(LOCAL, RequestLoad(100, 500), is_residency_bound=False, wait_seconds=0)
        for _ in range(4)
    ]
    before = room.first_byte(RequestLoad(10, 10))
    room.clock.now += 5.0
    room.publish()
    assert room.first_byte(RequestLoad(10, 10)) < before - 4.0
    assert room.admission.inflight(LOCAL.name).prompt_tokens == 0, "their prompts are long computed"
    for slot in slots:
        slot.release()


async def test_pitfall_9_a_gauge_that_is_late_does_not_count_again_what_has_left(room: Room) -> None:
    slots = [
        await room.admission.enter(LOCAL, RequestLoad(1000, 10), is_residency_bound=False, wait_seconds=0)
        for _ in range(3)
    ]
    room.publish(queued_prompt_tokens=3000, kv_used_tokens=3000)
    during = room.first_byte(RequestLoad(10, 10))
    for slot in slots:
        slot.release()
    assert during > 3.0 and room.first_byte(RequestLoad(10, 10)) < 0.1


async def test_pitfall_9_what_a_gauge_shows_beyond_our_ledger_is_somebody_elses(room: Room) -> None:
    slot = await room.admission.enter(LOCAL, RequestLoad(1000, 10), is_residency_bound=False, wait_seconds=0)
    room.publish(queued_prompt_tokens=5000)
    assert room.first_byte(RequestLoad(10, 10)) > 5.0
    slot.release()
    assert 4.0 < room.first_byte(RequestLoad(10, 10)) < 5.0


async def test_predictions_are_corrected_by_what_was_observed_for_each_kind_of_work(room: Room) -> None:
    plain = room.first_byte(RequestLoad(500, 10, kind="chat"))
    for _ in range(30):
        room.estimators.first_byte_correction.learn((LOCAL.name, "chat"), 0.5, 1.0)
    assert room.first_byte(RequestLoad(500, 10, kind="chat")) == pytest.approx(
        2 / LatencyCorrection.FIRST * plain, rel=0.15
    )
    assert room.first_byte(RequestLoad(500, 10, kind="decisions")) == plain


# --- places for bound requests


async def test_places_reserved_for_bound_requests_are_left_free_by_those_who_can_fall_back(room: Room) -> None:
    def load() -> RequestLoad:
        return RequestLoad(10, 400, reserved_share=0.25)

    slots = [
        await room.admission.enter(LOCAL, load(), is_residency_bound=False, wait_seconds=0, budget_seconds=1.0)
        for _ in range(3)
    ]
    with pytest.raises(Busy):
        await room.admission.enter(LOCAL, load(), is_residency_bound=False, wait_seconds=0.01, budget_seconds=1.0)
    slots.append(await room.admission.enter(LOCAL, load(), is_residency_bound=True, wait_seconds=0))
    assert room.admission.inflight(LOCAL.name).sequences == 4
    for slot in slots:
        slot.release()


async def test_without_anywhere_else_to_go_the_reserved_places_are_not_left_empty(room: Room) -> None:
    load = RequestLoad(10, 400, reserved_share=0.25)
    slots = [await room.admission.enter(LOCAL, load, is_residency_bound=False, wait_seconds=0) for _ in range(4)]
    assert room.admission.inflight(LOCAL.name).sequences == 4
    for slot in slots:
        slot.release()


async def test_cells_are_reserved_too(room: Room) -> None:
    room.publish(kv_capacity_tokens=1000)
    unbound = RequestLoad(10, 10, kv_tokens=800, reserved_share=0.25)
    with pytest.raises(Busy):
        first = await room.admission.enter(LOCAL, RequestLoad(10, 300), is_residency_bound=False, wait_seconds=0)
        try:
            await room.admission.enter(LOCAL, unbound, is_residency_bound=False, wait_seconds=0, budget_seconds=0.05)
        finally:
            first.release()


async def test_who_would_come_too_late_is_sent_on_before_its_budget_is_gone(room: Room) -> None:
    """It waits in line; then the engine has more to do than was known, and it is told as soon as a place is free."""
    slots = [
        await room.admission.enter(LOCAL, RequestLoad(10, 25), is_residency_bound=False, wait_seconds=0)
        for _ in range(6)
    ]
    waiting = asyncio.create_task(
        room.admission.enter(LOCAL, RequestLoad(10, 25), is_residency_bound=False, wait_seconds=60, budget_seconds=2.0)
    )
    await settled()
    assert not waiting.done()
    room.publish(queued_prompt_tokens=5000)
    slots.pop().release()
    with pytest.raises(Busy, match="to the first token"):
        await waiting
    for slot in slots:
        slot.release()
    assert room.admission.total == 0


# --- through the whole loop


async def test_a_relayed_stream_shrinks_its_own_entry_and_teaches(stage: Stage) -> None:
    stage.engine.text = "word " * 40
    answer = await stage.ask(stream=True, call={"output_tokens": 400, "prompt_tokens": 30})
    assert answer.stream is not None
    await anext(answer.stream)
    before = stage.admission.inflight(LOCAL.name).output_tokens
    async for _ in answer.stream:
        pass
    assert before < 400
    await answer.aclose()
    for _ in range(3):
        await read_stream(await stage.ask(stream=True, call={"output_tokens": 400, "prompt_tokens": 30}))
    assert stage.stats.estimators.output_tokens(LOCAL.name, "chat", 400) == 50


async def test_a_hosted_target_that_is_slow_to_begin_is_expected_to_be(stage: Stage) -> None:
    hosted = hosted_target()
    assert stage.admission.predict(hosted, RequestLoad(10, 10, stream=True)).first_byte_seconds == 0.0
    stage.stats.estimators.learn_first_byte(hosted.name, True, 3.0)
    assert stage.admission.predict(hosted, RequestLoad(10, 10, stream=True)).first_byte_seconds == 3.0
    assert stage.admission.predict(hosted, RequestLoad(10, 10)).first_byte_seconds == 0.0
