"""Anthropic's SDK against the application, unchanged but for its base URL."""

import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import httpx
import orjson
import pytest

from appliance.config import KeySettings
from appliance.core import UpstreamCall
from appliance.errors import (
    ApplianceError,
    Busy,
    DeadlineExceeded,
    EngineBusy,
    Forbidden,
    StreamBroken,
    Unavailable,
    UnknownModel,
)
from tests.api.stand_ins import SMALL, StandInPipeline, make_app, served
from tests.api.test_api_sdk import PIECES, chunk, completion

pytestmark = pytest.mark.anyio

HELLO: Any = [{"role": "user", "content": "Hello"}]
WEATHER: Any = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = {"id": "toolu_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bonn"}'}}
DONE = b"data: [DONE]\n\n"


def calling(outgoing: UpstreamCall) -> dict[str, Any]:
    """Calls the tool for a user's question, and repeats the result once there is one."""
    last = outgoing.body["messages"][-1]
    if last["role"] != "tool":
        message = {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]}
        return completion("", message=message, finish_reason="tool_calls")
    return completion(f"It is {last['content']}.")


def usage_chunk() -> bytes:
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 6}}
    return b"data: " + orjson.dumps({"id": "c", "model": "small", "choices": [], "usage": usage}) + b"\n\n"


@asynccontextmanager
async def sdk(pipeline: StandInPipeline, **more: Any) -> AsyncIterator[anthropic.AsyncAnthropic]:
    settings: dict[str, Any] = {"api_key": "unused", "max_retries": 0, **more}
    async with served(make_app(pipeline)) as url, anthropic.AsyncAnthropic(base_url=url, **settings) as client:
        yield client


async def test_a_message_is_answered_in_its_own_shape() -> None:
    pipeline = StandInPipeline(reply=lambda _: completion("Hi"))
    async with sdk(pipeline) as client:
        raw = await client.messages.with_raw_response.create(
            model="auto",
            max_tokens=9,
            system="Be brief.",
            messages=HELLO,
            stop_sequences=["x"],
            extra_body={"temperature": 0.5, "top_k": 3},  # newer models of theirs take none, older clients send them
        )
        message = await raw.parse()
    assert [block.type for block in message.content] == ["text"]
    assert (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == ("end_turn", 5, 1)
    assert raw.headers["x-appliance-target"] == SMALL.name
    assert raw.headers["request-id"] == raw.headers["x-request-id"]
    sent = pipeline.sent[0].body
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["max_tokens"], sent["temperature"], sent["top_k"], sent["stop"]) == (9, 0.5, 3, ["x"])
    assert pipeline.requests[0].endpoint == "messages"


async def test_a_conversation_with_tools_goes_on_with_what_the_sdk_was_given() -> None:
    pipeline = StandInPipeline(reply=calling)
    messages: Any = [{"role": "user", "content": "How is Bonn?"}]
    async with sdk(pipeline) as client:
        first = await client.messages.create(model="auto", max_tokens=50, messages=messages, tools=[WEATHER])
        use = first.content[-1]
        assert first.stop_reason == "tool_use" and use.type == "tool_use" and use.input == {"city": "Bonn"}
        result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "rainy"}]}
        messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        async with client.messages.stream(model="auto", max_tokens=50, messages=messages, tools=[WEATHER]) as stream:
            last = await stream.get_final_message()
    assert last.content[0].type == "text" and last.content[0].text == "It is rainy."
    assert pipeline.sent[1].body["messages"][-1] == {"role": "tool", "tool_call_id": "toolu_1", "content": "rainy"}
    assert pipeline.sent[1].body["messages"][-2]["tool_calls"] == [CALL]


async def test_a_stream_of_thinking_text_and_a_tool_call_is_put_together_by_the_sdk() -> None:
    def tool(**function: Any) -> dict[str, Any]:
        return {"tool_calls": [{"index": 0, "function": function}]}

    call = {"index": 0, "id": "t1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    pieces = [
        chunk({"role": "assistant", "content": ""}),
        chunk({"reasoning_content": "Hm"}) + chunk({"reasoning": "m."}),
        chunk({"thinking_blocks": [{"type": "thinking", "thinking": "Hmm.", "signature": "sig"}]}),
        chunk({"content": "Let"}),
        chunk({"content": " me"}),
        chunk({"tool_calls": [call]}),
        chunk(tool(arguments='{"city":')),
        chunk(tool(arguments='"Bonn"}')),
        chunk({}, "tool_calls"),
        usage_chunk(),
        DONE,
    ]
    async with (
        sdk(StandInPipeline(pieces=pieces)) as client,
        client.messages.stream(model="auto", max_tokens=50, messages=HELLO) as stream,
    ):
        kinds = [event.type async for event in stream]
        message = await stream.get_final_message()
    thinking, text, use = message.content
    assert thinking.type == "thinking" and (thinking.thinking, thinking.signature) == ("Hmm.", "sig")
    assert text.type == "text" and text.text == "Let me"
    assert use.type == "tool_use" and use.input == {"city": "Bonn"}
    assert (message.stop_reason, message.usage.input_tokens) == ("tool_use", 3)
    assert (message.usage.cache_read_input_tokens, message.usage.output_tokens) == (6, 4)
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"


