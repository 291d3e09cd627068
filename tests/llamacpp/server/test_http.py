"""The engine as its callers meet it: a process on a unix socket, driven by the official SDK."""

import asyncio
import json
import math
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import httpx2
import jsonschema
import openai
import pytest

from tests.llamacpp.engine_program import Program, end, eventually, free, health, start, until

pytestmark = pytest.mark.anyio

HI: list[Any] = [{"role": "user", "content": "Tell me a story."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def program(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    program = start(
        tmp_path_factory.mktemp("engine"),
        smollm2_path,
        "--context-tokens",
        "4096",
        "--sequences",
        "8",
        "--batch-tokens",
        "128",
    )
    until(lambda: health(program.uds) == 200, "readiness")
    yield program
    end(program)


@pytest.fixture
async def http(program: Program) -> AsyncIterator[httpx.AsyncClient]:
    async with program.client() as client:
        yield client


@pytest.fixture
async def sdk(program: Program) -> AsyncIterator[openai.AsyncOpenAI]:
    async with httpx2.AsyncClient(transport=httpx2.AsyncHTTPTransport(uds=str(program.uds)), timeout=60) as client:
        yield openai.AsyncOpenAI(api_key="unused", base_url="http://engine/v1", http_client=client, max_retries=0)


async def test_chat_has_openais_shape(sdk: openai.AsyncOpenAI) -> None:
    reply = await sdk.chat.completions.create(
        model="smol", messages=HI, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    choice = reply.choices[0]
    assert reply.object == "chat.completion" and reply.model == "smol" and reply.id.startswith("chatcmpl-")
    assert choice.finish_reason == "length" and choice.message.role == "assistant"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    tokens = choice.logprobs.content
    assert len(tokens) == 8
    assert "".join(token.token for token in tokens) == choice.message.content
    for token in tokens:
        assert token.bytes is not None and bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob <= 0  # greedy took the most probable
    assert reply.usage is not None and reply.usage.completion_tokens == 8
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 8


async def test_a_stream_tells_role_text_end_and_usage_in_that_order(sdk: openai.AsyncOpenAI) -> None:
    whole = await sdk.chat.completions.create(model="smol", messages=HI, max_tokens=12, temperature=0)
    stream = await sdk.chat.completions.create(
        model="smol",
        messages=HI,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    last = chunks[-1]
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == 12
    assert last.usage.prompt_tokens_details is not None and last.usage.prompt_tokens_details.cached_tokens
    assert len({chunk.id for chunk in chunks}) == 1


async def test_a_stream_without_a_wish_for_usage_has_none_and_ends_with_done(http: httpx.AsyncClient) -> None:
    reply = await http.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 3, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(event[6:]) for event in events[:-1])


async def test_plain_completions_answer_several_prompts_in_openais_order(sdk: openai.AsyncOpenAI) -> None:
    prompts = ["One, two, three,", "The sky is"]
    reply = await sdk.completions.create(model="smol", prompt=prompts, n=2, max_tokens=5, temperature=0, logprobs=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in reply.choices]
    # Only beginnings are compared: batched sums round differently, and later a near tie may fall the other way.
    assert texts[0][:4] == texts[1][:4] == " fou" and texts[2][:4] == texts[3][:4] != " fou"
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.top_logprobs is not None
    assert "".join(logprobs.tokens) == texts[0]
    assert [len(top) for top in logprobs.top_logprobs] == [2] * 5
    assert reply.usage is not None and reply.usage.completion_tokens == 20
    stream = await sdk.completions.create(model="smol", prompt=prompts, max_tokens=5, temperature=0, stream=True)
    streamed = ["", ""]
    async for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert [text[:4] for text in streamed] == [texts[0][:4], texts[2][:4]]


async def test_choices_of_a_seeded_call_differ_and_come_again(sdk: openai.AsyncOpenAI) -> None:
    async def texts() -> list[str | None]:
        reply = await sdk.chat.completions.create(model="smol", messages=HI, max_tokens=8, seed=5, n=4, temperature=1.5)
        return [choice.message.content for choice in reply.choices]

    first = await texts()
    assert len(set(first)) > 1
    assert await texts() == first


async def test_a_stop_string_ends_the_reply_and_does_not_show(sdk: openai.AsyncOpenAI) -> None:
    whole = await sdk.completions.create(model="smol", prompt="One, two, three,", max_tokens=24, temperature=0)
    text = whole.choices[0].text
    stop = text[9:13]
    cut = await sdk.completions.create(
        model="smol", prompt="One, two, three,", max_tokens=24, temperature=0, stop=[stop]
    )
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage is not None and whole.usage is not None
    assert cut.usage.completion_tokens < whole.usage.completion_tokens


async def test_20_of_20_replies_hold_to_the_schema(sdk: openai.AsyncOpenAI) -> None:
    async def one(number: int) -> Any:
        reply = await sdk.chat.completions.create(
            model="smol",
            messages=[{"role": "user", "content": f"Invent person number {number}."}],
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "person", "schema": SCHEMA, "strict": True},
            },
            max_tokens=80,
            seed=number,
        )
        assert reply.choices[0].finish_reason == "stop"
        return json.loads(reply.choices[0].message.content or "")

    for value in await asyncio.gather(*(one(number) for number in range(20))):
        jsonschema.validate(value, SCHEMA)


async def test_json_object_is_json_or_says_that_it_was_cut(sdk: openai.AsyncOpenAI) -> None:
    reply = await sdk.chat.completions.create(
        model="smol", messages=HI, response_format={"type": "json_object"}, max_tokens=30, temperature=0
    )
    text = reply.choices[0].message.content or ""
    assert text.startswith("{")
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)
    else:
        assert reply.choices[0].finish_reason == "length"


async def test_20_streams_at_once_each_get_their_own_answer(sdk: openai.AsyncOpenAI) -> None:
    async def one(number: int) -> str:
        stream = await sdk.completions.create(
            model="smol", prompt=f"{number}, {number + 1}, {number + 2},", max_tokens=12, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    together = await asyncio.gather(*(one(number) for number in range(20)))
    assert len(set(together)) > 10
    # Batched sums round differently, so a tie may fall the other way; a mix-up would disturb nearly all.
    alone = [await one(number) for number in range(0, 20, 5)]
    assert sum(text == together[number] for number, text in zip(range(0, 20, 5), alone, strict=True)) >= 3


async def test_a_client_that_leaves_a_stream_frees_its_sequences(http: httpx.AsyncClient) -> None:
    ask = {"messages": HI, "max_tokens": 900, "n": 3, "stream": True, "ignore_eos": True}
    async with http.stream("POST", "/v1/chat/completions", json=ask) as reply:
        lines = reply.aiter_lines()  # held: a forgotten iterator would close the stream
        await anext(lines)

        async def all_run() -> bool:
            return bool((await http.get("/load")).json()["running_sequences"] == 3)

        await eventually(all_run)
    load = await free(http)
    assert load["kv_used_tokens"] == 0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/labels"])
async def test_a_client_that_leaves_while_it_waits_frees_its_work(http: httpx.AsyncClient, path: str) -> None:
    ask: dict[str, Any] = {"messages": HI, "max_tokens": 900, "n": 12, "ignore_eos": True}
    if path == "/v1/labels":
        items = [{"content": f"text {number} " * 20, "labels": "t"} for number in range(300)]
        ask = {"label_sets": {"t": ["a", "b"]}, "items": items}
    before = (await http.get("/load")).json()["steps"]

    async def works() -> bool:
        return bool((await http.get("/load")).json()["steps"] > before)

    call = asyncio.create_task(http.post(path, json=ask))
    await eventually(works)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    load = await free(http)
    assert load["queued_prompt_tokens"] == 0
    assert load["remaining_output_tokens"] == 0
    health = (await http.get("/health")).json()
    assert health["status"] == "ok" and health["kernels"]


async def test_labels_agree_with_the_log_probabilities_of_a_completion(http: httpx.AsyncClient) -> None:
    prompt = "The cat sat on the"
    top = (
        await http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 10})
    ).json()
    found = top["choices"][0]["logprobs"]["top_logprobs"][0]
    names = [token for token in found if token.startswith(" ") and token[1:].isalpha()]
    assert len(names) >= 3
    ask = {"label_sets": {"t": names}, "items": [{"prompt": prompt, "labels": "t"}], "ending": False}
    reply = (await http.post("/v1/labels", json=ask)).json()
    result = reply["results"][0]
    for row in result["labels"]:
        assert row["logprob"] == pytest.approx(found[row["label"]], abs=0.05)
    assert result["label_mass"] == pytest.approx(sum(math.exp(found[name]) for name in names), rel=0.05)
    assert sum(row["probability"] for row in result["labels"]) == pytest.approx(1)
    assert reply["usage"]["prompt_tokens"] == result["prompt_tokens"] == 5


