"""Every outbound dialect against a stand-in that is built of the official SDK's types and validates what it gets."""

import base64
from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson
import pytest
from openai.types.chat import ChatCompletion

from appliance.core import Usage
from appliance.errors import (
    ApplianceError,
    BackendAuth,
    BackendError,
    BackendOverloaded,
    BackendRefused,
    ContextTooLong,
    StreamBroken,
    Unsupported,
)
from tests.providers.reached import SPOKEN, Reached, Spoken, reached
from tests.providers.speech import (
    CACHED,
    CALLS,
    HELLO,
    REFUSES,
    SHORT,
    THINKS,
    THINKS_AND_CALLS,
    TWO_CALLS,
    Cut,
    Fail,
    Say,
)

pytestmark = pytest.mark.anyio

ASK: Mapping[str, Any] = {"messages": [{"role": "user", "content": "How is the weather?"}]}
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\nnot much of a picture").decode()
WEATHER: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CLOCK: Mapping[str, Any] = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(params=SPOKEN)
def spoken(request: pytest.FixtureRequest) -> Spoken:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
async def cloud(spoken: Spoken) -> AsyncIterator[Reached]:
    async with reached(spoken) as made:
        yield made
        assert made.api.wrongs == [], "what was sent is not what the SDK's types say"


async def both(cloud: Reached, body: Mapping[str, Any]) -> list[tuple[dict[str, Any], str, Usage]]:
    """The message, how it ended and what it cost: whole, and put together from a stream."""
    reply = await cloud.send(body)
    ChatCompletion.model_validate(reply.payload, strict=True)
    choice = reply.payload["choices"][0]
    came, opened = await cloud.stream(body)
    assert came.is_done and opened.is_whole
    assert opened.usage == reply.usage
    assert came.usage == reply.payload["usage"]
    whole = {name: value for name, value in choice["message"].items() if value is not None}
    streamed = {name: value for name, value in came.message.items() if value not in (None, "")}
    assert streamed == whole, "a stream says the same as the whole reply"
    return [(choice["message"], choice["finish_reason"], reply.usage), (came.message, came.finishes[0], reply.usage)]


# --- answers


async def test_a_text_comes_back_as_it_was_said(cloud: Reached) -> None:
    for message, finish, usage in await both(cloud, ASK):
        assert (message["role"], message["content"], finish) == ("assistant", HELLO.text, "stop")
        assert usage == Usage(prompt_tokens=20, completion_tokens=9)


async def test_tool_calls_come_back_with_ids_and_json_arguments(cloud: Reached) -> None:
    cloud.api.says = TWO_CALLS
    for message, finish, _ in await both(cloud, {**ASK, "tools": [WEATHER, CLOCK]}):
        assert finish == "tool_calls" and message["content"] == "Let me look."
        first, second = message["tool_calls"]
        assert (first["id"], first["type"], first["function"]["name"]) == ("call_1", "function", "weather")
        assert orjson.loads(first["function"]["arguments"]) == {"city": "Ulm", "days": 2}
        assert (second["id"], orjson.loads(second["function"]["arguments"])) == ("call_2", {})


async def test_an_answer_that_was_cut_short_says_so(cloud: Reached) -> None:
    cloud.api.says = SHORT
    for message, finish, _ in await both(cloud, ASK):
        assert (message["content"], finish) == ("Once upon a", "length")


async def test_a_refusal_is_a_refusal(cloud: Reached, spoken: Spoken) -> None:
    cloud.api.says = REFUSES
    for message, finish, _ in await both(cloud, ASK):
        assert message["refusal"] == "I will not help with that." and not message.get("content")
        assert finish == ("content_filter" if spoken in ("anthropic", "gemini") else "stop")


async def test_what_is_thought_counts_as_output(cloud: Reached, spoken: Spoken) -> None:
    cloud.api.says = THINKS
    for message, _, usage in await both(cloud, {**ASK, "reasoning_effort": "low"}):
        assert (usage.completion_tokens, usage.reasoning_tokens) == (30, 21)
        if spoken != "openai":
            assert message["reasoning_content"] == "Clouds are grey."


async def test_cached_tokens_are_part_of_the_prompt_and_writing_costs_more(cloud: Reached, spoken: Spoken) -> None:
    cloud.api.says = CACHED
    ((_, _, usage), _) = await both(cloud, ASK)
    assert (usage.prompt_tokens, usage.cached_tokens) == (1000, 600)
    assert cloud.target.price is not None
    plain = (1000 * 2.0 + 9 * 8.0) / 1e6
    if spoken == "gemini":
        assert usage.cache_write_tokens == 0
    elif spoken == "anthropic":
        assert (usage.cache_write_tokens, usage.cache_write_long_tokens) == (300, 100)
        assert cloud.target.price.cost_usd(usage) == pytest.approx(plain + (200 * 0.25 + 100 * 1.0) * 2.0 / 1e6)
    else:
        assert usage.cache_write_tokens == 300
        assert cloud.target.price.cost_usd(usage) == pytest.approx(plain + 300 * 0.25 * 2.0 / 1e6)


