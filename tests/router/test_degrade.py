"""Declared steps down: less context, a shorter answer, the last question alone, words of the operator's own."""

import asyncio
from typing import Any

import pytest

from appliance.core import ONSITE
from appliance.errors import BackendError, BackendRefused, ContextTooLong, ResidencyRefused
from tests.router.scene import engine_target, request_of
from tests.router.stage import Stage, attempts

pytestmark = pytest.mark.anyio

ALL = """
degrade = [
  { step = "constrained", max_output_tokens = 5, keep_tokens = 200 },
  { step = "reduced_scope" },
  { step = "static", text = "Please call 555-0100." },
]
"""


def policy(steps: str, *, targets: str = '["onsite"]', more: str = "max_attempts = 5") -> str:
    return f'[[routes]]\nname = "r"\ntargets = {targets}\n{more}\n{steps}'


def long_chat(turns: int = 30, words: int = 40) -> dict[str, Any]:
    said = [{"role": role, "content": "word " * words} for _ in range(turns) for role in ("user", "assistant")]
    return {"messages": [{"role": "system", "content": "Be kind."}, *said, {"role": "user", "content": "And now?"}]}


async def ask(stage: Stage, body: dict[str, Any] | None = None, tokens: int = 10, **fields: Any) -> Any:
    body = body or {"messages": [{"role": "user", "content": "hello"}]}
    return await stage.ask(call={"prompt_tokens": tokens, "output_tokens": 50}, **{"body": body, **fields})


async def test_a_failing_target_is_asked_for_less_and_then_a_static_answer_guides(stage: Stage) -> None:
    stage.reload(policy(ALL))
    stage.engine.mood = "server_error"
    answer = await ask(stage)
    assert answer.payload["choices"][0]["message"]["content"] == "Please call 555-0100."
    assert answer.metadata.reason == "degraded (static): backend_error"
    assert (answer.metadata.target, answer.metadata.location, answer.metadata.cost_usd) == ("static", "onsite", 0.0)
    assert attempts(stage) == [("onsite/tiny", "failed")] * 3 + [("static", "answered")]
    causes = [attempt.cause for attempt in stage.ledger.outcomes[0].attempts]
    assert causes[0] == "first" and set(causes[1:]) == {"degraded"}
    assert stage.ledger.outcomes[0].status == 200


async def test_a_constrained_answer_says_that_it_is_one(stage: Stage) -> None:
    stage.reload(policy(ALL))
    stage.engine.moods = ["server_error"]
    answer = await ask(stage, long_chat(), tokens=1500)
    assert answer.metadata.reason.startswith("degraded (constrained): backend_error; first choice")
    sent = stage.engine.bodies[-1]
    assert sent["max_tokens"] == 5 and len(sent["messages"]) < 20
    assert sent["messages"][0]["content"] == "Be kind." and sent["messages"][-1]["content"] == "And now?"


async def test_a_prompt_too_long_for_every_context_is_cut_where_the_route_says_so(stage: Stage) -> None:
    tight = engine_target(stage.engine.address, context_tokens=400)
    stage.targets = (tight, stage.targets[1])
    stage.publish()
    with pytest.raises(ContextTooLong):
        await ask(stage, long_chat(), tokens=3000, residency=ONSITE)
    stage.reload(policy('degrade = [{ step = "constrained", keep_tokens = 100 }]'))
    answer = await ask(stage, long_chat(), tokens=3000, residency=ONSITE)
    assert answer.metadata.reason.startswith("degraded (constrained): context_length_exceeded")
    assert stage.provider.calls == 0


async def test_a_route_may_prune_from_the_start(stage: Stage) -> None:
    stage.reload(policy("prune_context = { keep_tokens = 100 }\nmax_output_tokens = 7"))
    answer = await ask(stage, long_chat(), tokens=3000)
    assert answer.metadata.reason == "first choice of route r"
    assert len(stage.engine.bodies[0]["messages"]) < 10 and stage.engine.bodies[0]["max_tokens"] == 7


async def test_what_the_caller_did_wrong_is_not_smoothed_over(stage: Stage) -> None:
    stage.reload(policy(ALL, targets='["onsite", "hosted"]'))
    stage.engine.mood = "bad_request"
    with pytest.raises(BackendRefused):
        await ask(stage)
    with pytest.raises(ResidencyRefused):
        await ask(stage, model="cloud/big", residency=ONSITE)


async def test_a_bound_request_may_be_given_a_static_answer_and_still_stays(stage: Stage) -> None:
    stage.reload(policy('degrade = [{ step = "static", text = "Later, please." }]', more="max_wait_seconds = 0.02"))
    stage.publish(state="failed", reason="exit code 1")
    answer = await ask(stage, residency=ONSITE)
    assert answer.metadata.target == "static" and stage.provider.calls == 0


async def test_an_answer_that_must_be_json_gets_no_static_text(stage: Stage) -> None:
    stage.reload(policy('degrade = [{ step = "static", text = "Later, please." }]', more="max_attempts = 1"))
    stage.engine.mood = "server_error"
    with pytest.raises(BackendError):
        await ask(stage, format="json_object")
    with pytest.raises(BackendError):
        await ask(stage, endpoint="decisions")


async def test_steps_down_share_the_one_number_of_attempts(stage: Stage) -> None:
    stage.reload(policy(ALL, more="max_attempts = 2"))
    stage.engine.mood = "server_error"
    assert (await ask(stage)).metadata.target == "static"
    assert stage.engine.calls == 2


async def test_a_stream_that_cannot_be_had_may_become_a_static_answer(stage: Stage) -> None:
    stage.reload(policy('degrade = [{ step = "static", text = "Later." }]', more="max_attempts = 1"))
    stage.engine.mood = "server_error"
    answer = await ask(stage, stream=True)
    assert answer.stream is None and answer.payload["choices"][0]["message"]["content"] == "Later."
    await answer.aclose()


async def test_a_deprecated_route_says_so_in_a_header(stage: Stage) -> None:
    stage.reload(policy("", more='stage = "deprecated"'))
    headers = (await ask(stage)).metadata.headers()
    assert "deprecated" in headers["x-appliance-warning"]
    stage.reload(policy("", more='stage = "experimental"'))
    assert "x-appliance-warning" not in (await ask(stage)).metadata.headers()


async def test_explain_shows_a_cut_down_request_as_it_would_go_out(stage: Stage) -> None:
    stage.reload(policy("prune_context = { keep_tokens = 100 }"))
    decision = stage.pipeline.decide(request_of(), prompt_tokens=50_000, output_tokens=16)
    assert decision.route.attempts and decision.profile.prompt_tokens == 50_000
    await asyncio.sleep(0)