async def test_a_long_label_is_scored_token_by_token(http: httpx.AsyncClient) -> None:
    """The likelihood of a label of several tokens is what forcing them one after the other gives."""
    prompt, label = "My invoice is wrong. Topic:", " billing question"
    tokens = (await http.post("/tokenize", json={"content": prompt + label})).json()["tokens"]
    start = (await http.post("/tokenize", json={"content": prompt})).json()["count"]
    total = 0.0
    for end_ in range(start, len(tokens)):
        ask = {
            "prompt": tokens[:end_],
            "max_tokens": 1,
            "logprobs": 1,
            "logit_bias": {str(tokens[end_]): 100},
            "temperature": 0,
        }
        reply = (await http.post("/v1/completions", json=ask)).json()
        total += reply["choices"][0]["logprobs"]["token_logprobs"][0]
    ask = {"label_sets": {"t": [label, " weather"]}, "items": [{"prompt": prompt, "labels": "t"}]}
    row = (await http.post("/v1/labels", json=ask)).json()["results"][0]["labels"][0]
    assert row["logprob"] == pytest.approx(total, abs=0.1)


async def test_a_text_too_long_to_judge_stands_as_an_error_between_answers(http: httpx.AsyncClient) -> None:
    items = [
        {"content": "hi", "labels": "t"},
        {"content": "word " * 6_000, "labels": "t"},
        {"content": "ho", "labels": "t"},
    ]
    reply = await http.post("/v1/labels", json={"label_sets": {"t": ["greeting", "news"]}, "items": items})
    first, second, third = reply.json()["results"]
    assert "labels" in first and "labels" in third
    assert second["error"]["code"] == "context_length_exceeded"