async def test_thinking_blocks_of_other_providers_come_back_as_they_went() -> None:
    """Whoever made them wants them with the next request, and Anthropic's clients know only two kinds."""
    item = {"type": "reasoning", "id": "rs_1", "encrypted_content": "xyz"}
    signed = {**CALL, "extra_content": {"google": {"thought_signature": "c2ln"}}}
    message = {"role": "assistant", "content": None, "thinking_blocks": [item], "tool_calls": [signed]}
    pipeline = StandInPipeline(reply=lambda _: completion("", message=message, finish_reason="tool_calls"))
    async with sdk(pipeline) as client:
        first = await client.messages.create(model="auto", max_tokens=50, messages=HELLO, tools=[WEATHER])
        again: Any = [
            *HELLO,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "rainy"}]},
        ]
        await client.messages.create(model="auto", max_tokens=50, messages=again, tools=[WEATHER])
    assert pipeline.sent[1].body["messages"][1] == message


async def test_a_stop_sequence_is_told() -> None:
    pipeline = StandInPipeline(reply=lambda _: completion("Hi", stop_reason="END"))
    async with sdk(pipeline) as client:
        done = await client.messages.create(model="auto", max_tokens=9, messages=HELLO, stop_sequences=["END"])
    assert (done.stop_reason, done.stop_sequence) == ("stop_sequence", "END")


async def test_structured_output_is_verified_and_parsed() -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer"}},
        "required": ["age"],
        "additionalProperties": False,
    }
    pipeline = StandInPipeline(reply=lambda _: completion('{"age": 7}'))
    async with sdk(pipeline) as client:
        done = await client.messages.create(
            model="auto",
            max_tokens=9,
            messages=HELLO,
            output_config={"format": {"type": "json_schema", "schema": schema}, "effort": "low"},
        )
    assert done.content[0].type == "text" and orjson.loads(done.content[0].text) == {"age": 7}
    sent = pipeline.sent[0].body
    assert sent["response_format"]["json_schema"] == {"name": "answer", "schema": schema, "strict": True}
    assert "reasoning_effort" not in sent, "it does not reason, and answers all the same"


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (UnknownModel("no such model"), 404, "not_found_error"),
        (Forbidden("not you"), 403, "permission_error"),
        (Busy("full", retry_after_seconds=3), 429, "rate_limit_error"),
        (EngineBusy("full"), 529, "overloaded_error"),
        (Unavailable("down"), 529, "overloaded_error"),
        (DeadlineExceeded("late"), 504, "timeout_error"),
        (ApplianceError("broken"), 500, "api_error"),
    ],
)
async def test_errors_are_the_sdks_own_classes_with_our_words(error: ApplianceError, status: int, kind: str) -> None:
    async with sdk(StandInPipeline(error=error)) as client:
        with pytest.raises(anthropic.APIStatusError, match=error.message) as caught:
            await client.messages.create(model="auto", max_tokens=9, messages=HELLO)
    assert caught.value.status_code == status
    body: Any = caught.value.body
    assert body == {
        "type": "error",
        "error": {"type": kind, "message": error.message},
        "request_id": caught.value.request_id,
    }
    if error.retry_after_seconds:
        assert caught.value.response.headers["retry-after"] == "3"


async def test_the_sdk_tries_again_where_waiting_helps() -> None:
    pipeline = StandInPipeline(error=Busy("full", retry_after_seconds=0.01))
    async with sdk(pipeline, max_retries=1) as client:
        with pytest.raises(anthropic.RateLimitError):
            await client.messages.create(model="auto", max_tokens=9, messages=HELLO)
    assert len(pipeline.requests) == 2


