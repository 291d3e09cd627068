"""Google's SDK against the application, unchanged but for its base URL."""

import base64
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import orjson
import pydantic
import pytest

from appliance.api.error_middleware import ErrorMiddleware
from appliance.config import KeySettings
from appliance.errors import Busy, RequestError, StreamBroken
from tests.api.stand_ins import SMALL, StandInPipeline, make_app, served
from tests.api.test_api_messages import DONE, usage_chunk
from tests.api.test_api_sdk import PIECES, chunk, completion
from tests.google_sdk import AsyncClient, errors, genai, types
from tests.wire.readers import read_contents as read

pytestmark = [
    pytest.mark.anyio,
    # The SDK's own dealings with its HTTP library.
    pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession:DeprecationWarning"),
]

HELLO: Any = [{"role": "user", "parts": [{"text": "Hello"}]}]
WEATHER = {
    "name": "weather",
    "parameters": {"type": "OBJECT", "properties": {"city": {"type": "STRING"}}, "required": ["city"]},
}
CALL = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bonn"}'}}


class Person(pydantic.BaseModel):
    age: int


@asynccontextmanager
async def sdk(pipeline: StandInPipeline) -> AsyncIterator[AsyncClient]:
    async with served(make_app(pipeline)) as url:
        client = genai.Client(api_key="unused", http_options=types.HttpOptions(base_url=url))
        try:
            yield client.aio
        finally:
            await client.aio.aclose()
            client.close()


def calling(outgoing: Any) -> dict[str, Any]:
    last = outgoing.body["messages"][-1]
    if last["role"] != "tool":
        signed = {**CALL, "extra_content": {"google": {"thought_signature": "c2ln"}}}
        message = {"role": "assistant", "content": None, "tool_calls": [signed]}
        return completion("", message=message, finish_reason="tool_calls")
    return completion(f"It is {last['content']}.")