async def test_prefixes_are_shared_under_one_salt_only(http: httpx.AsyncClient) -> None:
    async def cached(salt: str) -> int:
        ask = {"prompt": "A long enough shared beginning of a prompt, " * 4, "max_tokens": 1, "cache_salt": salt}
        usage = (await http.post("/v1/completions", json=ask)).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert await cached("one") == 0
    assert await cached("one") > 0
    assert await cached("two") == 0


async def test_models_tokenize_and_load_tell_what_is_served(sdk: openai.AsyncOpenAI, http: httpx.AsyncClient) -> None:
    models = (await sdk.models.list()).data
    assert [model.id for model in models] == ["smol"]
    meta = (await http.get("/v1/models")).json()["data"][0]["meta"]
    assert meta["context_tokens"] == 4_096 and meta["sequences"] == 8 and meta["chat_template"] is True
    assert meta["architecture"] == "llama" and meta["vocabulary_size"] == 49_152
    load = (await http.get("/load")).json()
    assert load["model"] == "smol" and load["threads"] == 1 and load["uptime_seconds"] > 0
    assert load["sequences_capacity"] == 8 and load["kv_capacity_tokens"] == 4_096
    assert load["prefill_tokens_per_second"] > 0
    counted = (await http.post("/tokenize", json={"messages": HI})).json()
    assert counted["count"] == len(counted["tokens"])
    reply = await sdk.chat.completions.create(model="smol", messages=HI, max_tokens=1)
    assert reply.usage is not None and reply.usage.prompt_tokens == counted["count"]