# --- conversations


@pytest.mark.parametrize("says", [CALLS, THINKS_AND_CALLS])
async def test_a_conversation_with_a_tool_can_be_continued(cloud: Reached, says: Say, spoken: Spoken) -> None:
    """The message of the first answer goes back as it came, whole or from a stream, with the tool's result."""
    cloud.api.says = says
    body = {**ASK, "tools": [WEATHER], "reasoning_effort": "medium"}
    for message, _, _ in await both(cloud, body):
        cloud.api.plan = [HELLO]
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": '{"degrees": 12}'}
        messages = [*body["messages"], message, result, {"role": "user", "content": "And tomorrow?"}]
        reply = await cloud.send({**body, "messages": messages})
        assert reply.payload["choices"][0]["message"]["content"] == HELLO.text
        sent = orjson.dumps(cloud.api.bodies[-1]).decode()
        assert "degrees" in sent and "And tomorrow?" in sent
        if says.thought:
            secret = {"anthropic": "c2lnbmF0dXJl", "gemini": "c2lnbmVkIGJ5IHRoZSBtb2RlbA==", "responses": "gAAAAAB-"}
            assert secret.get(spoken, "") in sent, "what the provider wants back was given back"


async def test_another_models_thoughts_stay_with_it(cloud: Reached, spoken: Spoken) -> None:
    past = {
        "role": "assistant",
        "content": "Twelve degrees.",
        "reasoning_content": "private thoughts",
        "thinking_blocks": [{"type": "of another kind", "data": "private thoughts"}],
        "extra_content": {"other": {"data": "private thoughts"}},
    }
    await cloud.send({"messages": [*ASK["messages"], past, {"role": "user", "content": "Sure?"}]})
    assert "private thoughts" not in orjson.dumps(cloud.api.bodies[-1]).decode()


async def test_pictures_are_carried_over(cloud: Reached) -> None:
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}", "detail": "auto"}},
        {"type": "image_url", "image_url": {"url": "https://example.org/cat.jpg"}},
    ]
    await cloud.send({"messages": [{"role": "user", "content": parts}]})
    sent = orjson.dumps(cloud.api.bodies[-1]).decode()
    assert PNG in sent and "https://example.org/cat.jpg" in sent


async def test_instructions_of_both_names_come_first(cloud: Reached, spoken: Spoken) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Be kind."}]
    await cloud.send({"messages": [*messages, *ASK["messages"]]})
    body = cloud.api.bodies[-1]
    where = {"anthropic": "system", "gemini": "systemInstruction", "openai": "messages", "responses": "input"}[spoken]
    told = orjson.dumps(body[where]).decode()
    assert told.index("Be brief.") < told.index("Be kind.")


async def test_settings_are_carried_over(cloud: Reached, spoken: Spoken) -> None:
    settings = {"max_completion_tokens": 77, "user": "u-1", "service_tier": "default"}
    sampled = {} if spoken == "anthropic" else {"temperature": 0.2, "top_p": 0.9}
    more = {} if spoken in ("responses", "anthropic") else {"seed": 7}
    stops = {} if spoken == "responses" else {"stop": ["END", "STOP"]}
    await cloud.send({**ASK, **settings, **sampled, **more, **stops})
    body = cloud.api.bodies[-1]
    told = orjson.dumps(body).decode()
    assert "77" in told
    for word in ("0.2", "0.9") if sampled else ():
        assert word in told
    assert ("END" in told) is bool(stops)
    if spoken == "anthropic":
        assert (body["max_tokens"], body["stop_sequences"]) == (77, ["END", "STOP"])
        assert body["metadata"] == {"user_id": "u-1"} and body["service_tier"] == "standard_only"
    if spoken == "gemini":
        assert body["generationConfig"]["seed"] == 7 and body["serviceTier"] == "standard"


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "minLength": 1}, "at": {"type": "object", "properties": {}}},
    "required": ["city"],
}


async def test_structured_output_is_asked_for_in_the_dialects_own_way(cloud: Reached, spoken: Spoken) -> None:
    cloud.api.says = Say(text='{"city":"Ulm"}')
    format = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    for message, finish, _ in await both(cloud, {**ASK, "response_format": format}):
        assert orjson.loads(message["content"]) == {"city": "Ulm"} and finish == "stop"
    body = cloud.api.bodies[-1]
    if spoken == "anthropic":
        sent = body["output_config"]["format"]["schema"]
        assert sent["additionalProperties"] is False and sent["properties"]["at"]["additionalProperties"] is False
        assert sent["properties"]["city"] == {"type": "string", "description": "{minLength: 1}"}
    if spoken == "gemini":
        assert body["generationConfig"]["responseJsonSchema"] == SCHEMA


