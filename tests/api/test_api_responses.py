"""OpenAI's SDK and its newer API against the application."""

from collections.abc import Sequence
from typing import Any

import openai
import pydantic
import pytest

from appliance.errors import RequestError, StreamBroken
from tests.api.stand_ins import StandInPipeline
from tests.api.test_api_messages import CALL, DONE, calling, usage_chunk
from tests.api.test_api_sdk import PIECES, chunk, completion, sdk
from tests.wire.readers import read_responses as read

pytestmark = pytest.mark.anyio

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


class Person(pydantic.BaseModel):
    age: int


async def test_a_response_is_given_in_its_own_shape() -> None:
    pipeline = StandInPipeline(reply=lambda _: completion("Hi"))
    async with sdk(pipeline) as client:
        done = await client.responses.create(
            model="auto", instructions="Be brief.", input="Hello", max_output_tokens=9, metadata={"a": "b"}, store=False
        )
        counted = await client.responses.input_tokens.count(model="auto", input="Hello")
    assert (done.output_text, done.status, done.metadata) == ("Hi", "completed", {"a": "b"})
    assert done.usage is not None and done.usage.total_tokens == 6
    assert pipeline.sent[0].body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert pipeline.sent[0].body["max_completion_tokens"] == 9
    assert pipeline.requests[0].endpoint == "responses"
    assert counted.input_tokens > 0


async def test_a_conversation_with_tools_goes_on_with_what_the_sdk_was_given() -> None:
    pipeline = StandInPipeline(reply=calling)
    items: Any = [{"role": "user", "content": "How is Bonn?"}]
    async with sdk(pipeline) as client:
        first = await client.responses.create(model="auto", input=items, tools=[WEATHER])
        call = first.output[-1]
        assert call.type == "function_call" and call.arguments == '{"city":"Bonn"}'
        items += [item.model_dump() for item in first.output]
        items += [{"type": "function_call_output", "call_id": call.call_id, "output": "rainy"}]
        async with client.responses.stream(model="auto", input=items, tools=[WEATHER]) as stream:
            last = await stream.get_final_response()
    assert last.output_text == "It is rainy."
    assert pipeline.sent[1].body["messages"][1:] == [
        {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "rainy"},
    ]


async def test_a_stream_has_every_event_in_order_and_numbered() -> None:
    call = {"index": 0, "id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city":'}}
    rest = {"index": 0, "function": {"arguments": '"Bonn"}'}}
    pieces = [
        chunk({"role": "assistant", "reasoning_content": "Hm"}),
        chunk({"thinking_blocks": [{"type": "thinking", "thinking": "Hm", "signature": "sig"}]}),
        chunk({"content": "Let"}),
        chunk({"content": " me"}),
        chunk({"tool_calls": [call]}),
        chunk({"tool_calls": [rest]}),
        chunk({}, "tool_calls"),
        usage_chunk(),
        DONE,
    ]
    async with (
        sdk(StandInPipeline(pieces=pieces)) as client,
        client.responses.stream(model="auto", input="Hello") as stream,
    ):
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    reasoning, message, called = final.output
    assert reasoning.type == "reasoning" and reasoning.content is not None and reasoning.content[0].text == "Hm"
    assert message.type == "message" and final.output_text == "Let me"
    assert called.type == "function_call" and called.arguments == '{"city":"Bonn"}'
    assert final.usage is not None and final.usage.input_tokens_details.cached_tokens == 6
    again = read({"input": [item.model_dump() for item in final.output] + [{"role": "user", "content": "x"}]})[0]
    assert again.body["messages"][0]["thinking_blocks"][0]["signature"] == "sig"


async def test_reasoning_is_told_as_a_summary_to_who_wants_one() -> None:
    pieces = [chunk({"reasoning": "Hm"}), *PIECES]
    async with (
        sdk(StandInPipeline(pieces=pieces)) as client,
        client.responses.stream(model="auto", input="Hello", reasoning={"summary": "auto", "effort": "low"}) as stream,
    ):
        final = await stream.get_final_response()
    assert final.output[0].type == "reasoning" and final.output[0].summary[0].text == "Hm"
    assert final.output_text == "Hello"


async def test_a_schema_is_verified_and_parsed() -> None:
    async with sdk(StandInPipeline(reply=lambda _: completion('{"age": 7}'))) as client:
        done = await client.responses.parse(model="auto", input="Hello", text_format=Person)
    assert done.output_parsed == Person(age=7)


async def test_log_probabilities_are_told_where_they_were_asked_for() -> None:
    token = {
        "token": "Hi",
        "logprob": -0.1,
        "bytes": None,
        "top_logprobs": [{"token": "Ho", "logprob": -2, "bytes": []}],
    }
    pipeline = StandInPipeline(reply=lambda _: completion("Hi", logprobs={"content": [token]}))
    async with sdk(pipeline) as client:
        done = await client.responses.create(
            model="auto", input="Hello", top_logprobs=1, include=["message.output_text.logprobs"]
        )
    message = done.output[0]
    assert message.type == "message" and message.content[0].type == "output_text"
    logprobs = message.content[0].logprobs
    assert logprobs is not None and logprobs[0].bytes == [72, 105] and logprobs[0].top_logprobs[0].logprob == -2
    assert pipeline.requests[0].needs == {"chat", "logprobs"}


async def test_an_answer_that_was_too_long_is_incomplete() -> None:
    async with sdk(StandInPipeline(reply=lambda _: completion("Hi", finish_reason="length"))) as client:
        done = await client.responses.create(model="auto", input="Hello", max_output_tokens=1)
    assert done.status == "incomplete"
    assert done.incomplete_details is not None and done.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize("error", [StreamBroken("cut off"), None])
async def test_a_stream_that_is_cut_ends_with_an_error_and_as_failed(error: Exception | None) -> None:
    async with sdk(StandInPipeline(pieces=PIECES[:2], stream_error=error)) as client:
        stream = await client.responses.create(model="auto", input="Hello", stream=True)
        events = [event async for event in stream]
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    failed = events[-1]
    assert failed.type == "response.failed" and failed.response.error is not None
    assert failed.response.error.code == "server_error"


CALLED: Sequence[Any] = [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ({"input": [{"type": "computer_call"}]}, "input[0].type"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id"),
    ({"input": [*CALLED, {"type": "function_call_output", "call_id": "c"}]}, "input[1].output"),
    ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "gAAA"}]}, "input[0].encrypted_content"),
    ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input[0].content[0].type"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"store": True}, "store"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0].type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "web_search_preview"}}, "tool_choice.type"),
    ({"include": ["file_search_call.results"]}, "include[0]"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 1}}}}, "text.format.schema"),
    ({"reasoning": {"effort": "enormous"}}, "reasoning.effort"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"messages": []}, "messages"),
]


@pytest.mark.parametrize(("change", "param"), REFUSED)
async def test_what_cannot_be_carried_over_is_refused_by_its_name(change: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        read({"model": "auto", "input": "Hello", **change})
    assert refused.value.param == param


async def test_nothing_is_kept_between_requests_and_the_sdk_is_told_so() -> None:
    async with sdk(StandInPipeline()) as client:
        with pytest.raises(openai.BadRequestError, match="previous_response_id"):
            await client.responses.create(model="auto", input="Hello", previous_response_id="resp_1")


async def test_allowed_tools_are_those_that_are_offered() -> None:
    other = {**WEATHER, "name": "other"}
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
    body = read({"input": "x", "tools": [WEATHER, other], "tool_choice": choice})[0].body
    assert [tool["function"]["name"] for tool in body["tools"]] == ["weather"]
    assert body["tool_choice"] == "required"