@pytest.mark.parametrize(
    ("path", "sent", "status", "code", "names"),
    [
        ("/v1/chat/completions", b"{", 400, "invalid_request", "not valid JSON"),
        ("/v1/chat/completions", b"{}", 400, "invalid_request", "messages"),
        ("/v1/chat/completions", {"messages": []}, 400, "invalid_request", "messages"),
        ("/v1/chat/completions", {"messages": HI, "n": 0}, 400, "invalid_request", "n: "),
        ("/v1/chat/completions", {"messages": HI, "model": "gpt"}, 404, "model_not_found", "'gpt'"),
        ("/v1/chat/completions", {"messages": HI, "max_tokens": "5"}, 400, "invalid_request", "'5'"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "word " * 9_000}]},
            400,
            "context_length_exceeded",
            "4096",
        ),
        (
            "/v1/chat/completions",
            {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "wrong"}}}},
            400,
            "invalid_request",
            "Invalid type: wrong",
        ),
        (
            "/v1/chat/completions",
            b'{"messages":[{"role":"user","content":"\\ud800"}]}',
            400,
            "invalid_request",
            "surrogate",
        ),
        ("/v1/chat/completions", b'{"messages":[{"role":"user","content":"\\u0000"}]}', 400, "invalid_request", "NUL"),
        ("/v1/completions", {"prompt": 5}, 400, "invalid_request", "prompt"),
        ("/v1/completions", {"prompt": "a", "echo": True}, 400, "unsupported_feature", "echo"),
        ("/v1/labels", {"label_sets": {"t": ["a"]}, "items": []}, 400, "invalid_request", "items"),
        (
            "/v1/labels",
            {"label_sets": {"t": ["a", "a"]}, "items": [{"labels": "t", "content": ""}]},
            400,
            "invalid_request",
            "'a'",
        ),
        ("/tokenize", {}, 400, "invalid_request", "content"),
        ("/v1/none", {}, 404, "not_found", "/v1/none"),
        ("/v1/chat/completions", b" " * 10_000_001, 413, "body_too_large", "10000000"),
    ],
)
async def test_bad_input_is_answered_in_openais_shape_and_harms_nobody(
    http: httpx.AsyncClient, path: str, sent: Any, status: int, code: str, names: str
) -> None:
    content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    reply = await http.post(path, content=content)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert error["code"] == code and names in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (await http.get("/health")).status_code == 200


async def test_a_body_that_hides_its_length_is_cut_off_too(http: httpx.AsyncClient) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(120):
            yield b" " * 100_000

    reply = await http.post("/v1/completions", content=pieces())
    assert reply.status_code == 413


async def test_a_method_that_is_not_served_is_an_error_of_the_same_shape(http: httpx.AsyncClient) -> None:
    reply = await http.get("/v1/completions")
    assert reply.status_code == 405
    assert "error" in reply.json()


async def test_the_socket_is_for_its_owner_alone(program: Program) -> None:
    assert stat.S_IMODE(program.uds.stat().st_mode) == 0o600


async def test_the_log_holds_events_and_no_prompt(program: Program, http: httpx.AsyncClient) -> None:
    await http.post("/v1/completions", json={"prompt": "confidential-9f3", "max_tokens": 2})
    await http.post("/v1/chat/completions", json={"messages": "confidential-9f3"})
    assert {"loading", "ready"} <= {event["event"] for event in program.events()}
    assert "confidential-9f3" not in program.log.read_text()