async def test_json_without_a_schema_comes_as_json(cloud: Reached) -> None:
    cloud.api.says = Say(text='{"city":"Ulm"}')
    for message, finish, _ in await both(cloud, {**ASK, "response_format": {"type": "json_object"}}):
        assert orjson.loads(message["content"]) == {"city": "Ulm"} and finish == "stop"
        assert "tool_calls" not in message


CHOICES: list[Any] = ["auto", "none", "required", {"type": "function", "function": {"name": "clock"}}]


@pytest.mark.parametrize("choice", CHOICES, ids=["auto", "none", "required", "named"])
async def test_the_choice_of_tools_is_carried_over(cloud: Reached, spoken: Spoken, choice: Any) -> None:
    await cloud.send({**ASK, "tools": [WEATHER, CLOCK], "tool_choice": choice})
    body = cloud.api.bodies[-1]
    name = choice if isinstance(choice, str) else "named"
    if spoken == "anthropic":
        told = {"auto": {"type": "auto"}, "none": {"type": "none"}, "required": {"type": "any"}}
        assert body["tool_choice"] == told.get(name, {"type": "tool", "name": "clock"})
    if spoken == "gemini":
        told = {"auto": {"mode": "AUTO"}, "none": {"mode": "NONE"}, "required": {"mode": "ANY"}}
        named = {"mode": "ANY", "allowedFunctionNames": ["clock"]}
        assert body["toolConfig"]["functionCallingConfig"] == told.get(name, named)


# --- refusals before anything is sent

