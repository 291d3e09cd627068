"""The official OpenAI SDK against the application, unchanged but for its base URL."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import orjson
import pytest

from appliance.core import UpstreamCall
from appliance.errors import Busy
from tests.api.stand_ins import SMALL, StandInPipeline, make_app, served

pytestmark = pytest.mark.anyio

HELLO: Any = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "small", "choices": [choice]}
    return b"data: " + orjson.dumps(body) + b"\n\n"


PIECES = [
    chunk({"role": "assistant", "content": "Hel"}),
    chunk({"content": "lo"}),
    chunk({}, "stop"),
    b"data: [DONE]\n\n",
]


def completion(content: str, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop", **more}
    usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "small", "choices": [choice], "usage": usage}


@asynccontextmanager
async def sdk(pipeline: StandInPipeline) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        served(make_app(pipeline)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):
        yield client


async def test_chat_with_logprobs() -> None:
    token = {"token": "Hi", "logprob": -0.1, "bytes": [72, 105], "top_logprobs": []}
    pipeline = StandInPipeline(reply=lambda _: completion("Hi", logprobs={"content": [token]}))
    async with sdk(pipeline) as client:
        done = await client.chat.completions.create(model="auto", messages=HELLO, logprobs=True, top_logprobs=2)
    assert done.choices[0].message.content == "Hi"
    assert done.choices[0].logprobs is not None and done.choices[0].logprobs.content is not None
    assert pipeline.requests[0].needs == {"chat", "logprobs"}


async def test_a_stream_and_its_headers() -> None:
    pipeline = StandInPipeline(pieces=PIECES)
    async with sdk(pipeline) as client:
        raw = await client.chat.completions.with_raw_response.create(model="auto", messages=HELLO, stream=True)
        text = [piece.choices[0].delta.content async for piece in raw.parse()]
    assert "".join(part or "" for part in text) == "Hello"
    assert raw.headers["x-appliance-target"] == SMALL.name


async def test_a_json_schema_stream_parses_to_the_object() -> None:
    pipeline = StandInPipeline(reply=lambda _: completion('{"age": 7}'))
    format: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    async with sdk(pipeline) as client:
        stream = await client.chat.completions.create(
            model="auto",
            messages=HELLO,
            response_format=format,
            stream=True,
            stream_options={"include_usage": True},
        )
        pieces = [piece async for piece in stream]
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert orjson.loads(text) == {"age": 7}
    assert pieces[-1].usage is not None and pieces[-1].usage.total_tokens == 6


async def test_tool_calls_in_a_stream_are_put_together() -> None:
    calls = [{"id": "t", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bonn"}'}}]
    reply = completion(
        "", message={"role": "assistant", "content": None, "tool_calls": calls}, finish_reason="tool_calls"
    )
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    async with (
        sdk(StandInPipeline(reply=lambda _: reply)) as client,
        client.chat.completions.stream(model="auto", messages=HELLO, tools=[tool]) as stream,
    ):
        final = await stream.get_final_completion()
    assert final.choices[0].message.tool_calls is not None
    assert final.choices[0].message.tool_calls[0].function.arguments == '{"city":"Bonn"}'


async def test_completions() -> None:
    reply = {"id": "c", "object": "text_completion", "created": 1, "model": "small", "choices": [{"text": " world"}]}
    async with sdk(StandInPipeline(reply=lambda _: reply)) as client:
        done = await client.completions.create(model="auto", prompt="Hello")
    assert done.choices[0].text == " world"


def scores(outgoing: UpstreamCall) -> dict[str, Any]:
    """Every label half as likely as the one before it."""
    sets = outgoing.body["label_sets"]
    rows = [
        [{"label": label, "logprob": -0.7 * place} for place, label in enumerate(sets[item["labels"]])]
        for item in outgoing.body["items"]
    ]
    return {"results": [{"labels": row, "label_mass": 0.5} for row in rows]}


async def test_decisions_of_all_kinds() -> None:
    async with sdk(StandInPipeline(reply=scores)) as client:
        decision = await client.decisions.create(
            model="auto",
            input=[{"role": "user", "content": [{"type": "input_text", "text": "Pay me now!"}]}],
            questions=[
                {"type": "predicate", "name": "urgent", "instructions": "It is urgent."},
                {"type": "choice", "instructions": "Really?", "choices": [{"value": True}, {"value": "true"}]},
                {"type": "score", "instructions": "Anger", "levels": [{"label": "calm"}, {"label": "furious"}]},
            ],
        )
    urgent, really, anger = decision.answers
    assert urgent.type == "predicate" and urgent.name == "urgent" and 0.5 < urgent.probability < 1
    assert really.type == "choice" and really.choice is True
    assert [row.value for row in really.probabilities] == [True, "true"]
    assert anger.type == "score" and 0 < anger.score < 1
    assert decision.usage.input_tokens == 10
    assert urgent.model_extra == {"label_mass": 0.5}


async def test_models() -> None:
    async with sdk(StandInPipeline()) as client:
        names = [model.id async for model in client.models.list()]
        assert names == ["auto", SMALL.name]
        assert (await client.models.retrieve(SMALL.name)).owned_by == "onsite"
        assert (await client.models.retrieve("small")).owned_by == "onsite"
        renamed = await client.models.retrieve("gpt-old")
        assert (renamed.id, renamed.owned_by) == ("gpt-old", "onsite")
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("gpt-99")


async def test_errors_are_the_sdks_own_classes_with_our_words() -> None:
    async with sdk(StandInPipeline()) as client:
        with pytest.raises(openai.BadRequestError, match="messages is empty") as refused:
            await client.chat.completions.create(model="auto", messages=[])
    assert (refused.value.param, refused.value.code) == ("messages", "invalid_request")
    async with sdk(StandInPipeline(error=Busy("full", retry_after_seconds=3))) as client:
        with pytest.raises(openai.RateLimitError) as busy:
            await client.chat.completions.create(model="auto", messages=HELLO)
    assert busy.value.response.headers["retry-after"] == "3"
