"""Retries, breakers, ceilings and clocks, over real sockets: one budget for the whole chain."""

import asyncio
from pathlib import Path

import pytest

from appliance.core import ONSITE, TimeLimits, Usage
from appliance.errors import (
    ApplianceError,
    BackendError,
    BackendGarbage,
    BackendOverloaded,
    BackendRefused,
    BackendUnreachable,
    BudgetExceeded,
    RejectedReply,
)
from tests.router.scene import LOCAL_FIRST, PRICE, Scene, call_of, engine_target, hosted_target, request_of
from tests.router.stage import Stage, attempts
from tests.standin import Mood, StandIn

pytestmark = pytest.mark.anyio

ONLY_HOSTED = '[[routes]]\nname = "out"\ntargets = ["hosted"]\n'


# --- the same target again


async def test_the_only_target_is_asked_again_after_a_failure_that_passes(stage: Stage) -> None:
    stage.engine.moods = ["server_error"]
    answer = await stage.ask(residency=ONSITE)
    assert answer.metadata.reason == "retry: onsite/tiny backend_error"
    assert attempts(stage) == [("onsite/tiny", "failed"), ("onsite/tiny", "answered")]
    assert stage.pauses == [pytest.approx(0.1)]


async def test_every_attempt_says_its_cause_in_one_word(stage: Stage) -> None:
    stage.engine.moods = ["server_error"]
    stage.provider.moods = ["server_error"]
    await stage.ask()
    slots = await stage.fill_engine()
    await stage.ask()
    for slot in slots:
        slot.release()
    causes = [[attempt.cause for attempt in outcome.attempts] for outcome in stage.ledger.outcomes]
    assert causes == [["first", "fallback", "retry"], ["overflow"]]


async def test_pauses_double_and_are_spread(stage: Stage) -> None:
    stage.reload("[defaults]\nmax_attempts = 4\n" + LOCAL_FIRST.partition("[[routes]]")[2].join(["[[routes]]", ""]))
    stage.engine.mood = "server_error"
    with pytest.raises(BackendError, match="tried onsite/tiny: backend_error; onsite/tiny: backend_error"):
        await stage.ask(residency=ONSITE)
    assert stage.engine.calls == 4 and stage.pauses == [pytest.approx(each) for each in (0.1, 0.2, 0.4)]


async def test_another_target_comes_before_the_same_one_again(stage: Stage) -> None:
    stage.engine.moods = ["server_error"]
    stage.provider.moods = ["server_error"]
    await stage.ask()
    assert attempts(stage) == [("onsite/tiny", "failed"), ("cloud/big", "failed"), ("onsite/tiny", "answered")]
    assert len(stage.pauses) == 1


@pytest.mark.parametrize("mood", ["garbage", "half_body", "hang_up"])
async def test_pitfall_4_what_may_have_been_billed_is_not_asked_for_twice(stage: Stage, mood: Mood) -> None:
    stage.reload(ONLY_HOSTED)
    stage.provider.mood = mood
    with pytest.raises(BackendError):
        await stage.ask()
    assert stage.provider.calls == 1 and not stage.pauses


async def test_a_route_may_allow_to_pay_twice(stage: Stage) -> None:
    stage.reload(ONLY_HOSTED + "retry_billed = true\n")
    stage.provider.moods = ["garbage"]
    assert (await stage.ask()).metadata.reason == "retry: cloud/big backend_garbage"
    assert len(stage.ledger.settled) == 2, "each attempt on its own account"


@pytest.mark.parametrize("mood", ["unknown_model", "too_large"])
async def test_a_target_that_cannot_answer_the_request_is_followed_by_another(stage: Stage, mood: Mood) -> None:
    stage.provider.mood = mood
    answer = await stage.ask("Prove that 2 is prime")
    assert answer.metadata.target == "onsite/tiny" and answer.metadata.reason.startswith("fallback: cloud/big ")
    assert stage.provider.calls == 1
    assert attempts(stage) == [("cloud/big", "refused"), ("onsite/tiny", "answered")]
    assert stage.ledger.outcomes[-1].attempts[0].cost_usd == 0.0


async def test_a_request_that_is_wrong_is_sent_nowhere_else(stage: Stage) -> None:
    stage.provider.mood = "bad_request"
    with pytest.raises(BackendRefused):
        await stage.ask("Prove that 2 is prime")
    assert stage.engine.calls == 0


async def test_an_unknown_model_opens_the_breaker_and_a_body_that_is_too_large_does_not(stage: Stage) -> None:
    stage.provider.mood = "too_large"
    for _ in range(10):
        await stage.ask("Prove that 2 is prime")
    assert stage.breakers.blocked_until("cloud/big", stage.now()) is None
    stage.provider.mood = "unknown_model"
    for _ in range(10):
        await stage.ask("Prove that 2 is prime")
    assert stage.breakers.blocked_until("cloud/big", stage.now()) is not None
    assert stage.provider.calls < 20


