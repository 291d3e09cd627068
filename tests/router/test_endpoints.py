"""Chats that came in another dialect are chats: bound, searched, matched, cut down and counted as any other."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from starlette.datastructures import Headers

from appliance.core import ONSITE, ParsedRequest, Request
from appliance.errors import ApplianceError, ContextTooLong
from appliance.router.request_builder import make_request
from appliance.tasks.chat import CHAT_ENDPOINTS, ChatCall
from tests.router.scene import LOCAL_FIRST, caller_of
from tests.router.stage import Stage, attempts
from tests.wire.readers import read_contents, read_messages, read_responses

pytestmark = pytest.mark.anyio

SECRET = "Write to Jane at jane.roe@example.com."
READERS: Mapping[str, Any] = {
    "messages": lambda text: read_messages(
        {"max_tokens": 9, "messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]}
    ),
    "responses": lambda text: read_responses(
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": text}]}]}
    ),
    "generate_content": lambda text: read_contents({"contents": [{"parts": [{"text": text}]}]}, "auto"),
}
ENDPOINTS = pytest.mark.parametrize("endpoint", list(READERS))


def read(endpoint: str, text: str = "hello there", **headers: str) -> tuple[Request, ChatCall]:
    asked: ParsedRequest
    asked, (call,) = READERS[endpoint](text)
    request = make_request(asked, headers=Headers(headers), caller=caller_of(), request_id="r", now=0.0, wall=0.0)
    return request, call


async def ask(stage: Stage, endpoint: str, text: str = "hello there", **headers: str) -> Any:
    request, call = read(endpoint, text, **headers)
    return await stage.pipeline.answer(replace(request, received=stage.now(), received_at=stage.wall()), call)


def test_every_chat_endpoint_is_tried_here() -> None:
    assert {"chat", *READERS} == CHAT_ENDPOINTS


@ENDPOINTS
@pytest.mark.parametrize("mood", ["server_error", "overloaded"])
async def test_a_bound_request_never_leaves_even_when_local_is_down(stage: Stage, endpoint: str, mood: str) -> None:
    stage.engine.mood = mood  # type: ignore[assignment]
    with pytest.raises(ApplianceError):
        await ask(stage, endpoint, **{"x-appliance-residency": "onsite"})
    assert stage.provider.calls == 0
    assert stage.ledger.outcomes[-1].endpoint == endpoint
    assert stage.ledger.outcomes[-1].residency == str(ONSITE)


@ENDPOINTS
async def test_personal_data_in_any_dialect_binds(stage: Stage, endpoint: str) -> None:
    stage.reload(f'[residency]\ncontent = "personal_data"\n{LOCAL_FIRST}')
    stage.engine.mood = "server_error"
    with pytest.raises(ApplianceError):
        await ask(stage, endpoint, SECRET)
    assert stage.provider.calls == 0
    assert "e-mail address" in stage.ledger.outcomes[-1].residency_reason


@ENDPOINTS
async def test_an_unbound_request_goes_on_to_a_hosted_target_as_a_chat(stage: Stage, endpoint: str) -> None:
    stage.engine.mood = "server_error"
    answer = await ask(stage, endpoint)
    assert answer.metadata.location == "hosted" and answer.payload["choices"]
    await answer.aclose()


@ENDPOINTS
async def test_routes_match_the_endpoint(stage: Stage, endpoint: str) -> None:
    route = f'[[routes]]\nname = "here"\nmatch = {{ endpoint = ["{endpoint}"] }}\ntargets = ["onsite"]\n'
    stage.reload(f'{route}[[routes]]\nname = "rest"\ntargets = ["onsite"]\n')
    request, call = read(endpoint)
    decision = stage.pipeline.decide(request, prompt_tokens=call.prompt_tokens, output_tokens=call.output_tokens)
    assert decision.route.name == "here"


@ENDPOINTS
async def test_steps_down_end_with_a_static_answer_in_chats_shape(stage: Stage, endpoint: str) -> None:
    stage.reload('[[routes]]\nname = "r"\ntargets = ["onsite"]\ndegrade = [{ step = "static", text = "Later." }]\n')
    stage.engine.mood = "server_error"
    answer = await ask(stage, endpoint)
    assert answer.payload["choices"][0]["message"]["content"] == "Later."
    assert attempts(stage)[-1] == ("static", "answered")


@pytest.mark.parametrize(("endpoint", "param"), [("messages", "messages"), ("responses", "input")])
async def test_a_prompt_that_is_too_long_is_the_fault_of_the_callers_own_field(
    stage: Stage, endpoint: str, param: str
) -> None:
    stage.reload('[[routes]]\nname = "r"\ntargets = ["onsite"]\n')
    with pytest.raises(ContextTooLong) as refused:
        await ask(stage, endpoint, "many words " * 200_000)
    assert refused.value.param == param


@ENDPOINTS
async def test_a_count_falls_back_to_an_estimate_and_says_so(stage: Stage, endpoint: str) -> None:
    """The stand-in has no tokenizer."""
    request, call = read(endpoint)
    counted = await stage.pipeline.count_tokens(request, call)
    assert counted.tokens >= call.prompt_tokens
    assert counted.headers()["x-appliance-count"] == "estimate"
    assert stage.ledger.outcomes == []