async def test_contents_are_answered_in_their_own_shape() -> None:
    pipeline = StandInPipeline(reply=lambda _: completion("Hi"))
    config = types.GenerateContentConfig(
        system_instruction="Be brief.",
        temperature=0.5,
        top_k=3,
        max_output_tokens=9,
        stop_sequences=["x"],
        seed=7,
        safety_settings=[
            types.SafetySetting(
                category=types.HarmCategory.HARM_CATEGORY_HARASSMENT, threshold=types.HarmBlockThreshold.BLOCK_NONE
            )
        ],
    )
    async with sdk(pipeline) as client:
        done = await client.models.generate_content(model=SMALL.name, contents="Hello", config=config)
    assert done.text == "Hi" and done.usage_metadata is not None
    assert (done.usage_metadata.prompt_token_count, done.usage_metadata.total_token_count) == (5, 6)
    assert done.candidates is not None and done.candidates[0].finish_reason == types.FinishReason.STOP
    sent = pipeline.sent[0].body
    assert sent["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert (sent["temperature"], sent["top_k"], sent["max_completion_tokens"], sent["seed"]) == (0.5, 3, 9, 7)
    assert (pipeline.requests[0].endpoint, pipeline.requests[0].model) == ("generate_content", SMALL.name)


async def test_a_conversation_with_tools_goes_on_with_what_the_sdk_was_given() -> None:
    pipeline = StandInPipeline(reply=calling)
    tools: Any = [types.Tool(function_declarations=[types.FunctionDeclaration.model_validate(WEATHER)])]
    async with sdk(pipeline) as client:
        chat = client.chats.create(model="auto", config=types.GenerateContentConfig(tools=tools))
        first = await chat.send_message("How is Bonn?")
        assert first.function_calls is not None and first.function_calls[0].args == {"city": "Bonn"}
        part = types.Part.from_function_response(name="weather", response={"result": "rainy"})
        last = await chat.send_message([part])
    assert last.text == "It is rainy."
    sent = pipeline.sent[1].body["messages"]
    assert sent[2]["content"] == "rainy" and sent[2]["tool_call_id"] == sent[1]["tool_calls"][0]["id"]
    assert sent[1]["tool_calls"][0]["extra_content"] == {"google": {"thought_signature": "c2ln"}}
    tool = pipeline.sent[0].body["tools"][0]["function"]
    assert tool["parameters"]["type"] == "object" and tool["parameters"]["properties"]["city"] == {"type": "string"}


async def test_a_stream_gives_text_as_it_comes_and_calls_when_they_are_whole() -> None:
    begun = {**CALL, "index": 0, "function": {"name": "weather", "arguments": '{"city":'}}
    rest = {"index": 0, "function": {"arguments": '"Bonn"}'}}
    pieces = [
        chunk({"reasoning_content": "Hm"}),
        chunk({"content": "Let"}),
        chunk({"content": " me"}),
        chunk({"tool_calls": [begun]}),
        chunk({"tool_calls": [rest]}),
        chunk({}, "tool_calls"),
        usage_chunk(),
        DONE,
    ]
    config = types.GenerateContentConfig(thinking_config=types.ThinkingConfig(include_thoughts=True))
    async with sdk(StandInPipeline(pieces=pieces)) as client:
        stream = await client.models.generate_content_stream(model="auto", contents="Hello", config=config)
        responses = [one async for one in stream]
    parts: list[types.Part] = [part for one in responses for part in one.parts or ()]
    assert [(part.text, part.thought) for part in parts[:3]] == [("Hm", True), ("Let", None), (" me", None)]
    assert parts[3].function_call is not None and parts[3].function_call.args == {"city": "Bonn"}
    usage = responses[-1].usage_metadata
    assert usage is not None and (usage.prompt_token_count, usage.cached_content_token_count) == (9, 6)


async def test_without_events_a_stream_is_one_list() -> None:
    app = make_app(StandInPipeline(pieces=PIECES))
    async with served(app) as url, httpx.AsyncClient(base_url=url) as http:
        response = await http.post("/v1beta/models/auto:streamGenerateContent", json={"contents": HELLO})
    assert response.headers["content-type"].startswith("application/json")
    texts = [row["candidates"][0]["content"]["parts"][0]["text"] for row in response.json()]
    assert texts == ["Hel", "lo", ""]


@pytest.mark.parametrize("error", [StreamBroken("cut off"), None])
async def test_a_stream_that_is_cut_ends_with_an_error(error: Exception | None) -> None:
    pipeline = StandInPipeline(pieces=PIECES[:2], stream_error=error)
    async with sdk(pipeline) as client:
        stream = await client.models.generate_content_stream(model="auto", contents="Hello")
        with pytest.raises(errors.ServerError, match="UNAVAILABLE"):
            [one async for one in stream]
    async with served(make_app(pipeline)) as url, httpx.AsyncClient(base_url=url) as http:
        response = await http.post("/v1beta/models/auto:streamGenerateContent", json={"contents": HELLO})
    assert "error" in response.json()[-1]


async def test_a_schema_is_verified_and_parsed() -> None:
    config = types.GenerateContentConfig(response_mime_type="application/json", response_schema=Person)
    async with sdk(StandInPipeline(reply=lambda _: completion('{"age": 7}'))) as client:
        done = await client.models.generate_content(model="auto", contents="Hello", config=config)
    assert done.parsed == Person(age=7)


async def test_tokens_are_counted_and_models_listed() -> None:
    async with sdk(StandInPipeline()) as client:
        counted = await client.models.count_tokens(model="auto", contents="Hello")
        names = [model.name async for model in await client.models.list()]
        model = await client.models.get(model=SMALL.name)
    assert counted.total_tokens and names == ["models/auto", f"models/{SMALL.name}"]
    assert model.input_token_limit == SMALL.context_tokens


async def test_errors_are_the_sdks_own_classes_with_our_words() -> None:
    async with sdk(StandInPipeline(error=Busy("full", retry_after_seconds=1.5))) as client:
        with pytest.raises(errors.ClientError, match="full") as busy:
            await client.models.generate_content(model="auto", contents="Hello")
    assert (busy.value.code, busy.value.status) == (429, "RESOURCE_EXHAUSTED")
    details: Any = busy.value.details
    kinds = {one["@type"].rpartition(".")[2]: one for one in details["error"]["details"]}
    assert kinds["RetryInfo"]["retryDelay"] == "1.500s" and kinds["ErrorInfo"]["reason"] == "CAPACITY_EXCEEDED"


KEY = KeySettings(name="app", sha256=hashlib.sha256(b"secret").hexdigest())
GENERATE = "/v1beta/models/auto:generateContent"


@pytest.mark.parametrize(
    ("path", "headers", "status", "kind"),
    [
        (GENERATE, {}, 401, "UNAUTHENTICATED"),
        (GENERATE + "?key=wrong", {}, 401, "UNAUTHENTICATED"),
        (GENERATE + "?key=secret", {}, 400, "INVALID_ARGUMENT"),
        (GENERATE, {"x-goog-api-key": "secret"}, 400, "INVALID_ARGUMENT"),
        ("/v1/models/auto:generateContent?key=secret", {}, 400, "INVALID_ARGUMENT"),
        ("/v1beta/models/auto:embedContent?key=secret", {}, 404, "NOT_FOUND"),
        ("/v1beta/files?key=secret", {}, 404, "NOT_FOUND"),
        (GENERATE + "?key=secret&alt=sse", {}, 400, "INVALID_ARGUMENT"),
    ],
)
async def test_errors_before_the_endpoint_have_the_shape_too(
    path: str, headers: dict[str, str], status: int, kind: str
) -> None:
    app = make_app(StandInPipeline(), keys=[KEY])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://node") as http:
        response = await http.post(path, headers=headers, json={})
    body = response.json()
    assert (response.status_code, body["error"]["code"], body["error"]["status"]) == (status, status, kind)
    assert "secret" not in response.text


async def test_a_key_in_the_address_goes_no_further() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(dict(scope))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with httpx.AsyncClient(transport=httpx.ASGITransport(ErrorMiddleware(app)), base_url="http://node") as http:
        await http.post(GENERATE + "?alt=sse&key=secret")
    assert seen[0]["query_string"] == b"alt=sse"
    assert (b"x-goog-api-key", b"secret") in seen[0]["headers"]


PIXEL = base64.urlsafe_b64encode(b"\xfb\xff\xfe").decode()
REFUSED: list[tuple[dict[str, Any], str | None]] = [
    ({"contents": None}, "contents"),
    ({"contents": []}, "contents"),
    ({"contents": [*HELLO, {"role": "model", "parts": [{"text": "I"}]}]}, "contents[1]"),
    ({"contents": [{"role": "user", "parts": []}]}, "contents[0].parts"),
    ({"contents": [{"role": "user", "parts": [{"executableCode": {}}]}]}, "contents[0].parts[0]"),
    (
        {"contents": [{"parts": [{"inlineData": {"mimeType": "audio/wav", "data": "AA=="}}]}]},
        "contents[0].parts[0].inlineData.mimeType",
    ),
    (
        {"contents": [{"parts": [{"functionResponse": {"name": "f", "response": {}}}]}]},
        "contents[0].parts[0].functionResponse.name",
    ),
    ({"tools": [{"googleSearch": {}}]}, "tools[0].googleSearch"),
    ({"tools": [{"functionDeclarations": [{"name": "f", "parameters": {"type": "THING"}}]}]}, None),
    ({"toolConfig": {"functionCallingConfig": {"mode": "ANY"}}}, "toolConfig.functionCallingConfig.mode"),
    ({"cachedContent": "cachedContents/x"}, "cachedContent"),
    ({"safetySettings": [{"category": "X", "threshold": "BLOCK_ONLY_HIGH"}]}, "safetySettings[0].threshold"),
    ({"generationConfig": {"temperature": 3}}, "generationConfig.temperature"),
    ({"generationConfig": {"responseModalities": ["AUDIO"]}}, "generationConfig.responseModalities[0]"),
    ({"generationConfig": {"responseMimeType": "text/x.enum"}}, "generationConfig.responseMimeType"),
    ({"generationConfig": {"responseSchema": {"type": "OBJECT"}}}, "generationConfig.responseSchema"),
    ({"generationConfig": {"logprobs": 3}}, "generationConfig.logprobs"),
    ({"generationConfig": {"speechConfig": {}}}, "generationConfig.speechConfig"),
    ({"generationConfig": {"best": 1}}, "generationConfig.best"),
    ({"generationConfig": {"topK": 1, "top_k": 1}}, "generationConfig.topK"),
]


@pytest.mark.parametrize(("change", "param"), REFUSED)
async def test_what_cannot_be_carried_over_is_refused_by_its_name(change: dict[str, Any], param: str | None) -> None:
    with pytest.raises(RequestError) as refused:
        read({"contents": HELLO, **change}, "auto")
    assert refused.value.param is not None
    assert param is None or refused.value.param == param


async def test_both_spellings_of_a_field_are_read_and_images_carried_over() -> None:
    parts = [{"inline_data": {"mime_type": "image/png", "data": PIXEL}}, {"text": "What?"}]
    body = {
        "contents": [{"parts": parts}],
        "system_instruction": {"parts": [{"text": "S"}]},
        "generation_config": {"max_output_tokens": 5, "thinking_config": {"thinking_budget": 0}},
    }
    asked = read(body, "auto")[0]
    url = asked.body["messages"][1]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.removeprefix("data:image/png;base64,")) == b"\xfb\xff\xfe"
    assert (asked.body["max_completion_tokens"], asked.body["reasoning_effort"]) == (5, "none")


async def test_schemas_of_its_own_kind_become_json_schemas() -> None:
    schema = {
        "type": "OBJECT",
        "properties": {
            "b": {"type": "STRING", "nullable": True, "maxLength": "5"},
            "a": {"anyOf": [{"type": "INTEGER", "format": "int32"}, {"type": "ARRAY", "items": {"type": "NUMBER"}}]},
        },
        "required": ["a"],
        "propertyOrdering": ["a", "b"],
    }
    config = {"responseMimeType": "application/json", "responseSchema": schema}
    made = read({"contents": HELLO, "generationConfig": config}, "auto")[0].body["response_format"]["json_schema"]
    assert orjson.loads(orjson.dumps(made["schema"])) == {
        "type": "object",
        "properties": {
            "a": {"anyOf": [{"type": "integer", "format": "int32"}, {"type": "array", "items": {"type": "number"}}]},
            "b": {"type": ["string", "null"], "maxLength": 5},
        },
        "required": ["a"],
    }
    assert list(made["schema"]["properties"]) == ["a", "b"]