@pytest.mark.parametrize("mood", ["unauthorized", "bad_request", "unknown_model", "too_large"])
async def test_what_would_fail_again_is_not_tried_again(stage: Stage, mood: Mood) -> None:
    stage.reload(ONLY_HOSTED)
    stage.provider.mood = mood
    with pytest.raises(ApplianceError):
        await stage.ask()
    assert stage.provider.calls == 1


async def test_a_rejected_answer_is_not_asked_for_again_where_it_was_rejected(stage: Stage) -> None:
    request = request_of(residency=ONSITE)
    with pytest.raises(RejectedReply):
        await stage.pipeline.answer(request, call_of(request, rejects=("onsite/tiny",)))
    assert stage.engine.calls == 1


async def test_a_retry_waits_as_long_as_it_was_asked_to_or_is_left(stage: Stage) -> None:
    stage.engine.moods, stage.engine.retry_after = ["overloaded"], "3"
    assert (await stage.ask(residency=ONSITE)).metadata.reason == "retry: onsite/tiny engine_busy"
    assert stage.pauses == [3.0]
    stage.engine.moods, stage.engine.retry_after = ["overloaded"], "30"
    with pytest.raises(ApplianceError):
        await stage.ask(residency=ONSITE)
    assert stage.pauses == [3.0], "20 seconds are all that the route allows"


async def test_pitfall_2_a_burst_at_a_broken_target_does_not_multiply(stage: Stage) -> None:
    stage.reload(ONLY_HOSTED)
    stage.provider.mood = "server_error"
    errors = await asyncio.gather(*(stage.ask() for _ in range(11)), return_exceptions=True)
    assert all(isinstance(error, ApplianceError) for error in errors)
    assert stage.provider.calls <= 11, "the breaker opens before anybody asks again"
    before = stage.provider.calls
    for _ in range(11):
        with pytest.raises(ApplianceError):
            await stage.ask()
    assert stage.provider.calls == before


async def test_pitfall_2_a_caller_that_leaves_ends_the_retries(stage: Stage) -> None:
    stage.reload(ONLY_HOSTED)
    stage.provider.moods = ["server_error", "hang"]
    asking = asyncio.create_task(stage.ask())
    await stage.provider.called.wait()
    stage.provider.called.clear()
    await stage.provider.called.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.wait_for(stage.provider.caller_left.wait(), 5)
    assert stage.provider.calls == 2 and stage.ledger.outcomes[0].status == 499


async def test_pitfall_12_a_request_is_not_resumed_elsewhere_with_half_an_answer(stage: Stage) -> None:
    """Another target gets the request as it was, never with the words of the one that broke off."""
    stage.provider.mood = "half_body"
    request = request_of("Prove that 2 is prime")
    await stage.pipeline.answer(request, call_of(request))
    sent = [{name: value for name, value in body.items() if name != "cache_salt"} for body in stage.engine.bodies]
    assert sent == [{**request.body, "model": "tiny"}]


# --- time limits


async def test_pitfall_3_a_hosted_target_that_is_silent_falls_back_by_its_own_limit(tmp_path: Path) -> None:
    async with StandIn(uds=str(tmp_path / "e.sock")) as engine, StandIn(mood="hang") as provider:
        stage = Stage(engine, provider, first_byte_seconds=0.05)
        answer = await stage.ask("Prove that 2 is prime", stream=True)
        assert answer.metadata.reason == "fallback: cloud/big backend_timeout"
        await answer.aclose()
        await stage.aclose()


async def test_an_engine_that_does_not_begin_in_time_is_given_up_for_another_target(stage: Stage) -> None:
    stage.reload(LOCAL_FIRST.replace("budget_seconds = 2.0", "budget_seconds = 0.2"))
    stage.engine.mood = "hang"
    answer = await stage.ask(stream=True)
    assert answer.metadata.target == "cloud/big"
    assert answer.metadata.reason.startswith("overflow: onsite/tiny had not begun to answer after 0.")
    await answer.aclose()
    await asyncio.wait_for(stage.engine.caller_left.wait(), 5)
    assert attempts(stage)[0] == ("onsite/tiny", "overflowed")


async def test_a_bound_request_is_waited_for_beyond_its_budget(stage: Stage) -> None:
    stage.reload(LOCAL_FIRST.replace("budget_seconds = 2.0", "budget_seconds = 0.05"))
    stage.engine.mood = "slow_to_write"
    asking = asyncio.create_task(stage.ask(stream=True, residency=ONSITE))
    await stage.engine.called.wait()
    await asyncio.sleep(0.1)
    assert not asking.done() and stage.provider.calls == 0
    stage.engine.hold.set()
    answer = await asking
    assert answer.metadata.target == "onsite/tiny"
    await answer.aclose()


