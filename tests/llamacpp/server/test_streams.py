"""Streams and refusals when the engine does what no real one does on demand."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from appliance.errors import ApplianceError
from appliance.llamacpp.chat.prompts import PromptBuilder
from appliance.llamacpp.decode.constraints import GrammarCompiler
from appliance.llamacpp.engine_protocol import (
    EngineLoadReport,
    FinishReason,
    LabelScores,
    SequenceFinished,
    SequenceRequest,
    TokenEvent,
)
from appliance.llamacpp.model import LlamaModel
from appliance.llamacpp.server.http import EngineGate, ServerContext, make_app
from tests.llamacpp.engine_program import eventually

pytestmark = pytest.mark.anyio

HI = [{"role": "user", "content": "Tell me a story."}]


class ScriptedSequence:
    """Gives its steps one by one; a step that is None waits until it is cancelled."""

    def __init__(self, steps: list[list[TokenEvent] | None], reason: FinishReason, error: str | None) -> None:
        self._steps, self._reason, self._error = steps, reason, error
        self.finished: SequenceFinished | None = None
        self.cancelled = asyncio.Event()

    def __aiter__(self) -> "ScriptedSequence":
        return self

    async def __anext__(self) -> list[TokenEvent]:
        step = self._steps.pop(0) if self._steps and not self.cancelled.is_set() else []
        if step is None:
            await self.cancelled.wait()
        if step:
            return step
        self.finished = SequenceFinished("cancelled" if self.cancelled.is_set() else self._reason, 3, 0, 1, self._error)
        raise StopAsyncIteration

    def cancel(self) -> None:
        self.cancelled.set()

    async def aclose(self) -> None:
        self.cancel()


class ScriptedEngine:
    failed: ApplianceError | None = None

    def __init__(self, *sequences: ScriptedSequence) -> None:
        self._sequences = list(sequences)

    def submit(self, request: SequenceRequest) -> ScriptedSequence:
        return self._sequences.pop(0)

    async def score_labels(self, items: Any) -> list[LabelScores]:
        return [LabelScores([], 0, 3, 0, "the sky fell") for _ in items]

    def report_load(self) -> EngineLoadReport:
        return EngineLoadReport(0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0.0, {})


@pytest.fixture(scope="module")
def vocabulary(smollm2_path: Path) -> Iterator[LlamaModel]:
    model = LlamaModel.load(smollm2_path, threads=1, context_tokens=512, sequences=1)
    yield model
    model.close()


@asynccontextmanager
async def scripted(
    model: LlamaModel, folder: Path, *sequences: ScriptedSequence
) -> AsyncIterator[tuple[httpx.AsyncClient, EngineGate]]:
    grammars = GrammarCompiler(model.vocab_pointer, model.end_tokens, vocabulary_size=model.vocabulary_size)
    gate = EngineGate()
    gate.open(ServerContext("smol", model, ScriptedEngine(*sequences), PromptBuilder(model), grammars))
    uds = folder / "scripted.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(uds))
        server = uvicorn.Server(uvicorn.Config(make_app(gate), lifespan="off", log_config=None, ws="none"))
        task = asyncio.create_task(server._serve(sockets=[sock]))
        async with httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(uds)), base_url="http://engine"
        ) as http:
            yield http, gate
        server.should_exit = True
        await task


def said(model: LlamaModel, text: str) -> list[TokenEvent]:
    return [TokenEvent(token) for token in model.tokenize(text)]


def data(text: str) -> list[Mapping[str, Any]]:
    return [json.loads(event[6:]) for event in text.strip().split("\n\n") if event != "data: [DONE]"]


async def test_a_stream_that_fails_midway_ends_with_an_error_and_never_with_done(
    vocabulary: LlamaModel, tmp_path: Path
) -> None:
    broken = ScriptedSequence([said(vocabulary, "Once upon")], "error", "the sky fell")
    async with scripted(vocabulary, tmp_path, broken) as (http, _):
        reply = await http.post("/v1/chat/completions", json={"messages": HI, "stream": True})
    assert reply.status_code == 200
    assert "[DONE]" not in reply.text
    events = data(reply.text)
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1]) == "Once upon"
    assert "the sky fell" in events[-1]["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_failure_before_the_first_byte_is_a_status(
    vocabulary: LlamaModel, tmp_path: Path, stream: bool
) -> None:
    broken = ScriptedSequence([], "error", "the sky fell")
    async with scripted(vocabulary, tmp_path, broken) as (http, _):
        reply = await http.post("/v1/chat/completions", json={"messages": HI, "stream": stream})
    assert reply.status_code == 500
    assert "the sky fell" in reply.json()["error"]["message"]


async def test_one_broken_choice_ends_the_others_too(vocabulary: LlamaModel, tmp_path: Path) -> None:
    broken = ScriptedSequence([said(vocabulary, "Once")], "error", "the sky fell")
    endless = ScriptedSequence([None], "stop", None)
    async with scripted(vocabulary, tmp_path, endless, broken) as (http, _):
        reply = await http.post("/v1/chat/completions", json={"messages": HI, "n": 2})
    assert reply.status_code == 500
    assert endless.cancelled.is_set()


async def test_what_one_step_brought_leaves_as_one_event(vocabulary: LlamaModel, tmp_path: Path) -> None:
    steps: list[list[TokenEvent] | None] = [said(vocabulary, "Once upon a time"), said(vocabulary, " there was")]
    async with scripted(vocabulary, tmp_path, ScriptedSequence(steps, "stop", None)) as (http, _):
        reply = await http.post("/v1/chat/completions", json={"messages": HI, "stream": True})
    deltas = [event["choices"][0]["delta"] for event in data(reply.text)]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"content": "Once upon a time"},
        {"content": " there was"},
        {},
    ]


@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_before_the_first_token_cancels_at_once(
    vocabulary: LlamaModel, tmp_path: Path, stream: bool
) -> None:
    waiting = ScriptedSequence([None], "stop", None)
    async with scripted(vocabulary, tmp_path, waiting) as (http, gate):
        call = asyncio.create_task(http.post("/v1/chat/completions", json={"messages": HI, "stream": stream}))

        async def at_work() -> bool:
            return gate.requests.count > 0

        await eventually(at_work)
        assert not waiting.cancelled.is_set()
        call.cancel()
        async with asyncio.timeout(5):
            await waiting.cancelled.wait()
            await gate.requests.wait_until_none()


async def test_an_item_the_engine_cannot_score_is_an_error_in_its_place(vocabulary: LlamaModel, tmp_path: Path) -> None:
    async with scripted(vocabulary, tmp_path) as (http, _):
        ask = {"label_sets": {"t": ["a", "b"]}, "items": [{"content": "x", "labels": "t"}]}
        reply = await http.post("/v1/labels", json=ask)
    assert reply.status_code == 200
    assert "the sky fell" in reply.json()["results"][0]["error"]["message"]


async def test_no_work_is_taken_before_the_model_is_there(tmp_path: Path) -> None:
    transport = httpx.ASGITransport(make_app(EngineGate()))
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as http:
        waiting = await http.get("/health")
        refused = await http.post("/v1/completions", json={"prompt": "x"})
    assert waiting.status_code == 503 and waiting.json()["status"] == "loading"
    assert refused.status_code == 503 and refused.headers["retry-after"]