@pytest.mark.parametrize(
    ("pieces", "error"),
    [(PIECES[:2], StreamBroken("cut off")), (PIECES[:2], None), ([PIECES[0], b"data: {]\n\n"], None)],
)
async def test_a_stream_that_is_cut_ends_with_an_error_event(pieces: Any, error: Exception | None) -> None:
    async with sdk(StandInPipeline(pieces=pieces, stream_error=error)) as client:
        with pytest.raises(anthropic.APIStatusError) as caught:
            async with client.messages.stream(model="auto", max_tokens=9, messages=HELLO) as stream:
                await stream.get_final_message()
    body: Any = caught.value.body
    assert body["error"]["type"] == "api_error"


async def test_tokens_are_counted() -> None:
    async with sdk(StandInPipeline()) as client:
        counted = await client.messages.count_tokens(
            model="auto",
            system="Be brief.",
            messages=HELLO,
            tools=[WEATHER],
            thinking={"type": "enabled", "budget_tokens": 2048},
        )
    assert counted.input_tokens > 20


async def test_models_are_listed_in_the_shape_of_who_asks() -> None:
    async with sdk(StandInPipeline()) as client:
        assert [model.id async for model in client.models.list()] == ["auto", SMALL.name]
        assert (await client.models.retrieve(SMALL.name)).max_input_tokens == SMALL.context_tokens
        with pytest.raises(anthropic.NotFoundError):
            await client.models.retrieve("claude-99")
        assert (await client.models.retrieve("claude-old")).max_input_tokens is None


GOOD_KEY = {"x-api-key": "secret"}
KEY = KeySettings(name="app", sha256=hashlib.sha256(b"secret").hexdigest())


@pytest.mark.parametrize(
    ("method", "path", "headers", "content", "status", "kind"),
    [
        ("POST", "/v1/messages", {}, b"{}", 401, "authentication_error"),
        ("POST", "/v1/messages", {"x-api-key": "wrong"}, b"{}", 401, "authentication_error"),
        ("GET", "/v1/messages", {"x-api-key": "secret"}, b"", 405, "invalid_request_error"),
        ("POST", "/v1/messages/batches", {"x-api-key": "secret"}, b"{}", 404, "not_found_error"),
        (
            "GET",
            "/v1/models/none",
            {"x-api-key": "secret", "anthropic-version": "2023-06-01"},
            b"",
            404,
            "not_found_error",
        ),
        ("POST", "/v1/messages", {"x-api-key": "secret"}, b"x" * 100_001, 413, "request_too_large"),
        ("POST", "/v1/messages", {"authorization": "Bearer secret"}, b"{", 400, "invalid_request_error"),
        (
            "POST",
            "/v1/messages",
            {"x-api-key": "secret", "content-encoding": "br"},
            b"{}",
            415,
            "invalid_request_error",
        ),
    ],
)
async def test_errors_before_the_endpoint_have_the_shape_too(
    method: str, path: str, headers: Mapping[str, str], content: bytes, status: int, kind: str
) -> None:
    app = make_app(StandInPipeline(), keys=[KEY])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://node") as http:
        response = await http.request(method, path, headers=headers, content=content)
    assert response.status_code == status
    body = response.json()
    assert set(body) == {"type", "error", "request_id"} and set(body["error"]) == {"type", "message"}
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert body["request_id"] == response.headers["request-id"]


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("messages", {"max_tokens": 9, "messages": HELLO}),
        ("/v1/messages", {"max_tokens": 9, "messages": HELLO}),
        ("responses", {"input": "Hello"}),
        ("generate_content", {"model": "models/auto", "contents": [{"parts": [{"text": "Hello"}]}]}),
    ],
)
async def test_bodies_of_every_dialect_are_explained(endpoint: str, body: dict[str, Any]) -> None:
    pipeline = StandInPipeline()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(pipeline)), base_url="http://node") as http:
        response = await http.post("/v1/explain", json={**body, "endpoint": endpoint})
    assert response.status_code == 200, response.text
    assert response.json()["endpoint"] == endpoint.removeprefix("/v1/")
    assert (pipeline.requests[0].text, pipeline.sent) == ("Hello", [])


async def test_an_event_that_cannot_be_read_ends_the_stream_and_the_work_behind_it() -> None:
    """What comes after it is not waited for."""
    pipeline = StandInPipeline(pieces=[PIECES[0], b"data: {]\n\n", *PIECES[1:]], hangs_after=2)
    async with served(make_app(pipeline)) as url, httpx.AsyncClient(base_url=url) as http:
        response = await http.post("/v1/messages", json={"max_tokens": 9, "messages": HELLO, "stream": True})
    assert response.text.rstrip().rpartition("event: ")[2].startswith("error\n")
    assert pipeline.answers[0].closed.is_set()
