"""Streams of tool calls and JSON: passed on as they come, held where another target is left, or as the route says."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from appliance.core import Usage
from tests.providers.collected import collected
from tests.providers.reached import SPOKEN, Spoken
from tests.providers.speech import CALLS, Called, Say
from tests.router.scene import read_stream
from tests.router.test_outbound import HOSTED, TOOL, Out, out_to

pytestmark = pytest.mark.anyio

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
JSON: dict[str, Any] = {"stream": True, "response_format": FORMAT}
TOOLS: dict[str, Any] = {"stream": True, "tools": [TOOL]}
WRONG = Say(text='{"age": "five"}')
RIGHT = Say(text='{"age": 5}')


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as made:
        yield made


def verify(out: Out, when: str) -> None:
    out.scene.reload(f'{HOSTED}verify = "{when}"\n')


@pytest.mark.parametrize("spoken", SPOKEN)
async def test_tool_calls_of_the_only_target_are_streamed(stack: AsyncExitStack, spoken: Spoken) -> None:
    out = await out_to(stack, spoken)
    out.apis[0].says = CALLS
    answer = await out.ask({**TOOLS, "stream_options": {"include_usage": True}})
    assert answer.stream is not None
    came = collected(await read_stream(answer))
    assert came.is_done and came.finishes == {0: "tool_calls"} and came.usage is not None
    assert came.message["tool_calls"][0]["function"]["name"] == "weather"
    assert out.attempts == [("p0/big-model", "answered")]
    assert out.apis[0].bodies[0].get("stream", True) is True
    out.scene.check_nothing_is_held()


@pytest.mark.parametrize("spoken", SPOKEN)
async def test_json_that_proves_wrong_at_the_end_of_its_stream_ends_in_an_error_event(
    stack: AsyncExitStack, spoken: Spoken
) -> None:
    out = await out_to(stack, spoken)
    out.apis[0].says = WRONG
    came = collected(await read_stream(await out.ask(JSON)))
    assert came.message["content"] == '{"age": "five"}', "what was streamed was streamed"
    assert not came.is_done and came.error is not None and came.error["code"] == "reply_rejected"
    outcome = out.scene.ledger.outcomes[-1]
    assert (outcome.status, outcome.error_code) == (502, "reply_rejected")
    (attempt,) = outcome.attempts
    assert (attempt.result, attempt.detail, attempt.usage) == ("rejected", "reply_rejected", Usage(20, 9))
    assert out.scene.ledger.usd == pytest.approx((20 * 2 + 9 * 8) / 1e6), "it is billed all the same"
    assert out.scene.breakers.blocked_until("p0/big-model", out.scene.now()) is None
    assert len(out.apis[0].bodies) == 1, "nothing is retried after the first byte"
    out.scene.check_nothing_is_held()


async def test_a_call_of_a_tool_that_was_not_offered_ends_in_an_error_event(stack: AsyncExitStack) -> None:
    out = await out_to(stack, "anthropic")
    out.apis[0].says = Say(calls=(Called(name="format_disk"),))
    came = collected(await read_stream(await out.ask(TOOLS)))
    assert not came.is_done and came.error is not None and "format_disk" in came.error["message"]


async def test_json_is_held_where_another_target_can_still_answer(stack: AsyncExitStack) -> None:
    out = await out_to(stack, "openai", "anthropic")
    out.apis[0].says, out.apis[1].says = WRONG, RIGHT
    answer = await out.ask(JSON)
    came = collected(await read_stream(answer))
    assert came.is_done and came.message["content"] == '{"age": 5}'
    assert out.attempts == [("p0/big-model", "rejected"), ("p1/big-model", "answered")]
    assert "stream" not in out.apis[0].bodies[0] and out.apis[1].bodies[0]["stream"] is True


async def test_a_route_may_have_everything_verified_before_the_first_byte(stack: AsyncExitStack) -> None:
    out = await out_to(stack, "openai")
    verify(out, "whole")
    out.apis[0].says = RIGHT
    answer = await out.ask(JSON)
    assert answer.stream is None and answer.payload["choices"][0]["message"]["content"] == '{"age": 5}'
    assert "stream" not in out.apis[0].bodies[0] and "stream_options" not in out.apis[0].bodies[0]


async def test_a_route_may_have_everything_streamed_whoever_follows(stack: AsyncExitStack) -> None:
    out = await out_to(stack, "openai", "anthropic")
    verify(out, "stream")
    out.apis[0].says = WRONG
    came = collected(await read_stream(await out.ask(JSON)))
    assert came.error is not None and out.attempts == [("p0/big-model", "rejected")]


async def test_a_stream_that_nothing_has_to_verify_is_not_looked_at(stack: AsyncExitStack) -> None:
    out = await out_to(stack, "openai", "anthropic")
    out.apis[0].says = WRONG
    came = collected(await read_stream(await out.ask({"stream": True})))
    assert came.is_done and out.attempts == [("p0/big-model", "answered")]
