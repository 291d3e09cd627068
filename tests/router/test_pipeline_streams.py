"""Streams and bulk work through the loop over attempts, over real sockets."""

import asyncio
from typing import Any

import pytest

from appliance.core import ONSITE, Usage
from appliance.errors import (
    ApplianceError,
    BackendRefused,
)
from tests.router.scene import (
    call_of,
    caller_of,
    make_request_load,
    read_stream,
    request_of,
)
from tests.router.stage import Stage, attempts, settled
from tests.standin import Mood

pytestmark = pytest.mark.anyio


# --- streams


async def test_a_stream_is_relayed_and_written_down_when_it_ends(stage: Stage) -> None:
    answer = await stage.ask(stream=True)
    assert not answer.metadata.cost_is_final and not stage.ledger.outcomes
    got = await read_stream(answer)
    assert got.endswith(b"data: [DONE]\n\n") and b"forty" in got
    (outcome,) = stage.ledger.outcomes
    assert (outcome.status, outcome.stream) == (200, True)
    assert outcome.attempts[0].usage.completion_tokens == 5
    assert outcome.first_byte_seconds is not None and outcome.first_byte_seconds <= outcome.total_seconds


@pytest.mark.parametrize("mood", ["server_error", "error_event_first", "garbage", "rate_limited"])
async def test_pitfall_1_before_the_first_event_another_target_takes_over(stage: Stage, mood: Mood) -> None:
    stage.provider.mood = mood
    answer = await stage.ask("Prove that 2 is prime", stream=True)
    assert answer.metadata.target == "onsite/tiny"
    got = await read_stream(answer)
    assert got.count(b"[DONE]") == 1 and got.count(b"forty") == 1
    assert attempts(stage) == [("cloud/big", "failed"), ("onsite/tiny", "answered")]


@pytest.mark.parametrize("mood", ["half_stream", "error_event_later"])
async def test_pitfall_1_after_the_first_event_a_break_is_an_error_event_and_no_second_answer(
    stage: Stage, mood: Mood
) -> None:
    stage.engine.mood, stage.engine.seconds_per_token = mood, 0.005
    got = await read_stream(await stage.ask(stream=True))
    assert b"[DONE]" not in got and got.rstrip().endswith(b'"code":"stream_broken"}}')
    assert stage.provider.calls == 0
    (outcome,) = stage.ledger.outcomes
    assert outcome.error_code == "stream_broken" and outcome.attempts[0].result == "failed"


async def test_a_stream_that_is_never_started_gives_everything_back(stage: Stage) -> None:
    answer = await stage.ask("Prove that 2 is prime", stream=True)
    assert stage.admission.inflight("cloud/big").sequences == 1
    await answer.aclose()
    await answer.aclose()
    assert stage.admission.total == 0
    (outcome,) = stage.ledger.outcomes
    assert outcome.attempts[0].result == "cancelled" and outcome.error_code == "client_closed_request"
    assert stage.ledger.usd > 0


async def test_a_stream_that_is_abandoned_cancels_the_work_upstream(stage: Stage) -> None:
    stage.provider.mood = "silent_stream"
    answer = await stage.ask("Prove that 2 is prime", stream=True)
    assert answer.stream is not None
    assert await anext(answer.stream)
    await answer.aclose()
    assert stage.admission.total == 0
    await asyncio.wait_for(stage.provider.caller_left.wait(), 5)
    with pytest.raises(StopAsyncIteration):
        await anext(answer.stream)


async def test_a_caller_that_leaves_while_the_next_event_is_awaited_holds_nothing(stage: Stage) -> None:
    stage.engine.mood = "silent_stream"
    answer = await stage.ask(stream=True)

    async def relay() -> None:
        try:
            await read_stream(answer)
        finally:
            await answer.aclose()

    relaying = asyncio.create_task(relay())
    await settled()
    assert not relaying.done() and stage.engine.open_streams == 1
    relaying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await relaying
    await asyncio.wait_for(stage.engine.caller_left.wait(), 5)
    assert stage.ledger.outcomes[0].status == 499


async def test_twenty_streams_survive_the_death_of_their_engine_with_clear_errors(stage: Stage) -> None:
    stage.publish(load=make_request_load(sequences_capacity=20))
    stage.engine.mood = "silent_stream"
    answers = [await stage.ask(stream=True, residency=ONSITE) for _ in range(20)]
    reading = [asyncio.create_task(read_stream(answer)) for answer in answers]
    await asyncio.sleep(0)
    await stage.engine.stop()
    for got in await asyncio.gather(*reading):
        assert b"stream_broken" in got and b"[DONE]" not in got
    assert len(stage.ledger.outcomes) == 20 and stage.admission.total == 0