async def test_a_whole_answer_that_takes_too_long_here_is_had_elsewhere(stage: Stage) -> None:
    stage.reload('[[routes]]\nname = "r"\ntargets = ["onsite", "hosted"]\nanswer_budget_seconds = 0.6\n')
    stage.engine.mood = "hang"
    answer = await stage.ask()
    assert answer.metadata.reason.startswith("overflow: onsite/tiny had not answered after 0.")


# --- money


async def test_one_ceiling_for_the_whole_chain(stage: Stage) -> None:
    one = PRICE.cost_usd(Usage(14, 16))
    targets = [hosted_target(stage.provider.address, f"cloud/m{index}") for index in range(3)]
    policy = f'[[routes]]\nname = "r"\ntargets = ["hosted"]\nmax_cost_usd = {one * 1.5}\nretry_billed = true\n'
    scene = Scene(*targets, policy=policy)
    stage.provider.moods = ["garbage", "well"]
    with pytest.raises(BudgetExceeded, match="its route allows"):
        await scene.ask()
    assert stage.provider.calls == 1 and scene.ledger.usd <= one * 1.5
    await scene.aclose()
    scene.check_nothing_is_held()


async def test_a_target_whose_answers_became_too_dear_is_left_out_for_a_while(stage: Stage) -> None:
    text = '[[routes]]\nname = "r"\ntargets = ["hosted", "onsite"]\nmax_cost_per_success_usd = 0.00001\n'
    stage.reload(text)
    places = [(await stage.ask()).metadata.target for _ in range(24)]
    assert places[:20] == ["cloud/big"] * 20 and set(places[20:]) == {"onsite/tiny"}
    (excluded,) = stage.ledger.outcomes[-1].excluded
    assert "USD an answer of late" in excluded.reason


# --- clocks


async def test_setting_the_clock_changes_nothing_but_dates(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deciders know the monotonic clock alone: a wall clock that jumps by decades opens, ends and forgets nothing."""
    jumps = iter(range(1, 10_000))
    monkeypatch.setattr(stage, "wall", lambda: (-1) ** (number := next(jumps)) * 1e9 * number)
    stage.reload("[defaults]\nmax_wait_seconds = 5.0\n" + ONLY_HOSTED)
    for _ in range(3):
        assert (await stage.ask()).metadata.target == "cloud/big"
    stage.provider.mood, stage.provider.retry_after = "rate_limited", "20"
    with pytest.raises(BackendOverloaded):
        await stage.ask()
    blocked = stage.breakers.blocked_until("cloud/big", stage.now())
    assert blocked is not None and 15 < blocked - stage.now() <= 20
    assert all(0 <= outcome.total_seconds < 5 for outcome in stage.ledger.outcomes)


@pytest.mark.parametrize(
    "date", ["Wed, 21 Oct 2099 07:28:00 GMT", "Wed, 21 Oct 1999 07:28:00 GMT", "soon", "-5", "nan"]
)
async def test_odd_dates_to_come_back_at_are_bounded(stage: Stage, date: str) -> None:
    stage.reload(ONLY_HOSTED)
    stage.provider.mood, stage.provider.retry_after = "rate_limited", date
    with pytest.raises(ApplianceError):
        await stage.ask()
    until = stage.breakers.blocked_until("cloud/big", stage.now())
    assert until is None or until - stage.now() <= 300.0


# --- one that cannot be reached


async def test_a_target_that_refuses_connections_is_tried_again_and_then_left(stage: Stage) -> None:
    scene = Scene(hosted_target("http://127.0.0.1:9/v1", limits=TimeLimits(connect_seconds=0.5)), policy=ONLY_HOSTED)
    with pytest.raises(BackendUnreachable):
        await scene.ask()
    assert len(scene.pauses) == 2 and scene.breakers.blocked_until("cloud/big", scene.now()) is not None
    await scene.aclose()
    scene.check_nothing_is_held()


async def test_an_engine_that_took_a_request_down_with_it_does_not_get_it_again(stage: Stage) -> None:
    """A prompt that kills engines would kill one after the other."""
    stage.engine.mood = "hang"
    asking = asyncio.create_task(stage.ask(residency=ONSITE))
    await stage.engine.called.wait()
    await stage.engine.stop()
    with pytest.raises((BackendUnreachable, BackendGarbage)):
        await asking
    assert stage.engine.calls == 1 and not stage.pauses


async def test_a_remote_engine_of_the_site_is_retried_like_any_other(stage: Stage) -> None:
    lan = engine_target(stage.provider.address, "lan/big", provider="lan")
    scene = Scene(lan, policy='[[routes]]\nname = "r"\ntargets = ["onsite"]\n')
    stage.provider.moods = ["server_error"]
    assert (await scene.ask(residency=ONSITE)).metadata.reason == "retry: lan/big backend_error"
    await scene.aclose()
