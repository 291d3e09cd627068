"""The loop over attempts, over real sockets: a stand-in engine, a stand-in provider, a ledger that remembers."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from appliance.core import ONSITE, TimeLimits, Usage
from appliance.errors import (
    ApplianceError,
    BackendError,
    BackendOverloaded,
    BackendRefused,
    BackendTimeout,
    BackendUnreachable,
    Busy,
    DeadlineExceeded,
    LedgerUnavailable,
    RejectedReply,
    ResidencyRefused,
    Unavailable,
    UnknownModel,
)
from appliance.pipeline.admission import Load, Slot
from appliance.pipeline.attempt import Patience, Trial
from tests.pipeline.scene import (
    LOCAL_FIRST,
    PRICE,
    Scene,
    call_of,
    caller_of,
    engine_target,
    hosted_target,
    load_of,
    read_stream,
    request_of,
)
from tests.standin import Mood, StandIn

pytestmark = pytest.mark.anyio


class Stage(Scene):
    """A scene with one engine and one provider, both stand-ins."""

    def __init__(self, engine: StandIn, provider: StandIn, policy: str = LOCAL_FIRST, **limits: Any) -> None:
        self.engine, self.provider = engine, provider
        hosted = hosted_target(provider.address, limits=TimeLimits(**{"connect_seconds": 2.0, **limits}))
        super().__init__(engine_target(engine.address), hosted, policy=policy)

    async def fill_engine(self) -> list[Slot]:
        """Take every place that the engine has, with work for many seconds."""
        loads = [Load(2000, 4000), *[Load(10, 10)] * 5]
        return [await self.admission.enter(self.targets[0], load, first=False, wait_seconds=0) for load in loads]


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with StandIn(uds=str(tmp_path / "engine.sock")) as engine, StandIn() as provider:
        made = Stage(engine, provider)
        yield made
        await made.aclose()
        made.check_nothing_is_held()


async def settled() -> None:
    """Let every task run as far as it can."""
    for _ in range(200):
        await asyncio.sleep(0)


def attempts(stage: Scene) -> list[tuple[str, str]]:
    return [(attempt.target, attempt.result) for attempt in stage.ledger.outcomes[-1].attempts]


# --- the straight way


async def test_a_plain_request_is_answered_here_and_written_down(stage: Stage) -> None:
    answer = await stage.ask()
    assert answer.payload["choices"][0]["message"]["content"] == stage.engine.text
    assert (stage.engine.calls, stage.provider.calls) == (1, 0)
    facts = answer.facts
    assert (facts.target, facts.location, facts.route) == ("onsite/tiny", "onsite", "general")
    assert facts.reason == "first choice of route general"
    assert facts.cost_is_final and facts.cost_usd is not None and 0 < facts.cost_usd < 1e-3
    (outcome,) = stage.ledger.outcomes
    assert (outcome.status, outcome.error_code, outcome.residency) == (200, None, "any")
    (attempt,) = outcome.attempts
    assert attempt.usage.completion_tokens == 5 and attempt.reservation is None
    await answer.aclose()
    await answer.aclose()
    assert len(stage.ledger.outcomes) == 1


async def test_a_complex_request_goes_out_and_its_money_is_reserved_first(stage: Stage) -> None:
    answer = await stage.ask("Prove that there are infinitely many primes")
    assert (answer.facts.target, answer.facts.location) == ("cloud/big", "hosted")
    assert answer.facts.reason.startswith("complex:")
    assert stage.ledger.log == ["reserve cloud/big", "settle cloud/big"]
    usage = stage.ledger.outcomes[0].attempts[0].usage
    assert stage.ledger.usd == pytest.approx(PRICE.cost_usd(usage)) == pytest.approx(stage.provider.usd)
    assert answer.facts.cost_usd == pytest.approx(stage.provider.usd)


async def test_explain_is_the_decision_without_the_calls(stage: Stage) -> None:
    decision = stage.pipeline.decide(request_of("Prove it"), prompt_tokens=10, output_tokens=None)
    assert [attempt.target.name for attempt in decision.route.attempts] == ["cloud/big", "onsite/tiny"]
    assert decision.profile.task == "reasoning" and not stage.ledger.outcomes
    refused = stage.pipeline.decide(request_of(model="cloud/big", residency=ONSITE), prompt_tokens=1, output_tokens=1)
    assert not refused.route.attempts and refused.route.excluded
    assert (stage.engine.calls, stage.provider.calls) == (0, 0)


async def test_deciding_and_answering_here_costs_little(stage: Stage) -> None:
    """Guards against a slip by a factor; the figure itself is for a benchmark on an idle machine."""
    request = request_of("What is the capital of France? " * 250)
    loop = asyncio.get_running_loop()
    started = loop.time()
    for _ in range(50):
        stage.pipeline.decide(request, prompt_tokens=2000, output_tokens=16)
    assert (loop.time() - started) / 50 < 3e-3


async def test_an_unknown_model_is_refused_before_anything_happens(stage: Stage) -> None:
    with pytest.raises(UnknownModel):
        await stage.ask(model="gpt-99")
    assert not stage.ledger.outcomes


# --- overflow, fallback, rejection


async def test_a_full_engine_overflows_before_the_first_byte(stage: Stage) -> None:
    slots = await stage.fill_engine()
    answer = await stage.ask()
    assert answer.facts.target == "cloud/big"
    assert answer.facts.reason.startswith("overflow: onsite/tiny would need")
    assert stage.engine.calls == 0
    for slot in slots:
        slot.leave()


async def test_an_engines_own_full_queue_overflows_too(stage: Stage) -> None:
    stage.engine.mood = "overloaded"
    answer = await stage.ask()
    assert attempts(stage) == [("onsite/tiny", "overflowed"), ("cloud/big", "answered")]
    assert answer.facts.reason == "overflow: onsite/tiny engine_busy"


FAILURES: list[Mood] = ["server_error", "rate_limited", "garbage", "not_an_object", "no_choices", "half_body"]
FAILURES += ["hang_up", "error_in_200", "unauthorized", "redirect"]


@pytest.mark.parametrize("mood", FAILURES)
async def test_a_failing_provider_is_not_noticed_where_the_engine_can_answer(stage: Stage, mood: Mood) -> None:
    stage.provider.mood = mood
    answer = await stage.ask("Prove that 2 is prime")
    assert answer.facts.target == "onsite/tiny"
    assert attempts(stage) == [("cloud/big", "failed"), ("onsite/tiny", "answered")]
    assert answer.facts.reason.startswith("fallback: cloud/big backend_")


@pytest.mark.parametrize("mood", FAILURES)
async def test_with_every_target_failing_the_error_says_what_was_tried(stage: Stage, mood: Mood) -> None:
    stage.provider.mood = mood
    stage.engine.mood = "server_error"
    with pytest.raises(BackendError) as caught:
        await stage.ask("Prove that 2 is prime")
    error = caught.value
    assert "tried cloud/big: backend_" in error.message and "onsite/tiny: backend_error" in error.message
    assert error.headers["x-appliance-decision"] == stage.ledger.outcomes[0].decision_id
    assert error.headers["x-appliance-target"] == "none"
    assert stage.ledger.outcomes[0].status == error.status


async def test_pitfall_13_a_request_that_is_wrong_is_not_sent_out(stage: Stage) -> None:
    stage.engine.mood = "bad_request"
    with pytest.raises(BackendRefused) as caught:
        await stage.ask()
    assert (caught.value.status, caught.value.code) == (400, "invalid_value")
    assert caught.value.message == "temperature must be at most 2"
    assert stage.provider.calls == 0
    assert stage.ledger.outcomes[0].attempts[0].result == "refused"


async def test_an_answer_that_does_not_pass_is_asked_for_elsewhere(stage: Stage) -> None:
    request = request_of()
    answer = await stage.pipeline.answer(request, call_of(request, rejects=("onsite/tiny",)))
    assert answer.facts.reason == "rejected: onsite/tiny reply_rejected"
    assert attempts(stage) == [("onsite/tiny", "rejected"), ("cloud/big", "answered")]


async def test_answers_that_pass_nowhere_are_an_error(stage: Stage) -> None:
    request = request_of()
    with pytest.raises(RejectedReply):
        await stage.pipeline.answer(request, call_of(request, rejects=("onsite/tiny", "cloud/big")))
    rejected = stage.ledger.outcomes[0].attempts[1]
    assert rejected.cost_usd == pytest.approx(stage.provider.usd), "a rejected answer is billed all the same"


async def test_an_engine_that_dies_while_it_answers_is_replaced_and_doubted(stage: Stage) -> None:
    stage.engine.mood = "hang"
    asking = asyncio.create_task(stage.ask())
    await stage.engine.called.wait()
    await stage.engine.stop()
    answer = await asking
    assert attempts(stage) == [("onsite/tiny", "failed"), ("cloud/big", "answered")]
    assert answer.facts.target == "cloud/big"
    assert not stage.admission.predict(stage.targets[0], Load(1, 1)).ready, "until a newer view says so"


async def test_a_bound_request_whose_engine_dies_gets_a_clear_error(stage: Stage) -> None:
    stage.engine.mood = "hang"
    asking = asyncio.create_task(stage.ask(residency=ONSITE))
    await stage.engine.called.wait()
    await stage.engine.stop()
    with pytest.raises(BackendUnreachable, match="onsite/tiny closed the connection"):
        await asking
    assert stage.provider.calls == 0


# --- residency


@pytest.mark.parametrize("mood", ["server_error", "overloaded", "garbage", "half_body", "hang_up", "bad_request"])
@pytest.mark.parametrize("stream", [False, True])
async def test_pitfall_6_a_bound_request_never_leaves_whatever_fails(stage: Stage, mood: Mood, stream: bool) -> None:
    stage.engine.mood = "error_event_first" if stream and mood == "half_body" else mood
    bounds: list[dict[str, Any]] = [{"residency": ONSITE}, {"caller": caller_of(residency=ONSITE)}]
    for fields in bounds:
        with pytest.raises(ApplianceError):
            await stage.ask("Prove that 2 is prime", stream=stream, **fields)
    assert stage.provider.calls == 0 and not stage.ledger.reserved


async def test_pitfall_6_a_bound_request_never_leaves_even_when_local_is_down(stage: Stage) -> None:
    stage.publish(state="failed", reason="exit code 1")
    policy = LOCAL_FIRST.replace("max_wait_seconds = 5.0", "max_wait_seconds = 0.05")
    stage.reload(policy)
    with pytest.raises(Unavailable, match="exit code 1") as caught:
        await stage.ask(residency=ONSITE)
    assert caught.value.retry_after_seconds
    assert stage.provider.calls == 0 and "onsite/tiny" in stage.state.demand


async def test_pitfall_6_a_bound_request_waits_while_others_overflow_and_then_is_told_when_to_come_back(
    stage: Stage,
) -> None:
    stage.reload(LOCAL_FIRST.replace("max_wait_seconds = 5.0", "max_wait_seconds = 0.05"))
    slots = await stage.fill_engine()
    assert (await stage.ask()).facts.target == "cloud/big"
    with pytest.raises(Busy) as caught:
        await stage.ask(residency=ONSITE)
    assert caught.value.status == 429 and (caught.value.retry_after_seconds or 0) >= 1
    assert stage.provider.calls == 1
    for slot in slots:
        slot.leave()


async def test_a_bound_request_that_waits_is_answered_here_when_a_place_is_free(stage: Stage) -> None:
    slots = await stage.fill_engine()
    asking = asyncio.create_task(stage.ask(residency=ONSITE))
    await settled()
    assert stage.admission.inflight("onsite/tiny").waiting == 1
    for slot in slots:
        slot.leave()
    assert (await asking).facts.target == "onsite/tiny"
    assert stage.provider.calls == 0


async def test_pitfall_6_a_reload_in_mid_burst_lets_no_bound_request_out(stage: Stage) -> None:
    """Twenty bound requests, some through an engine that fails, under policies that would rather send them out."""
    outward = '[[routes]]\nname = "out"\ntargets = ["hosted", "onsite"]\nresidency = "any"\n'
    stage.engine.moods = ["server_error", "well", "overloaded", "half_body", "well"] * 4

    async def ask(index: int) -> None:
        try:
            await stage.ask("Prove it", residency=ONSITE, stream=False)
        except ApplianceError:
            stage.publish()

    async with asyncio.TaskGroup() as group:
        for index in range(20):
            group.create_task(ask(index))
            if index % 5 == 0:
                stage.reload(outward if index % 2 else LOCAL_FIRST)
            await asyncio.sleep(0)
    assert stage.provider.calls == 0 and not stage.ledger.reserved
    assert {outcome.residency for outcome in stage.ledger.outcomes} == {"onsite"}
    assert len(stage.ledger.outcomes) == 20


async def test_a_pinned_hosted_model_is_refused_to_a_bound_request_and_written_down(stage: Stage) -> None:
    with pytest.raises(ResidencyRefused) as caught:
        await stage.ask(model="cloud/big", residency=ONSITE)
    assert caught.value.headers["x-appliance-route"] == "general"
    (outcome,) = stage.ledger.outcomes
    assert (outcome.status, outcome.error_code, outcome.attempts) == (403, "residency_bound", ())


async def test_a_pinned_local_model_is_not_replaced_when_it_fails(stage: Stage) -> None:
    stage.engine.mood = "server_error"
    with pytest.raises(BackendError):
        await stage.ask(model="tiny")
    assert stage.provider.calls == 0


# --- money


async def test_pitfall_5_money_is_reserved_before_the_call_and_always_settled(stage: Stage) -> None:
    stage.ledger.is_full = True
    answer = await stage.ask("Prove that 2 is prime")
    assert answer.facts.target == "onsite/tiny" and stage.provider.calls == 0, "what cannot be recorded is not spent"
    with pytest.raises(LedgerUnavailable):
        await stage.ask(model="cloud/big")
    assert stage.provider.calls == 0


@pytest.mark.parametrize(
    ("mood", "costs"),
    [("server_error", False), ("rate_limited", False), ("garbage", True), ("half_body", True), ("no_usage", True)],
)
async def test_pitfall_4_every_attempt_keeps_its_own_cost(stage: Stage, mood: Mood, costs: bool) -> None:
    stage.provider.mood = mood
    await stage.ask("Prove that 2 is prime")
    first = stage.ledger.outcomes[0].attempts[0]
    (_, reserved), (settled,) = next(iter(stage.ledger.reserved.values())), stage.ledger.settled.values()
    assert first.cost_usd == settled == (reserved if costs else 0.0), "unknown is not free"


async def test_pitfall_5_a_cancelled_call_settles_its_reservation(stage: Stage) -> None:
    stage.provider.mood = "hang"
    asking = asyncio.create_task(stage.ask(model="cloud/big"))
    await stage.provider.called.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.wait_for(stage.provider.caller_left.wait(), 5)
    (outcome,) = stage.ledger.outcomes
    assert (outcome.status, outcome.error_code) == (499, "client_closed_request")
    assert outcome.attempts[0].result == "cancelled"
    assert stage.ledger.usd == outcome.attempts[0].cost_usd != 0.0


async def test_the_ledger_and_the_provider_count_the_same(stage: Stage) -> None:
    stage.provider.moods = ["well", "server_error", "well", "rate_limited"]
    for index in range(8):
        answer = await stage.ask(f"Prove lemma {index}", stream=index % 2 == 0)
        if answer.stream is not None:
            await read_stream(answer)
    assert stage.ledger.usd == pytest.approx(stage.provider.usd)


# --- one budget of time and attempts


async def test_pitfall_2_one_number_of_attempts_for_the_whole_chain(stage: Stage) -> None:
    targets = [hosted_target(stage.provider.address, f"cloud/m{index}") for index in range(6)]
    scene = Scene(*targets, policy='[defaults]\nmax_attempts = 3\n[[routes]]\nname = "r"\ntargets = ["hosted"]\n')
    stage.provider.mood = "server_error"
    with pytest.raises(BackendError):
        await scene.ask()
    assert stage.provider.calls == 3
    await scene.aclose()
    scene.check_nothing_is_held()


async def test_pitfall_2_a_target_that_keeps_failing_is_left_alone(stage: Stage) -> None:
    stage.provider.mood = "server_error"
    for _ in range(10):
        assert (await stage.ask("Prove that 2 is prime")).facts.target == "onsite/tiny"
    assert stage.provider.calls == 3, "the breaker opened"
    with pytest.raises(Unavailable, match="keeps failing") as caught:
        await stage.ask(model="cloud/big")
    assert caught.value.retry_after_seconds


async def test_pitfall_2_a_burst_sends_one_probe_to_a_target_that_may_be_well_again(stage: Stage) -> None:
    for _ in range(3):
        stage.breakers.fail("cloud/big", stage.now() - 6.0, None)
    stage.provider.mood = "hang"
    asking = [asyncio.create_task(stage.ask("Prove that 2 is prime")) for _ in range(5)]
    await stage.provider.called.wait()
    done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    stage.provider.hold.set()
    answers = await asyncio.gather(*asking)
    assert stage.provider.calls == 1 and done
    assert sorted(answer.facts.target or "" for answer in answers) == ["cloud/big"] + ["onsite/tiny"] * 4


async def test_pitfall_2_who_is_turned_away_by_a_breaker_does_not_free_the_probe_of_another(stage: Stage) -> None:
    for _ in range(3):
        stage.breakers.fail("cloud/big", stage.now() - 6.0, None)
    request = request_of(model="cloud/big")
    decision = stage.pipeline.decide(request, prompt_tokens=1, output_tokens=1)
    (attempt,) = decision.route.attempts
    stage.breakers.start("cloud/big", stage.now())
    trial = Trial(stage.pipeline._means, request, decision, 0, attempt)
    with pytest.raises(Unavailable, match="keeps failing"):
        await trial.run(call_of(request), Patience(1.0, 0.0, None, first=False))
    assert stage.breakers.blocked_until("cloud/big", stage.now()) is not None
    stage.breakers.release("cloud/big")
    assert stage.breakers.blocked_until("cloud/big", stage.now()) is None


async def test_pitfall_2_a_retry_after_of_a_year_does_not_shut_a_target_out_for_a_year(stage: Stage) -> None:
    stage.provider.mood, stage.provider.retry_after = "rate_limited", "31536000"
    with pytest.raises(BackendOverloaded) as caught:
        await stage.ask(model="cloud/big")
    assert caught.value.retry_after_seconds == 300.0
    until = stage.breakers.blocked_until("cloud/big", stage.now())
    assert until is not None and until - stage.now() <= 300.0


async def test_pitfall_3_one_deadline_for_the_whole_chain(stage: Stage) -> None:
    stage.reload(LOCAL_FIRST.replace("total_seconds = 20.0", "total_seconds = 0.2"))
    stage.engine.mood = stage.provider.mood = "hang"
    started = stage.now()
    with pytest.raises((BackendTimeout, DeadlineExceeded)):
        await stage.ask("Prove that 2 is prime")
    assert stage.now() - started < 2.0


async def test_a_provider_that_hangs_is_given_up_and_the_engine_answers(tmp_path: Path) -> None:
    async with StandIn(uds=str(tmp_path / "e.sock")) as engine, StandIn(mood="hang") as provider:
        stage = Stage(engine, provider, first_byte_seconds=0.05)
        request = request_of("Prove that 2 is prime")
        answer = await stage.pipeline.answer(request, call_of(request, output_tokens=1))
        assert answer.facts.reason == "fallback: cloud/big backend_timeout"
        await stage.aclose()
        stage.check_nothing_is_held()


# --- streams


async def test_a_stream_is_relayed_and_written_down_when_it_ends(stage: Stage) -> None:
    answer = await stage.ask(stream=True)
    assert not answer.facts.cost_is_final and not stage.ledger.outcomes
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
    assert answer.facts.target == "onsite/tiny"
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
    stage.publish(load=load_of(sequences_capacity=20))
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
    assert many.facts.target == "onsite/tiny" and many.facts.decision_id == request.decision_id


async def test_results_of_many_calls_stand_in_the_calls_order(stage: Stage) -> None:
    stage.engine.reply = lambda path, body: {"choices": [{"message": body["messages"][0]["content"]}]}
    request = request_of()
    calls = [call_of(request, body={"messages": [{"content": str(index)}]}) for index in range(30)]
    many = await stage.pipeline.answer_many(request, calls, concurrency=8)
    assert [result["choices"][0]["message"] for result in many.results] == [str(index) for index in range(30)]


async def test_many_bound_calls_wait_their_turn_and_never_leave(stage: Stage) -> None:
    stage.publish(load=load_of(sequences_capacity=1))
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
    assert answer.facts.target == "onsite/tiny"
    first = stage.ledger.outcomes[0].attempts[0]
    assert first.result == "failed" and first.usage == Usage() and (first.cost_usd or 0) >= stage.provider.usd


async def test_models_are_those_the_key_may_be_answered_by(stage: Stage) -> None:
    assert [target.name for target in stage.pipeline.models(caller_of())] == ["onsite/tiny", "cloud/big"]
    assert [target.name for target in stage.pipeline.models(caller_of(residency=ONSITE))] == ["onsite/tiny"]


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
        return answer.facts.location or ""

    places = await asyncio.gather(*(ask(index) for index in range(100)))
    assert len(stage.ledger.outcomes) == 100
    assert all(place != "hosted" for place in places[::10])
