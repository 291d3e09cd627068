"""Same dialect in and out, over real sockets: what came is what the provider gets, and its answer is what is given."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, Literal

import httpx
import orjson
import pytest
from fastapi import FastAPI

from appliance.api.app import AppDeps, create_app
from appliance.api.auth import Authenticator
from appliance.config import ServerSettings
from appliance.core import CallerBody, Outcome, UpstreamCall
from appliance.telemetry.metrics import Metrics
from appliance.upstream import client
from appliance.wire.registry import find_forwarder
from tests.api.stand_ins import StandInLedger, served
from tests.providers.reached import Spoken
from tests.providers.speech import CACHED, CALLS, HELLO, THINKS_AND_CALLS, Called, Cut, Fail, Say
from tests.router.scene import engine_target
from tests.router.test_outbound import HOSTED, Out, out_to

pytestmark = pytest.mark.anyio

Forwarded = Literal["anthropic", "responses", "gemini"]
FORWARDED: tuple[Forwarded, ...] = ("anthropic", "responses", "gemini")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PIXEL = "iVBORw0KGgo="
MARK = {"type": "ephemeral", "ttl": "1h"}

MESSAGE: Mapping[str, Any] = {
    "model": "auto",
    "max_tokens": 3000,
    "system": [{"type": "text", "text": "Be brief.", "cache_control": MARK}],
    "thinking": {"type": "enabled", "budget_tokens": 2000},
    "metadata": {"user_id": "u-1"},
    "service_tier": "standard_only",
    "tools": [{"name": "weather", "input_schema": SCHEMA, "cache_control": MARK, "eager_input_streaming": True}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Compare.", "cache_control": MARK},
                {
                    "type": "document",
                    "source": {"type": "text", "media_type": "text/plain", "data": "A report."},
                    "title": "Report",
                    "context": "of May",
                    "citations": {"enabled": False},
                },
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "c2lnbmVk"},
                {"type": "redacted_thinking", "data": "aGlkZGVu"},
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Ulm"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [{"type": "text", "text": "Rain"}],
                    "is_error": False,
                    "cache_control": MARK,
                }
            ],
        },
    ],
}
RESPONSE: Mapping[str, Any] = {
    "model": "auto",
    "instructions": "Be brief.",
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Compare."}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAAABsealed"},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": '{ "city": "Ulm" }'},
        {"type": "function_call_output", "call_id": "c1", "output": "Rain"},
    ],
    "tools": [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]},
    "reasoning": {"effort": "low", "summary": "concise"},
    "include": ["reasoning.encrypted_content"],
    "text": {"verbosity": "low"},
    "metadata": {"run": "7"},
    "truncation": "auto",
    "prompt_cache_key": "k",
    "max_output_tokens": 3000,
    "store": False,
}
CONTENT: Mapping[str, Any] = {
    "systemInstruction": {"parts": [{"text": "Be brief."}]},
    "contents": [
        {"role": "user", "parts": [{"text": "Compare."}, {"inlineData": {"mimeType": "image/png", "data": PIXEL}}]},
        {
            "role": "model",
            "parts": [
                {"text": "Hm.", "thought": True},
                {"functionCall": {"id": "c1", "name": "weather", "args": {"city": "Ulm"}}, "thoughtSignature": "c2ln"},
            ],
        },
        {
            "role": "user",
            "parts": [{"functionResponse": {"id": "c1", "name": "weather", "response": {"sky": "Rain"}}}],
        },
    ],
    "tools": [{"functionDeclarations": [{"name": "weather", "parametersJsonSchema": SCHEMA}]}],
    "toolConfig": {"functionCallingConfig": {"mode": "VALIDATED"}},
    "safetySettings": [{"category": "HARM_CATEGORY_HARASSMENT", "threshold": "BLOCK_NONE"}],
    "generationConfig": {
        "maxOutputTokens": 3000,
        "topK": 3,
        "thinkingConfig": {"includeThoughts": True, "thinkingLevel": "LOW"},
    },
}
BODIES: Mapping[Forwarded, Mapping[str, Any]] = {"anthropic": MESSAGE, "responses": RESPONSE, "gemini": CONTENT}


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as made:
        yield made


class Node:
    """The API before providers of one dialect each."""

    def __init__(self, out: Out, http: httpx.AsyncClient) -> None:
        self.out, self.http = out, http

    async def post(self, spoken: Forwarded, body: Mapping[str, Any], *, stream: bool = False, **headers: str) -> Any:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        match spoken:
            case "anthropic":
                path = "/v1/messages"
            case "responses":
                path = "/v1/responses"
            case "gemini":
                verb = "streamGenerateContent?alt=sse" if stream else "generateContent"
                return await self.http.post(f"/v1beta/models/auto:{verb}", json=body, headers=given)
        sent = {**body, "stream": True} if stream else dict(body)
        return await self.http.post(path, json=sent, headers=given)

    @property
    def outcome(self) -> Outcome:
        return self.out.scene.ledger.outcomes[-1]


async def node_before(stack: AsyncExitStack, *dialects: Spoken, **fields: Any) -> Node:
    out = await out_to(stack, *dialects, **fields)
    url = await stack.enter_async_context(served(app_over(out)))
    return Node(out, await stack.enter_async_context(httpx.AsyncClient(base_url=url)))


def app_over(out: Out) -> FastAPI:
    async def reload() -> Mapping[str, Any]:
        return {}

    return create_app(
        AppDeps(
            pipeline=lambda: out.scene.pipeline,
            auth=Authenticator((), host="127.0.0.1"),
            state=out.scene.state,
            ledger=StandInLedger(),
            metrics=Metrics(),
            server=ServerSettings(),
            reload=reload,
        )
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("spoken", FORWARDED)
async def test_the_provider_gets_what_came_field_for_field(
    stack: AsyncExitStack, spoken: Forwarded, stream: bool
) -> None:
    node = await node_before(stack, spoken)
    response = await node.post(spoken, BODIES[spoken], stream=stream)
    assert response.status_code == 200, response.text
    (sent,) = node.out.apis[0].bodies
    expected = dict(BODIES[spoken])
    if spoken != "gemini":
        expected = {**expected, "model": "big-model", **({"stream": True} if stream else {})}
    assert node.out.apis[0].wrongs == []
    assert sent == expected


@pytest.mark.parametrize("says", [HELLO, CALLS, THINKS_AND_CALLS, CACHED])
@pytest.mark.parametrize("spoken", FORWARDED)
async def test_a_whole_answer_is_the_providers_byte_for_byte(
    stack: AsyncExitStack, spoken: Forwarded, says: Say
) -> None:
    node = await node_before(stack, spoken)
    node.out.apis[0].says = says
    response = await node.post(spoken, BODIES[spoken])
    assert response.content == node.out.apis[0].replies[0]
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-appliance-target"] == "p0/big-model"


@pytest.mark.parametrize("says", [HELLO, CALLS, THINKS_AND_CALLS, CACHED])
@pytest.mark.parametrize("spoken", FORWARDED)
async def test_a_stream_is_the_providers_event_by_event(stack: AsyncExitStack, spoken: Forwarded, says: Say) -> None:
    node = await node_before(stack, spoken)
    node.out.apis[0].says = says
    response = await node.post(spoken, BODIES[spoken], stream=True)
    assert response.content == node.out.apis[0].replies[0]
    assert response.headers["content-type"].startswith("text/event-stream")
    node.out.scene.check_nothing_is_held()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("says", [HELLO, THINKS_AND_CALLS, CACHED])
@pytest.mark.parametrize("spoken", FORWARDED)
async def test_the_ledger_has_the_same_row_as_for_a_translated_request(
    stack: AsyncExitStack, spoken: Forwarded, says: Say, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [await node_before(stack, spoken), await node_before(stack, spoken)]
    for node in nodes:
        node.out.apis[0].says = says
        await node.post(spoken, BODIES[spoken], stream=stream)
        monkeypatch.setattr(client, "find_forwarder", lambda target, outgoing: None)
    forwarded, translated = nodes
    assert comparable(forwarded.outcome) == comparable(translated.outcome)
    assert forwarded.out.scene.ledger.reserved == translated.out.scene.ledger.reserved
    assert forwarded.out.scene.ledger.settled == translated.out.scene.ledger.settled
    assert forwarded.outcome.attempts[0].usage.prompt_tokens == says.prompt_tokens
    assert forwarded.out.apis[0].bodies != translated.out.apis[0].bodies, "one of them was translated"


def comparable(outcome: Outcome) -> Outcome:
    """Without ids and times."""
    attempts = tuple(
        replace(one, started_at=0.0, first_byte_seconds=0.0, total_seconds=0.0, reservation=None)
        for one in outcome.attempts
    )
    return replace(
        outcome,
        attempts=attempts,
        decision_id="",
        request_id="",
        received_at=0.0,
        first_byte_seconds=0.0,
        total_seconds=0.0,
    )


@pytest.mark.parametrize("spoken", FORWARDED)
async def test_a_bound_request_is_never_forwarded(stack: AsyncExitStack, spoken: Forwarded) -> None:
    node = await node_before(stack, spoken)
    response = await node.post(spoken, BODIES[spoken], x_appliance_residency="onsite")
    assert response.status_code in (403, 503, 529) and node.out.apis[0].bodies == []


@pytest.mark.parametrize("spoken", FORWARDED)
async def test_personal_data_keeps_a_request_from_being_forwarded(stack: AsyncExitStack, spoken: Forwarded) -> None:
    node = await node_before(stack, spoken)
    node.out.scene.reload(f'[residency]\ncontent = "personal_data"\n{HOSTED}')
    raw = orjson.dumps(BODIES[spoken]).replace(b"Compare.", b"Pay to DE89 3704 0044 0532 0130 00 please.")
    response = await node.post(spoken, orjson.loads(raw))
    assert response.status_code in (403, 503, 529) and node.out.apis[0].bodies == []


@pytest.mark.parametrize("spoken", FORWARDED)
async def test_a_budget_that_is_spent_refuses_it(stack: AsyncExitStack, spoken: Forwarded) -> None:
    node = await node_before(stack, spoken)
    node.out.scene.ledger.is_spent = True
    response = await node.post(spoken, BODIES[spoken])
    assert response.status_code == 429 and node.out.apis[0].bodies == []


@pytest.mark.parametrize("spoken", FORWARDED)
async def test_a_routes_limit_lowers_the_callers(stack: AsyncExitStack, spoken: Forwarded) -> None:
    node = await node_before(stack, spoken)
    node.out.scene.reload(f"{HOSTED}max_output_tokens = 2500\n")
    await node.post(spoken, BODIES[spoken])
    (sent,) = node.out.apis[0].bodies
    match spoken:
        case "anthropic":
            assert sent == {**MESSAGE, "model": "big-model", "max_tokens": 2500}
        case "responses":
            assert sent == {**RESPONSE, "model": "big-model", "max_output_tokens": 2500}
        case "gemini":
            settings = {**CONTENT["generationConfig"], "maxOutputTokens": 2500}
            assert sent == {**CONTENT, "generationConfig": settings}
    assert max(usd for _, usd in node.out.scene.ledger.reserved.values()) < 0.03, "2,500 tokens are reserved for"


async def test_a_thinking_budget_stays_below_a_limit_that_was_lowered(stack: AsyncExitStack) -> None:
    node = await node_before(stack, "anthropic")
    for limit, thinking in ((2048, {"type": "enabled", "budget_tokens": 1024}), (1000, {"type": "disabled"})):
        node.out.scene.reload(f"{HOSTED}max_output_tokens = {limit}\n")
        await node.post("anthropic", {**MESSAGE, "thinking": {"type": "enabled", "budget_tokens": 2048}})
        assert node.out.apis[0].bodies[-1]["thinking"] == thinking


@pytest.mark.parametrize("spoken", FORWARDED)
async def test_trimmed_turns_are_not_sent_after_all(stack: AsyncExitStack, spoken: Forwarded) -> None:
    node = await node_before(stack, spoken)
    node.out.scene.reload(f"{HOSTED}prune_context = {{ keep_tokens = 1 }}\n")
    old = {"anthropic": "messages", "responses": "input", "gemini": "contents"}[spoken]
    last: Any = {
        "anthropic": {"role": "user", "content": "And now?"},
        "responses": {"role": "user", "content": "And now?"},
        "gemini": {"role": "user", "parts": [{"text": "And now?"}]},
    }
    response = await node.post(spoken, {**BODIES[spoken], old: [*BODIES[spoken][old], last[spoken]]})
    assert response.status_code == 200, response.text
    assert b"Compare." not in orjson.dumps(node.out.apis[0].bodies[0])


# --- errors


@pytest.mark.parametrize("spoken", FORWARDED)
async def test_a_stream_that_is_cut_ends_in_an_error_of_its_dialect(stack: AsyncExitStack, spoken: Forwarded) -> None:
    node = await node_before(stack, spoken)
    node.out.apis[0].says = Cut()
    response = await node.post(spoken, BODIES[spoken], stream=True)
    assert response.content.startswith(node.out.apis[0].replies[0])
    assert_error_event(spoken, response.content)
    assert (node.outcome.error_code, node.outcome.attempts[0].result) == ("stream_broken", "failed")
    node.out.scene.check_nothing_is_held()


@pytest.mark.parametrize("spoken", FORWARDED)
async def test_tool_calls_that_prove_wrong_end_in_an_error_of_the_dialect(
    stack: AsyncExitStack, spoken: Forwarded
) -> None:
    node = await node_before(stack, spoken)
    node.out.apis[0].says = Say(calls=(Called(name="format_disk"),))
    response = await node.post(spoken, BODIES[spoken], stream=True)
    assert_error_event(spoken, response.content)
    assert b"message_stop" not in response.content and b"response.completed" not in response.content
    assert (node.outcome.error_code, node.outcome.attempts[0].result) == ("reply_rejected", "rejected")


def assert_error_event(spoken: Forwarded, content: bytes) -> None:
    last = orjson.loads(content.strip().rpartition(b"data: ")[2])
    match spoken:
        case "anthropic":
            assert last["type"] == "error" and last["error"]["type"] == "api_error"
        case "responses":
            assert last["type"] == "error" and last["message"]
        case "gemini":
            assert last["error"]["code"] == 502


@pytest.mark.parametrize("spoken", FORWARDED)
async def test_an_answer_that_is_held_until_it_is_verified_is_given_as_a_stream(
    stack: AsyncExitStack, spoken: Forwarded
) -> None:
    node = await node_before(stack, spoken)
    node.out.scene.reload(f'{HOSTED}verify = "whole"\n')
    node.out.apis[0].says = CALLS
    response = await node.post(spoken, BODIES[spoken], stream=True)
    assert "stream" not in node.out.apis[0].bodies[0]
    assert response.headers["content-type"].startswith("text/event-stream") and b"weather" in response.content


@pytest.mark.parametrize("spoken", FORWARDED)
async def test_what_falls_back_to_another_dialect_is_translated(stack: AsyncExitStack, spoken: Forwarded) -> None:
    other: Spoken = "gemini" if spoken == "anthropic" else "anthropic"
    node = await node_before(stack, spoken, other)
    node.out.apis[0].says = Fail(529, "overloaded_error")
    left_out = ("thinking", "tools", "tool_choice", "text", "metadata", "reasoning")
    body = {name: value for name, value in BODIES[spoken].items() if name not in left_out}
    if spoken == "gemini":
        body["generationConfig"] = {"maxOutputTokens": 3000}
    response = await node.post(spoken, body)
    assert response.status_code == 200, response.text
    assert "contents" in node.out.apis[1].bodies[0] or "messages" in node.out.apis[1].bodies[0]
    assert {"anthropic": "content", "responses": "output", "gemini": "candidates"}[spoken] in response.json()


@pytest.mark.parametrize(
    ("spoken", "more", "param"),
    [
        ("anthropic", {"mcp_servers": [{"type": "url", "url": "https://x.example", "name": "x"}]}, "mcp_servers"),
        ("anthropic", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ("anthropic", {"x_unknown": 1}, "x_unknown"),
        ("responses", {"store": True}, "store"),
        ("responses", {"service_tier": "priority"}, "service_tier"),
        ("responses", {"background": True}, "background"),
        ("responses", {"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ("gemini", {"tools": [{"googleSearch": {}}]}, "tools[0].googleSearch"),
        ("gemini", {"cachedContent": "cachedContents/1"}, "cachedContent"),
    ],
)
async def test_what_bills_stores_or_fetches_is_refused_as_ever(
    stack: AsyncExitStack, spoken: Forwarded, more: Mapping[str, Any], param: str
) -> None:
    node = await node_before(stack, spoken)
    body = {name: value for name, value in BODIES[spoken].items() if name not in ("tool_choice", "toolConfig")}
    response = await node.post(spoken, {**body, **more})
    assert response.status_code == 400 and param in response.text and node.out.apis[0].bodies == []


@pytest.mark.parametrize("spoken", FORWARDED)
async def test_an_engine_of_this_node_is_sent_a_translation(spoken: Forwarded) -> None:
    endpoint: Any = {"anthropic": "messages", "responses": "responses", "gemini": "generate_content"}[spoken]
    call = UpstreamCall("/chat/completions", {"messages": []}, CallerBody(endpoint, BODIES[spoken]))
    assert find_forwarder(engine_target(), call) is None
