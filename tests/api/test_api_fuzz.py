"""Whatever is sent, the answer is a result or an error in OpenAI's shape, and never a defect."""

import asyncio
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.core import UpstreamCall
from tests.api.stand_ins import StandInPipeline, make_app
from tests.api.test_api_sdk import completion, scores

PATHS = ("chat/completions", "completions", "decisions", "decisions/batch", "systemone", "extract", "explain")

TEXT = st.sampled_from(["", "auto", "user", "text", "object", "choice", "x", "\u0000", "ü", "#", "http://x"]) | st.text(
    max_size=8
)
SCALAR = st.none() | st.booleans() | st.integers(-3, 300) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
NAMES = st.sampled_from(
    [
        "model",
        "messages",
        "role",
        "content",
        "type",
        "text",
        "stream",
        "n",
        "max_tokens",
        "temperature",
        "stop",
        "tools",
        "tool_choice",
        "function",
        "name",
        "parameters",
        "response_format",
        "json_schema",
        "schema",
        "properties",
        "items",
        "enum",
        "anyOf",
        "$ref",
        "pattern",
        "prompt",
        "input",
        "inputs",
        "state",
        "questions",
        "instructions",
        "criteria",
        "choices",
        "levels",
        "value",
        "label",
        "description",
        "data",
        "image_url",
        "texts",
        "endpoint",
        "stream_options",
        "include_usage",
        "logprobs",
        "top_logprobs",
        "tool_calls",
        "arguments",
        "function_call",
        "required",
        "minimum",
    ]
)
ANYTHING = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=20
)

OBJECT = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^x*$"}}}
REFERRING = {"type": "object", "properties": {"b": {"$ref": "#/$defs/c"}}}
SCHEMA = {**REFERRING, "$defs": {"c": {"type": "array", "items": {"anyOf": [{"enum": [1, "x"]}, {"$ref": "#"}]}}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": OBJECT}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MESSAGES = [
    {"role": "system", "content": "x"},
    {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:,"}}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "x"},
]
QUESTIONS = [
    {"type": "predicate", "name": "p", "instructions": [{"type": "input_json", "data": {"a": 1}}]},
    {"type": "choice", "instructions": "x", "choices": [{"value": "true", "description": "x"}, {"value": True}]},
    {"type": "score", "instructions": "x", "levels": [{"label": "a"}, {"label": "b"}]},
]
ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "x"}]},
]
SYSTEM_ONE = {
    "p": {"type": "noul", "instructions": {"a": 1}, "criteria": {"true": "x"}},
    "q": {"type": "choice", "instructions": "x", "criteria": {"a": None, "b": "x"}},
    "r": {"type": "score", "instructions": "x", "criteria": ["a", "b"]},
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
CHAT: dict[str, Any] = {
    "model": "auto",
    "messages": MESSAGES,
    "tools": [TOOL],
    "response_format": FORMAT,
    "stream": True,
    "stream_options": {"include_usage": True},
    "stop": ["x"],
    "n": 2,
    "temperature": 1,
    "max_tokens": 5,
    "logprobs": True,
    "top_logprobs": 1,
}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("chat/completions", CHAT),
    ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream": True}),
    ("completions", {"prompt": ["x", "y"], "n": 1, "max_tokens": 3, "stop": "x"}),
    ("decisions", {"input": "x", "questions": QUESTIONS}),
    ("decisions", {"input": ITEMS, "questions": QUESTIONS[:1]}),
    ("decisions/batch", {"inputs": ["x", ITEMS], "questions": QUESTIONS}),
    ("systemone", {"state": {"a": 1}, "questions": SYSTEM_ONE}),
    ("extract", {"text": "x", "schema": SCHEMA, "instructions": "x", "max_tokens": 9}),
    ("extract", {"texts": ["x", "y"], "schema": OBJECT}),
    ("explain", {"endpoint": "systemone", "state": "x", "questions": SYSTEM_ONE}),
    ("explain", CHAT),
]


@st.composite
def spoiled(draw: st.DrawFn) -> tuple[str, Any]:
    """A good body of which up to two places hold something else, are gone, or are there twice."""
    path, body = draw(st.sampled_from(GOOD))
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(0, 2))):
        _spoil(draw, body)
    return path, body


def _spoil(draw: st.DrawFn, inside: Any) -> None:
    while True:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        if isinstance(inside[key], dict | list) and draw(st.integers(0, 3)):
            inside = inside[key]
            continue
        what = draw(st.sampled_from(["replace", "remove", "again"]))
        if what == "remove":
            del inside[key]
        elif what == "again" and isinstance(inside, list):
            inside.append(copy.deepcopy(inside[key]))
        elif what == "again":
            inside[draw(NAMES)] = copy.deepcopy(inside[key])
        else:
            inside[key] = draw(ANYTHING)
        return


def any_reply(outgoing: UpstreamCall) -> Any:
    return (
        scores(outgoing)
        if outgoing.path == "/labels"
        else {**completion("{}"), "choices": [{"text": "", "message": {"content": "{}"}}]}
    )


@pytest.fixture(scope="module")
def app() -> Iterator[tuple[FastAPI, asyncio.Runner]]:
    with asyncio.Runner() as runner:
        yield make_app(StandInPipeline(reply=any_reply, pieces=[b"data: [DONE]\n\n"])), runner


def check(
    app: tuple[FastAPI, asyncio.Runner], path: str, statuses: Sequence[int] = (200, 400, 502), **content: Any
) -> None:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app[0])
        async with httpx.AsyncClient(transport=transport, base_url="http://node") as http:
            return await http.post(f"/v1/{path}", **content)

    response = app[1].run(ask())
    assert response.status_code in statuses, response.text
    assert response.headers["x-request-id"]
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


CALM = settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.too_slow])


@given(spoiled())
@CALM
def test_a_good_body_spoiled_anywhere_never_makes_a_defect(
    app: tuple[FastAPI, asyncio.Runner], sent: tuple[str, Any]
) -> None:
    check(app, sent[0], json=sent[1])


@pytest.mark.parametrize(("path", "body"), GOOD)
def test_the_bodies_that_are_spoiled_are_good(app: tuple[FastAPI, asyncio.Runner], path: str, body: Any) -> None:
    check(app, path, statuses=(200,), json=body)


@given(path=st.sampled_from(PATHS), body=st.binary(max_size=60))
@CALM
def test_a_body_of_any_bytes_never_makes_a_defect(app: tuple[FastAPI, asyncio.Runner], path: str, body: bytes) -> None:
    check(app, path, content=body)