# --- many


async def test_many_calls_share_one_decision_and_fail_alone(stage: Stage) -> None:
    request = request_of()
    calls = [call_of(request, body={"messages": [{"content": str(index)}]}) for index in range(200)]
    stage.engine.moods = ["well", "well", "bad_request"]
    many = await stage.pipeline.answer_many(request, calls, concurrency=4)
    failed = [result for result in many.results if isinstance(result, ApplianceError)]
    assert len(many.results) == 200 and len(failed) == 1 and isinstance(failed[0], BackendRefused)
    assert stage.engine.calls == 200 and stage.provider.calls == 0
    (outcome,) = stage.ledger.outcomes
    assert outcome.status == 200
    assert sorted((attempt.target, attempt.result) for attempt in outcome.attempts) == [
        ("onsite/tiny", "answered"),
        ("onsite/tiny", "refused"),
    ]
    assert sum(attempt.usage.completion_tokens for attempt in outcome.attempts) == 199 * 5
    assert many.metadata.target == "onsite/tiny" and many.metadata.decision_id == request.decision_id


async def test_results_of_many_calls_stand_in_the_calls_order(stage: Stage) -> None:
    stage.engine.reply = lambda path, body: {"choices": [{"message": body["messages"][0]["content"]}]}
    request = request_of()
    calls = [call_of(request, body={"messages": [{"content": str(index)}]}) for index in range(30)]
    many = await stage.pipeline.answer_many(request, calls, concurrency=8)
    assert [result.payload["choices"][0]["message"] for result in many.results] == [str(index) for index in range(30)]


async def test_many_bound_calls_wait_their_turn_and_never_leave(stage: Stage) -> None:
    stage.publish(load=make_request_load(sequences_capacity=1))
    request = request_of(residency=ONSITE)
    many = await stage.pipeline.answer_many(request, [call_of(request)] * 40, concurrency=16)
    assert not [result for result in many.results if isinstance(result, ApplianceError)]
    assert stage.provider.calls == 0 and stage.engine.calls == 40


async def test_many_calls_that_all_fail_are_recorded_as_failed(stage: Stage) -> None:
    stage.engine.mood = "bad_request"
    request = request_of()
    many = await stage.pipeline.answer_many(request, [call_of(request)] * 3, concurrency=2)
    assert all(isinstance(result, BackendRefused) for result in many.results)
    assert stage.ledger.outcomes[0].status == 400


async def test_one_piece_of_work_may_be_many_calls_under_one_reservation(stage: Stage) -> None:
    request = request_of("Prove it")
    answer = await stage.pipeline.answer(request, call_of(request, calls=20))
    assert len(answer.payload) == 20 and stage.provider.calls == 20
    assert len(stage.ledger.reserved) == 1 and stage.ledger.usd == pytest.approx(stage.provider.usd)


async def test_one_of_many_calls_failing_fails_the_attempt_and_counts_its_cost(stage: Stage) -> None:
    stage.provider.moods = ["well", "well", "server_error"]
    request = request_of("Prove it")
    answer = await stage.pipeline.answer(request, call_of(request, calls=3))
    assert answer.metadata.target == "onsite/tiny"
    first = stage.ledger.outcomes[0].attempts[0]
    assert first.result == "failed" and first.usage == Usage() and (first.cost_usd or 0) >= stage.provider.usd


async def test_models_are_those_the_key_may_be_answered_by(stage: Stage) -> None:
    assert [target.name for target in stage.pipeline.list_models(caller_of())] == ["onsite/tiny", "cloud/big"]
    assert [target.name for target in stage.pipeline.list_models(caller_of(residency=ONSITE))] == ["onsite/tiny"]


async def test_a_hundred_mixed_requests_at_once_leave_nothing_behind(stage: Stage) -> None:
    stage.engine.moods = ["well", "server_error", "overloaded"] * 10
    stage.provider.moods = ["well", "rate_limited", "half_body"] * 5

    async def ask(index: int) -> str:
        fields: dict[str, Any] = {"residency": ONSITE} if index % 10 == 0 else {}
        try:
            answer = await stage.ask(f"hello {index}", stream=index % 2 == 0, **fields)
        except ApplianceError as error:
            return error.code
        if answer.stream is not None and index % 4:
            await read_stream(answer)
        await answer.aclose()
        return answer.metadata.location or ""

    places = await asyncio.gather(*(ask(index) for index in range(100)))
    assert len(stage.ledger.outcomes) == 100
    assert all(place != "hosted" for place in places[::10])
