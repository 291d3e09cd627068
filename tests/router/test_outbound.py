"""Every outbound dialect through the real pipeline: decision, reservation, door, verification, relay and books."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import pytest

from appliance.core import Target
from appliance.errors import ContextTooLong, Unsupported
from appliance.router.capacity.breaker import Breakers
from appliance.router.pipeline import Answer
from appliance.tasks import chat
from appliance.tasks.extract import extraction
from tests.providers.collected import collected
from tests.providers.reached import SPOKEN, Spoken, api_of, row_of, target_of
from tests.providers.served import Served
from tests.providers.speech import CACHED, CALLS, HELLO, Cut, Fail, Say
from tests.router.scene import Scene, call_of, engine_target, read_stream, request_of

pytestmark = pytest.mark.anyio

HOSTED = """
[defaults]
max_wait_seconds = 1.0

[[routes]]
name = "hosted"
targets = ["hosted"]
"""
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
ASK: Mapping[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "How is the weather?"}]}


class Out:
    """Some providers of one dialect each, asked in their order."""

    def __init__(self, scene: Scene, apis: list[Served]) -> None:
        self.scene = scene
        self.apis = apis

    async def ask(self, body: Mapping[str, Any]) -> Answer:
        asked, (call,) = chat.read_chat_request({**ASK, **body})
        request = request_of(asked.text, body=asked.body, stream=asked.stream, format=asked.format, needs=asked.needs)
        return await self.scene.pipeline.answer(request, call)

    @property
    def attempts(self) -> list[tuple[str, str]]:
        return [(attempt.target, attempt.result) for attempt in self.scene.ledger.outcomes[-1].attempts]


async def out_to(stack: AsyncExitStack, *dialects: Spoken, **fields: Any) -> Out:
    apis: list[Served] = []
    targets: list[Target] = []
    for number, spoken in enumerate(dialects):
        api = await stack.enter_async_context(api_of(spoken))
        apis.append(api)
        targets.append(target_of(row_of(spoken, api.address, name=f"p{number}", **fields)))
    scene = Scene(*targets, policy=HOSTED)
    stack.push_async_callback(scene.aclose)
    return Out(scene, apis)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as made:
        yield made


@pytest.mark.parametrize("spoken", SPOKEN)
async def test_an_answer_is_written_down_with_what_it_cost(stack: AsyncExitStack, spoken: Spoken) -> None:
    out = await out_to(stack, spoken)
    out.apis[0].says = Say(text="Fine.", prompt_tokens=1000, output_tokens=100, thought_tokens=60)
    answer = await out.ask({})
    assert answer.payload["choices"][0]["message"]["content"] == "Fine."
    assert answer.metadata.target == "p0/big-model" and answer.metadata.cost_usd == pytest.approx((2000 + 800) / 1e6)
    assert out.scene.ledger.usd == pytest.approx(answer.metadata.cost_usd)
    out.scene.check_nothing_is_held()


@pytest.mark.parametrize("spoken", SPOKEN)
async def test_a_stream_is_relayed_and_settled(stack: AsyncExitStack, spoken: Spoken) -> None:
    out = await out_to(stack, spoken)
    came = collected(await read_stream(await out.ask({"stream": True})))
    assert came.is_done and came.message["content"] == HELLO.text and came.usage is None
    assert out.attempts == [("p0/big-model", "answered")]
    assert out.scene.ledger.usd == pytest.approx((20 * 2 + 9 * 8) / 1e6)
    out.scene.check_nothing_is_held()


@pytest.mark.parametrize("spoken", SPOKEN)
async def test_a_stream_that_is_cut_ends_with_an_error(stack: AsyncExitStack, spoken: Spoken) -> None:
    out = await out_to(stack, spoken)
    out.apis[0].says = Cut()
    came = collected(await read_stream(await out.ask({"stream": True})))
    assert not came.is_done and came.error is not None and came.error["code"] == "stream_broken"
    out.scene.check_nothing_is_held()


@pytest.mark.parametrize("spoken", SPOKEN)
async def test_a_tool_call_passes_verification(stack: AsyncExitStack, spoken: Spoken) -> None:
    out = await out_to(stack, spoken)
    out.apis[0].says = CALLS
    answer = await out.ask({"tools": [TOOL], "tool_choice": "required"})
    choice = answer.payload["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["tool_calls"][0]["id"] == "call_1"


@pytest.mark.parametrize("spoken", SPOKEN)
async def test_what_an_overloaded_provider_refuses_another_dialect_answers(
    stack: AsyncExitStack, spoken: Spoken
) -> None:
    other: Spoken = "gemini" if spoken == "anthropic" else "anthropic"
    out = await out_to(stack, spoken, other)
    out.apis[0].says = Fail(529, "overloaded_error", headers={"retry-after": "30"})
    assert (await out.ask({})).metadata.target == "p1/big-model"
    assert out.attempts == [("p0/big-model", "failed"), ("p1/big-model", "answered")]
    await out.ask({})
    assert out.attempts == [("p1/big-model", "answered")], "it asked to be left alone"


async def test_what_one_dialect_cannot_be_given_another_answers_and_nothing_is_reserved(stack: AsyncExitStack) -> None:
    out = await out_to(stack, "anthropic", "gemini")
    answer = await out.ask({"seed": 7})
    assert answer.metadata.target == "p1/big-model"
    assert out.attempts == [("p0/big-model", "refused"), ("p1/big-model", "answered")]
    assert out.apis[0].bodies == [] and len(out.scene.ledger.reserved) == 1


async def test_where_nobody_can_be_given_it_the_field_is_named(stack: AsyncExitStack) -> None:
    out = await out_to(stack, "anthropic")
    with pytest.raises(Unsupported) as caught:
        await out.ask({"seed": 7})
    assert caught.value.param == "seed" and caught.value.status == 400
    assert out.apis[0].bodies == [] and not out.scene.ledger.reserved
    out.scene.check_nothing_is_held()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_provider_whose_limit_is_used_up_is_spared_until_it_is_renewed(
    stack: AsyncExitStack, stream: bool
) -> None:
    out = await out_to(stack, "openai", "anthropic")
    out.apis[0].limits = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "20s"}
    first = await out.ask({"stream": stream})
    assert first.metadata.target == "p0/big-model"
    await first.aclose()
    assert (await out.ask({})).metadata.target == "p1/big-model"
    until = out.scene.breakers.blocked_until("p0/big-model", out.scene.now())
    assert until is not None and out.scene.breakers.blocked_until("p0/big-model", until) is None


async def test_a_prompt_that_is_too_long_says_nothing_against_the_provider(stack: AsyncExitStack) -> None:
    out = await out_to(stack, "anthropic", "gemini")
    out.apis[0].says = Fail(400, "invalid_request_error", "prompt is too long: 210000 tokens > 200000 maximum")
    with pytest.raises(ContextTooLong) as caught:
        await out.ask({})
    assert caught.value.status == 400
    assert out.scene.breakers.blocked_until("p0/big-model", out.scene.now()) is None
    assert out.apis[1].bodies == [], "it would have been sent out once more"


async def test_what_is_put_into_a_cache_is_paid_for_and_was_reserved(stack: AsyncExitStack) -> None:
    out = await out_to(stack, "anthropic")
    out.apis[0].says = CACHED
    answer = await out.ask({})
    fresh, read, short, long = 100 * 2.0, 600 * 2.0, 200 * 2.5, 100 * 4.0
    assert answer.metadata.cost_usd == pytest.approx((fresh + read + short + long + 9 * 8.0) / 1e6)


async def test_an_onsite_server_may_speak_any_dialect(stack: AsyncExitStack) -> None:
    api = await stack.enter_async_context(api_of("anthropic"))
    target = target_of(row_of("anthropic", api.address, name="lan", location="onsite"))
    scene = Scene(engine_target(), target, policy=HOSTED.replace('["hosted"]', '["lan/big-model"]'))
    scene.transports.local._secrets["lan"] = "sk-secret"  # type: ignore[attr-defined]
    stack.push_async_callback(scene.aclose)
    answer = await Out(scene, [api]).ask({})
    assert answer.metadata.location == "onsite" and api.wrongs == []


# --- what is reserved


async def test_work_that_becomes_many_calls_is_reserved_once(stack: AsyncExitStack) -> None:
    """Its tokens are those of all its calls together."""
    reserved = []
    for calls in (1, 5):
        out = await out_to(stack, "openai")
        request = request_of()
        call = call_of(request, calls=calls, prompt_tokens=1000, output_tokens=100)
        await out.scene.pipeline.answer(request, call)
        assert len(out.apis[0].bodies) == calls
        reserved += [usd for _, usd in out.scene.ledger.reserved.values()]
    assert reserved[0] == reserved[1] >= (1000 * 2.5 + 100 * 8.0) / 1e6, "as dear as if all went into the cache"


def test_a_rest_outlives_answers_and_ends_by_itself() -> None:
    breakers = Breakers()
    breakers.rest("a", 20.0)
    breakers.rest("a", 15.0)
    breakers.succeed("a")
    assert breakers.blocked_until("a", 10.0) == 20.0
    breakers.fail("a", 10.0, 60.0)
    assert breakers.blocked_until("a", 10.0) == 70.0, "the longer of both"
    breakers.succeed("a")
    assert breakers.blocked_until("a", 20.0) is None and breakers.blocked_until("a", 15.0) is None


async def test_fields_are_extracted_by_a_model_that_takes_no_temperature(stack: AsyncExitStack) -> None:
    out = await out_to(stack, "anthropic")
    out.apis[0].says = Say(text='{"city":"Ulm"}')
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    body = {"model": "auto", "schema": schema, "text": "Rain over Ulm."}
    asked, calls = extraction.read_extract_request(body)
    request = request_of(asked.text, endpoint="extract", body=body, format=asked.format, needs=asked.needs)
    many = await out.scene.pipeline.answer_many(request, calls, concurrency=1)
    assert not isinstance(many.results[0], Exception)
    assert many.results[0].object == {"city": "Ulm"}
    assert out.apis[0].wrongs == []


@pytest.mark.parametrize("spoken", SPOKEN)
async def test_a_stream_whose_end_nobody_sees_costs_what_came_of_it(stack: AsyncExitStack, spoken: Spoken) -> None:
    """Some providers count on the way: Anthropic begins with one token. That is not what will be on the bill."""
    out = await out_to(stack, spoken)
    out.apis[0].says = Cut("word " * 2000)
    came = collected(await read_stream(await out.ask({"stream": True, "max_tokens": 16})))
    assert came.error is not None
    tokens = len(came.message["content"]) // 4
    assert tokens > 500
    assert tokens * 8 / 1e6 <= out.scene.ledger.usd <= 2 * tokens * 8 / 1e6
    out.scene.check_nothing_is_held()


@pytest.mark.parametrize("spoken", SPOKEN)
async def test_what_a_model_may_write_is_put_aside_where_the_caller_set_no_limit(
    stack: AsyncExitStack, spoken: Spoken
) -> None:
    out = await out_to(stack, spoken, max_output_tokens=20_000, output_usd=10.0)
    await out.ask({})
    await out.ask({"max_completion_tokens": 1_000})
    unlimited, limited = (usd for _, usd in out.scene.ledger.reserved.values())
    assert 0.2 < unlimited < 0.21 and 0.01 < limited < 0.02
