"""The loop over attempts, over real sockets: a stand-in engine, a stand-in provider, a ledger that remembers."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from appliance.core import ONSITE
from appliance.errors import (
    ApplianceError,
    BackendError,
    BackendOverloaded,
    BackendRefused,
    BackendTimeout,
    BackendUnreachable,
    Busy,
    DeadlineExceeded,
    Forbidden,
    LedgerUnavailable,
    RejectedReply,
    ResidencyRefused,
    Unavailable,
    UnknownModel,
)
from appliance.router.attempts.runner import AttemptContext, AttemptRunner
from appliance.router.capacity.request_load import RequestLoad
from appliance.router.limits import AttemptTimeouts, RequestBudget
from tests.router.scene import (
    LOCAL_FIRST,
    PRICE,
    Scene,
    call_of,
    caller_of,
    hosted_target,
    read_stream,
    request_of,
)
from tests.router.stage import Stage, attempts, settled
from tests.standin import Mood, StandIn

pytestmark = pytest.mark.anyio


# --- the straight way


async def test_a_plain_request_is_answered_here_and_written_down(stage: Stage) -> None:
    answer = await stage.ask()
    assert answer.payload["choices"][0]["message"]["content"] == stage.engine.text
    assert (stage.engine.calls, stage.provider.calls) == (1, 0)
    metadata = answer.metadata
    assert (metadata.target, metadata.location, metadata.route) == ("onsite/tiny", "onsite", "general")
    assert metadata.reason == "first choice of route general"
    assert metadata.cost_is_final and metadata.cost_usd is not None and 0 < metadata.cost_usd < 1e-3
    (outcome,) = stage.ledger.outcomes
    assert (outcome.status, outcome.error_code, outcome.residency) == (200, None, "any")
    (attempt,) = outcome.attempts
    assert attempt.usage.completion_tokens == 5 and attempt.reservation is None
    await answer.aclose()
    await answer.aclose()
    assert len(stage.ledger.outcomes) == 1


async def test_a_complex_request_goes_out_and_its_money_is_reserved_first(stage: Stage) -> None:
    answer = await stage.ask("Prove that there are infinitely many primes")
    assert (answer.metadata.target, answer.metadata.location) == ("cloud/big", "hosted")
    assert answer.metadata.reason.startswith("complex:")
    assert stage.ledger.log == ["reserve cloud/big", "settle cloud/big"]
    usage = stage.ledger.outcomes[0].attempts[0].usage
    assert stage.ledger.usd == pytest.approx(PRICE.cost_usd(usage)) == pytest.approx(stage.provider.usd)
    assert answer.metadata.cost_usd == pytest.approx(stage.provider.usd)


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
    with pytest.raises(UnknownModel) as caught:
        await stage.ask(model="gpt-99")
    assert (stage.engine.calls, stage.provider.calls) == (0, 0)
    (outcome,) = stage.ledger.outcomes
    assert (outcome.status, outcome.error_code, outcome.route) == (404, "model_not_found", "general")
    assert caught.value.headers["x-appliance-decision"] == outcome.decision_id


async def test_a_key_without_a_route_is_refused_and_written_down_with_its_headers(stage: Stage) -> None:
    with pytest.raises(Forbidden, match="may use complex") as caught:
        await stage.ask(caller=caller_of(routes=frozenset({"complex"})))
    assert caught.value.headers["x-appliance-route"] == "none"
    (outcome,) = stage.ledger.outcomes
    assert (outcome.status, outcome.error_code, outcome.route) == (403, "forbidden", "none")


# --- overflow, fallback, rejection


async def test_a_full_engine_overflows_before_the_first_byte(stage: Stage) -> None:
    slots = await stage.fill_engine()
    answer = await stage.ask()
    assert answer.metadata.target == "cloud/big"
    assert answer.metadata.reason.startswith("overflow: onsite/tiny would need")
    assert stage.engine.calls == 0
    for slot in slots:
        slot.release()


async def test_an_engines_own_full_queue_overflows_too(stage: Stage) -> None:
    stage.engine.mood = "overloaded"
    answer = await stage.ask()
    assert attempts(stage) == [("onsite/tiny", "overflowed"), ("cloud/big", "answered")]
    assert answer.metadata.reason == "overflow: onsite/tiny engine_busy"


FAILURES: list[Mood] = ["server_error", "rate_limited", "garbage", "not_an_object", "no_choices", "half_body"]
FAILURES += ["hang_up", "error_in_200", "unauthorized", "redirect"]


@pytest.mark.parametrize("mood", FAILURES)
async def test_a_failing_provider_is_not_noticed_where_the_engine_can_answer(stage: Stage, mood: Mood) -> None:
    stage.provider.mood = mood
    answer = await stage.ask("Prove that 2 is prime")
    assert answer.metadata.target == "onsite/tiny"
    assert attempts(stage) == [("cloud/big", "failed"), ("onsite/tiny", "answered")]
    assert answer.metadata.reason.startswith("fallback: cloud/big backend_")


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
    assert answer.metadata.reason == "rejected: onsite/tiny reply_rejected"
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
    assert answer.metadata.target == "cloud/big"
    assert not stage.admission.predict(stage.targets[0], RequestLoad(1, 1)).ready, "until a newer view says so"


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
    assert (await stage.ask()).metadata.target == "cloud/big"
    with pytest.raises(Busy) as caught:
        await stage.ask(residency=ONSITE)
    assert caught.value.status == 429 and (caught.value.retry_after_seconds or 0) >= 1
    assert stage.provider.calls == 1
    for slot in slots:
        slot.release()


async def test_a_bound_request_that_waits_is_answered_here_when_a_place_is_free(stage: Stage) -> None:
    slots = await stage.fill_engine()
    asking = asyncio.create_task(stage.ask(residency=ONSITE))
    await settled()
    assert stage.admission.inflight("onsite/tiny").waiting == 1
    for slot in slots:
        slot.release()
    assert (await asking).metadata.target == "onsite/tiny"
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
    assert answer.metadata.target == "onsite/tiny" and stage.provider.calls == 0, "what cannot be recorded is not spent"
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
        assert (await stage.ask("Prove that 2 is prime")).metadata.target == "onsite/tiny"
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
    assert sorted(answer.metadata.target or "" for answer in answers) == ["cloud/big"] + ["onsite/tiny"] * 4


async def test_pitfall_2_who_is_turned_away_by_a_breaker_does_not_free_the_probe_of_another(stage: Stage) -> None:
    for _ in range(3):
        stage.breakers.fail("cloud/big", stage.now() - 6.0, None)
    request = request_of(model="cloud/big")
    decision = stage.pipeline.decide(request, prompt_tokens=1, output_tokens=1)
    (attempt,) = decision.route.attempts
    stage.breakers.start("cloud/big", stage.now())
    trial = AttemptRunner(stage.pipeline._deps, AttemptContext(request, decision, RequestBudget(None), 0), 0, attempt)
    with pytest.raises(Unavailable, match="keeps failing"):
        await trial.run(call_of(request), AttemptTimeouts(1.0, 0.0, None, is_residency_bound=False))
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
    stage.reload(LOCAL_FIRST.replace("20.0", "0.2").replace("budget_seconds = 2.0", "budget_seconds = 0.1"))
    stage.engine.mood = stage.provider.mood = "hang"
    started = stage.now()
    with pytest.raises((BackendTimeout, DeadlineExceeded)):
        await stage.ask("Prove that 2 is prime")
    assert stage.now() - started < 2.0


async def test_a_provider_that_hangs_is_given_up_and_the_engine_answers(tmp_path: Path) -> None:
    async with StandIn(uds=str(tmp_path / "e.sock")) as engine, StandIn(mood="hang") as provider:
        stage = Stage(engine, provider, first_byte_seconds=0.05)
        request = request_of("Prove that 2 is prime")
        limited = {**request.body, "max_tokens": 1}
        answer = await stage.pipeline.answer(request, call_of(request, body=limited, output_tokens=1))
        assert answer.metadata.reason == "fallback: cloud/big backend_timeout"
        await stage.aclose()
        stage.check_nothing_is_held()