REFUSED: list[tuple[Spoken, dict[str, Any], str]] = [
    ("anthropic", {"n": 2}, "n"),
    ("anthropic", {"seed": 1}, "seed"),
    ("anthropic", {"logprobs": True}, "logprobs"),
    ("anthropic", {"logit_bias": {"5": 1}}, "logit_bias"),
    ("anthropic", {"presence_penalty": 0.5}, "presence_penalty"),
    ("anthropic", {"temperature": 0.2}, "temperature"),
    ("anthropic", {"store": True}, "store"),
    ("anthropic", {"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ("anthropic", {"web_search_options": {}}, "web_search_options"),
    ("anthropic", {"metadata": {"run": "7"}}, "metadata.run"),
    ("anthropic", {"service_tier": "flex"}, "service_tier"),
    ("anthropic", {"a_new_field": 1}, "a_new_field"),
    ("anthropic", {"response_format": {"type": "json_object"}, "tools": [WEATHER]}, "response_format"),
    ("anthropic", {"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0]"),
    ("gemini", {"store": True}, "store"),
    ("gemini", {"logit_bias": {"5": 1}}, "logit_bias"),
    ("gemini", {"seed": 2**40}, "seed"),
    ("gemini", {"stop": list("abcdef")}, "stop"),
    ("gemini", {"parallel_tool_calls": False, "tools": [WEATHER]}, "parallel_tool_calls"),
    ("gemini", {"a_new_field": 1}, "a_new_field"),
    ("responses", {"n": 2}, "n"),
    ("responses", {"stop": "END"}, "stop"),
    ("responses", {"seed": 1}, "seed"),
    ("responses", {"frequency_penalty": 1}, "frequency_penalty"),
    ("openai", {"top_k": 4}, "top_k"),
]


@pytest.mark.parametrize(("spoken", "fields", "param"), REFUSED)
async def test_what_cannot_be_carried_over_is_refused_by_name_and_never_sent(
    spoken: Spoken, fields: dict[str, Any], param: str
) -> None:
    async with reached(spoken) as cloud:
        with pytest.raises(Unsupported) as caught:
            await cloud.send({**ASK, **fields})
        assert caught.value.param == param and param in caught.value.message
        assert cloud.api.bodies == []


PARTS: list[tuple[Spoken, dict[str, Any], str]] = [
    ("anthropic", {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "messages[1].content[0]"),
    ("anthropic", {"role": "user", "content": "x", "name": "Eve"}, "messages[1].name"),
    (
        "anthropic",
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/tiff;base64,AAAA"}}]},
        "messages[1].content[0]",
    ),
    ("gemini", {"role": "system", "content": "late"}, "messages[1].role"),
    (
        "gemini",
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/x"}}]},
        "messages[1].content[0].image_url",
    ),
    ("responses", {"role": "user", "content": [{"type": "input_audio"}]}, "messages[1].content[0]"),
]


@pytest.mark.parametrize(("spoken", "message", "param"), PARTS)
async def test_a_part_that_cannot_be_carried_over_is_refused_by_its_place(
    spoken: Spoken, message: dict[str, Any], param: str
) -> None:
    async with reached(spoken) as cloud:
        with pytest.raises(Unsupported) as caught:
            await cloud.send({"messages": [*ASK["messages"], message]})
        assert caught.value.param == param
        assert cloud.api.bodies == []


async def test_values_that_say_what_happens_anyway_are_no_obstacle(cloud: Reached) -> None:
    harmless = {"n": 1, "temperature": 1.0, "presence_penalty": 0, "logprobs": False, "logit_bias": {}, "store": False}
    await cloud.send({**ASK, **harmless, "seed": None, "prompt_cache_key": "k"})
    assert len(cloud.api.bodies) == 1


async def test_several_choices_are_gemini_candidates() -> None:
    async with reached("gemini") as cloud:
        reply = await cloud.send({**ASK, "n": 3})
        assert [choice["index"] for choice in reply.payload["choices"]] == [0, 1, 2]


# --- errors

CONTEXT = {
    "openai": Fail(400, "context_length_exceeded", "This model's maximum context length is 8 tokens."),
    "responses": Fail(400, "context_length_exceeded", "Your input exceeds the context window of this model."),
    "anthropic": Fail(400, "invalid_request_error", "prompt is too long: 210000 tokens > 200000 maximum"),
    "gemini": Fail(400, "INVALID_ARGUMENT", "The input token count (1200000) exceeds the maximum number of tokens"),
}
BUSY = {
    "openai": Fail(429, "rate_limit_exceeded", headers={"retry-after": "7"}),
    "responses": Fail(429, "rate_limit_exceeded", headers={"retry-after-ms": "7000"}),
    "anthropic": Fail(529, "overloaded_error", headers={"retry-after": "7"}),
    "gemini": Fail(429, "RESOURCE_EXHAUSTED", headers={"retry-after": "7"}),
}
UNKNOWN_KEY = {
    "openai": Fail(401, "invalid_api_key", "Incorrect API key provided: sk-se***ret"),
    "responses": Fail(401, "invalid_api_key", "Incorrect API key provided: sk-se***ret"),
    "anthropic": Fail(401, "authentication_error", "invalid x-api-key sk-secret"),
    "gemini": Fail(403, "PERMISSION_DENIED", "key sk-secret is not known"),
}


@pytest.mark.parametrize("stream", [False, True])
async def test_each_providers_errors_are_ours(cloud: Reached, spoken: Spoken, stream: bool) -> None:
    async def fails(fail: Fail) -> ApplianceError:
        cloud.api.says = fail
        with pytest.raises(ApplianceError) as caught:
            await (cloud.stream(ASK) if stream else cloud.send(ASK))
        assert "sk-" not in caught.value.message
        return caught.value

    assert isinstance(await fails(CONTEXT[spoken]), ContextTooLong)
    busy = await fails(BUSY[spoken])
    assert isinstance(busy, BackendOverloaded) and busy.retry_after_seconds == 7.0
    assert isinstance(await fails(UNKNOWN_KEY[spoken]), BackendAuth)
    broken = await fails(Fail(500, {"anthropic": "api_error", "gemini": "INTERNAL"}.get(spoken, "server_error")))
    assert type(broken) is BackendError and broken.fallback


async def test_a_stream_that_is_cut_never_ends_cleanly(cloud: Reached) -> None:
    cloud.api.says = Cut()
    with pytest.raises(StreamBroken, match="in the middle"):
        await cloud.stream(ASK)


async def test_an_error_in_the_middle_of_a_stream_breaks_it(cloud: Reached, spoken: Spoken) -> None:
    kind = {"anthropic": "overloaded_error", "gemini": "UNAVAILABLE"}.get(spoken, "server_error")
    cloud.api.says = Fail(503, kind, "the model is gone", late=True)
    # where it came together with the first event, nothing has been passed on and another target may be asked
    with pytest.raises(BackendError, match="the model is gone") as caught:
        await cloud.stream(ASK)
    assert isinstance(caught.value, StreamBroken | BackendOverloaded)


async def test_a_field_that_the_provider_does_not_take_is_its_refusal(cloud: Reached, spoken: Spoken) -> None:
    kind = {"gemini": "INVALID_ARGUMENT"}.get(spoken, "invalid_request_error")
    cloud.api.says = Fail(400, kind, "that will not do")
    with pytest.raises(BackendRefused, match="that will not do"):
        await cloud.send(ASK)
