"""Mistakes that other gateways have documented and that could be made here, each by its number."""

import asyncio
from typing import Any

import pytest

from appliance.core import ONSITE
from tests.router.scene import caller_of, request_of
from tests.router.stage import Stage, attempts, settled

pytestmark = pytest.mark.anyio


async def test_pitfall_8_nothing_is_answered_from_a_cache_of_answers(stage: Stage) -> None:
    """The same words twice are two answers: none is kept, so none can be shown to somebody else."""
    for caller in (caller_of(), caller_of(), caller_of(key_id="key-2")):
        await stage.ask("What is my balance?", caller=caller)
    assert stage.engine.calls == 3


async def test_pitfall_8_what_engines_cache_of_prompts_is_kept_apart_by_caller(stage: Stage) -> None:
    for key in ("key-1", "key-1", "key-2"):
        await stage.ask("What is my balance?", caller=caller_of(key_id=key))
    first, redecide, other = (body["cache_salt"] for body in stage.engine.bodies)
    assert first == redecide != other


@pytest.mark.parametrize("endpoint", ["chat", "completions", "decisions", "extract"])
async def test_pitfall_17_every_endpoint_goes_through_the_same_policy(stage: Stage, endpoint: str) -> None:
    stage.engine.mood = "server_error"
    bound: dict[str, Any] = {"endpoint": endpoint, "needs": frozenset(), "residency": ONSITE}
    with pytest.raises(Exception, match="failed"):
        await stage.ask(**bound)
    assert stage.provider.calls == 0
    await stage.ask(**{**bound, "residency": None})
    assert stage.provider.calls == 1


async def test_pitfall_18_while_an_engine_loads_those_who_may_go_elsewhere_do(stage: Stage) -> None:
    stage.publish(state="starting")
    assert (await stage.ask()).metadata.reason == "overflow: onsite/tiny engine starting"
    waiting = asyncio.create_task(stage.ask(residency=ONSITE))
    await settled()
    assert not waiting.done() and "onsite/tiny" in stage.state.demand
    stage.publish()
    assert (await waiting).metadata.target == "onsite/tiny"


async def test_an_engine_that_loads_is_waited_for_where_money_keeps_the_hosted_target_out(stage: Stage) -> None:
    stage.publish(state="starting")
    stage.ledger.is_spent = True
    waiting = asyncio.create_task(stage.ask())
    await settled()
    assert not waiting.done() and "onsite/tiny" in stage.state.demand
    stage.publish()
    assert (await waiting).metadata.target == "onsite/tiny"
    assert attempts(stage) == [("cloud/big", "overflowed"), ("onsite/tiny", "answered")]
    assert stage.provider.calls == 0


async def test_who_stands_by_is_wanted_but_not_asked_where_somebody_has_answered(stage: Stage) -> None:
    stage.publish(state="starting")
    request = request_of("hello")
    stage.pipeline.decide(request, prompt_tokens=10, output_tokens=10)
    assert "onsite/tiny" not in stage.state.demand, "a dry run asks for nothing"
    await stage.ask()
    assert attempts(stage) == [("cloud/big", "answered")] and "onsite/tiny" in stage.state.demand


async def test_pitfall_18_those_who_wait_for_an_engine_do_not_start_it_over_and_over(stage: Stage) -> None:
    """Demand is noted, never acted on here: whoever swaps engines sees one wish, however many ask."""
    stage.publish(state="starting")
    waiting = [asyncio.create_task(stage.ask(residency=ONSITE)) for _ in range(5)]
    await settled()
    assert list(stage.state.demand) == ["onsite/tiny"]
    stage.publish()
    await asyncio.gather(*waiting)
