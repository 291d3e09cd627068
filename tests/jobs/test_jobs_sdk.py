"""Files and batches as the official SDK uses them, over a real socket."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from appliance.api.app import AppDeps, create_app
from appliance.api.auth import Authenticator
from appliance.config import JobsSettings, KeySettings, ServerSettings
from appliance.core import Decision, Request, TaskCall, UpstreamCall
from appliance.jobs.lines.executor import LineExecutor
from appliance.jobs.lines.requests import LineRequests
from appliance.jobs.manager import JobManager
from appliance.jobs.metrics import JobMetrics
from appliance.state import State
from appliance.tasks.calibration_store import TaskCalibrationStore
from appliance.telemetry.metrics import Metrics
from tests.api.stand_ins import NOW, StandInAnswer, StandInLedger, StandInMany, StandInPipeline, served, snapshot
from tests.jobs.office import Alerts, until

pytestmark = pytest.mark.anyio

WALL = 1_800_000_000.0
QUESTIONS = [
    {"type": "choice", "name": "topic", "instructions": "Which?", "choices": [{"value": "a"}, {"value": "b"}]},
]


def key(name: str, **more: Any) -> KeySettings:
    return KeySettings(name=name, sha256=hashlib.sha256(f"key-{name}".encode()).hexdigest(), **more)


def reply(outgoing: UpstreamCall) -> Any:
    """Chats say how long they were; of two labels the first is likelier the longer the text."""
    if outgoing.path == "/labels":
        items = outgoing.body["items"]
        return {"results": [{"labels": _labels(len(item["content"])), "label_mass": 0.9} for item in items]}
    message = {"role": "assistant", "content": f"{len(outgoing.body['messages'])} messages"}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "small",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def _labels(length: int) -> Sequence[Mapping[str, Any]]:
    return [{"label": "a", "logprob": -1.0 / length, "probability": 0.5}, {"label": "b", "logprob": -1.0}]


@dataclass
class Pipeline(StandInPipeline):
    decided: list[Request] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    """How many inputs each call of decisions had."""
    hold: asyncio.Event | None = None

    async def answer(self, request: Request, call: TaskCall) -> StandInAnswer:
        if self.hold is not None:
            await self.hold.wait()
        return await super().answer(request, call)

    async def answer_many(self, request: Request, calls: Sequence[TaskCall], *, concurrency: int) -> StandInMany:
        self.calls += [len(call.inputs) for call in calls if hasattr(call, "inputs")]
        return await super().answer_many(request, calls, concurrency=concurrency)

    def decide(self, request: Request, *, prompt_tokens: int, output_tokens: int) -> Decision:
        self.decided.append(request)
        return super().decide(request, prompt_tokens=prompt_tokens, output_tokens=output_tokens)


@dataclass
class Node:
    url: str
    pipeline: Pipeline
    desk: JobManager

    def client(self, name: str = "ann") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=f"key-{name}", max_retries=0)


@asynccontextmanager
async def node(home: Path, config: JobsSettings | None = None, free: int = 10**12) -> AsyncIterator[Node]:
    pipeline, fits, metrics = Pipeline(reply=reply), TaskCalibrationStore(), Metrics()
    keys = (key("ann"), key("bob"), key("eu", residency="region:EU"), key("root", scopes=("client", "admin")))
    auth = Authenticator(keys, host="127.0.0.1")
    state = State(lambda: NOW)
    state.publish(snapshot())
    requests = LineRequests(auth, fits, clock=lambda: NOW, wall_clock=lambda: WALL)
    lines = LineExecutor(requests, lambda: pipeline)
    desk = await JobManager.open(
        config or JobsSettings(min_free_bytes=1000),
        home,
        line_handler=lines,
        state=state,
        alerts=Alerts(),
        clock=lambda: NOW,
        wall_clock=lambda: WALL,
        free=lambda _: free,
    )
    await desk.start()
    JobMetrics(desk, metrics.registry)

    async def reload() -> Mapping[str, Any]:
        return {}

    app = create_app(
        AppDeps(
            pipeline=lambda: pipeline,
            auth=auth,
            state=state,
            ledger=StandInLedger(),
            metrics=metrics,
            server=ServerSettings(),
            reload=reload,
            jobs=desk,
            clock=lambda: NOW,
            wall_clock=lambda: WALL,
        )
    )
    try:
        async with served(app) as url:
            yield Node(url, pipeline, desk)
    finally:
        await desk.aclose()


def chat(number: int) -> dict[str, Any]:
    body = {"model": "auto", "messages": [{"role": "user", "content": f"question {number}"}]}
    return {"custom_id": f"c{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def jsonl(rows: Sequence[Any]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


async def finished(client: openai.AsyncOpenAI, batch: Batch) -> Batch:
    async def is_over() -> bool:
        nonlocal batch
        batch = await client.batches.retrieve(batch.id)
        return batch.status in ("completed", "failed", "expired", "cancelled")

    await until(is_over)
    return batch


async def results(client: openai.AsyncOpenAI, file_id: str | None) -> list[Any]:
    assert file_id is not None
    content = await client.files.content(file_id)
    return [json.loads(row) for row in content.text.splitlines()]


async def test_a_batch_from_upload_to_results(tmp_path: Path) -> None:
    async with node(tmp_path) as running, running.client() as client:
        data = jsonl([chat(number) for number in range(40)])
        file = await client.files.create(file=("in.jsonl", data), purpose="batch")
        assert (file.bytes, file.filename, file.purpose) == (len(data), "in.jsonl", "batch")
        assert (await client.files.content(file.id)).content == data
        batch = await client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"job": "nightly"},
            output_expires_after={"anchor": "created_at", "seconds": 7200},
        )
        assert batch.expires_at == batch.created_at + 86_400
        batch = await finished(client, batch)
        assert batch.status == "completed"
        assert batch.metadata == {"job": "nightly"}
        assert batch.request_counts is not None
        assert batch.request_counts.to_dict() == {"completed": 40, "failed": 0, "total": 40}
        assert batch.usage is not None
        assert (batch.usage.input_tokens, batch.usage.total_tokens) == (280, 400)
        found = await results(client, batch.output_file_id)
        assert {row["custom_id"] for row in found} == {f"c{number}" for number in range(40)}
        assert all(row["response"]["body"]["choices"][0]["message"]["content"] == "1 messages" for row in found)
        output = await client.files.retrieve(batch.output_file_id or "")
        assert (output.purpose, output.expires_at) == ("batch_output", output.created_at + 7200)
        assert [one.id async for one in client.batches.list()] == [batch.id]


async def test_lines_are_asked_as_work_that_can_wait_on_behalf_of_their_key(tmp_path: Path) -> None:
    async with node(tmp_path) as running, running.client("eu") as client:
        file = await client.files.create(file=("in.jsonl", jsonl([chat(1)])), purpose="batch")
        for headers, metadata, bound in (
            ({}, {}, "region:EU"),
            ({"x-appliance-residency": "onsite"}, {}, "onsite"),
            ({}, {"x-appliance-residency": "onsite"}, "onsite"),
        ):
            batch = await client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                extra_headers=headers,
                metadata=metadata,
            )
            await finished(client, batch)
            request = running.pipeline.requests[-1]
            assert (request.caller.key_id, request.latency_class) == ("eu", "batch")
            assert str(request.residency) == bound
            assert request.patience_seconds == pytest.approx(86_400)
            assert request.id == f"{batch.id}-1"


@pytest.mark.parametrize(
    ("endpoint", "body", "read"),
    [
        ("/v1/responses", {"input": "hello"}, lambda body: body["output"][0]["content"][0]["text"] == "1 messages"),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5},
            lambda body: body["content"][0]["text"] == "1 messages",
        ),
        ("/v1/decisions", {"input": "hello", "questions": QUESTIONS}, lambda body: body["answers"][0]["choice"] == "a"),
    ],
)
async def test_every_endpoint_answers_in_its_own_shape(tmp_path: Path, endpoint: str, body: Any, read: Any) -> None:
    async with node(tmp_path) as running, running.client() as client:
        row = {"custom_id": "one", "method": "POST", "url": endpoint, "body": {"model": "auto", **body}}
        file = await client.files.create(file=("in.jsonl", jsonl([row])), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id,
            endpoint=endpoint,  # type: ignore[arg-type]
            completion_window="24h",
        )
        batch = await finished(client, batch)
        (found,) = await results(client, batch.output_file_id or batch.error_file_id)
        assert found["response"]["status_code"] == 200, found
        assert read(found["response"]["body"])


async def test_decisions_with_the_same_questions_share_calls_and_answer_as_alone(tmp_path: Path) -> None:
    async with node(tmp_path) as running, running.client() as client:
        texts = [f"text {'x' * number}" for number in range(1, 41)]
        texts[7] = {"bad": "input"}  # type: ignore[call-overload]
        body = {"model": "auto", "questions": QUESTIONS}
        rows = [
            {"custom_id": f"d{number}", "method": "POST", "url": "/v1/decisions", "body": {**body, "input": text}}
            for number, text in enumerate(texts)
        ]
        file = await client.files.create(file=("in.jsonl", jsonl(rows)), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/decisions",  # type: ignore[arg-type]
            completion_window="24h",
        )
        batch = await finished(client, batch)
        found = {row["custom_id"]: row["response"]["body"] for row in await results(client, batch.output_file_id)}
        (bad,) = await results(client, batch.error_file_id)
        assert bad["custom_id"] == "d7"
        assert bad["response"]["status_code"] == 400
        assert sorted(running.pipeline.calls) == [7, 32]
        alone = httpx.Client(base_url=running.url, headers={"authorization": "Bearer key-ann"})
        with alone:
            for number in (0, 20, 39):
                answer = (await asyncio.to_thread(alone.post, "/v1/decisions", json=rows[number]["body"])).json()
                assert found[f"d{number}"]["answers"] == answer["answers"]
        assert batch.usage is not None
        assert batch.usage.input_tokens == 20  # what the two calls reported, shared out over their lines


async def test_nobody_sees_or_touches_what_is_anothers(tmp_path: Path) -> None:
    async with node(tmp_path) as running, running.client("ann") as ann, running.client("bob") as bob:
        running.pipeline.hold = asyncio.Event()
        file = await ann.files.create(file=("in.jsonl", jsonl([chat(1)])), purpose="batch")
        batch = await ann.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        for attempt in (
            lambda: bob.files.retrieve(file.id),
            lambda: bob.files.content(file.id),
            lambda: bob.files.delete(file.id),
            lambda: bob.batches.retrieve(batch.id),
            lambda: bob.batches.cancel(batch.id),
            lambda: bob.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"),
        ):
            with pytest.raises(openai.NotFoundError):
                await attempt()
        assert [one async for one in bob.files.list()] == []
        assert [one async for one in bob.batches.list()] == []
        async with running.client("root") as root:
            assert (await root.batches.cancel(batch.id)).status == "cancelling"
        running.pipeline.hold.set()
        assert (await finished(ann, batch)).status == "cancelled"


async def test_lists_come_in_pages(tmp_path: Path) -> None:
    async with node(tmp_path) as running, running.client() as client:
        made = [(await client.files.create(file=("a.jsonl", b"{}"), purpose="batch")).id for _ in range(5)]
        await client.files.create(file=("a.txt", b"x"), purpose="user_data")
        page = await client.files.list(limit=2, purpose="batch")
        assert page.has_more
        assert sorted([one.id async for one in client.files.list(limit=2, purpose="batch")]) == sorted(made)
        ascending = [one.id async for one in client.files.list(limit=2, order="asc")]
        descending = [one.id async for one in client.files.list(limit=4, order="desc")]
        assert ascending == descending[::-1]
        assert len(ascending) == 6


async def test_a_deleted_file_is_gone(tmp_path: Path) -> None:
    async with node(tmp_path) as running, running.client() as client:
        file = await client.files.create(file=("a.jsonl", b"{}"), purpose="batch")
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.content(file.id)
        assert not running.desk.folder.file_path(file.id).exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"endpoint": "/v1/images"}, "/v1/decisions"),
        ({"completion_window": "soon"}, "24h"),
        ({"completion_window": None}, "24h"),
        ({"input_file_id": "file-00000000000000000000000000000000"}, "no file"),
        ({"input_file_id": 7}, "no file"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {"x-appliance-residency": "nowhere"}}, "residency"),
        ({"metadata": {"x-appliance-residncy": "onsite"}}, "did you mean x-appliance-residency"),
        ({"output_expires_after": {"seconds": 1}}, "3600"),
    ],
)
async def test_a_batch_that_cannot_be_made_is_refused_with_the_remedy(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    async with node(tmp_path) as running, running.client() as client:
        file = await client.files.create(file=("in.jsonl", jsonl([chat(1)])), purpose="batch")
        body = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h", **change}
        async with httpx.AsyncClient(headers={"authorization": "Bearer key-ann"}) as http:
            found = await http.post(f"{running.url}/v1/batches", json=body)
        assert found.status_code in (400, 404)
        assert words in found.json()["error"]["message"]
        assert [one async for one in client.batches.list()] == []


async def test_metadata_binds_in_whatever_case_it_is_written(tmp_path: Path) -> None:
    async with node(tmp_path) as running, running.client() as client:
        file = await client.files.create(file=("in.jsonl", jsonl([chat(1)])), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"X-Appliance-Residency": "onsite"},
        )
        await finished(client, batch)
        assert [str(request.residency) for request in running.pipeline.requests] == ["onsite"]


@pytest.mark.parametrize("limit", ["0", "-1", "x", "9" * 5000])
async def test_a_limit_that_is_none_is_refused(tmp_path: Path, limit: str) -> None:
    async with node(tmp_path) as running, httpx.AsyncClient(headers={"authorization": "Bearer key-ann"}) as http:
        for path in ("files", "batches"):
            found = await http.get(f"{running.url}/v1/{path}", params={"limit": limit})
            assert found.status_code == 400
            assert "whole number" in found.json()["error"]["message"]


async def test_uploads_that_are_too_long_or_find_no_room_leave_nothing_behind(tmp_path: Path) -> None:
    async with node(tmp_path, JobsSettings(min_free_bytes=1000, max_file_bytes=3_000_000)) as running:
        async with running.client() as client:
            with pytest.raises(openai.APIStatusError) as announced:
                await client.files.create(file=("a.jsonl", b"x" * 4_000_000), purpose="batch")
            assert announced.value.status_code == 413
            with pytest.raises(openai.BadRequestError, match="purpose"):
                await client.files.create(file=("a.jsonl", b"x" * 2_000_000), purpose="nonsense")  # type: ignore[arg-type]

        async def unannounced() -> AsyncIterator[bytes]:
            yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n'
            for _ in range(5):
                yield b"x" * 1_000_000

        async with httpx.AsyncClient(headers={"authorization": "Bearer key-ann"}) as http:
            headers = {"content-type": "multipart/form-data; boundary=b"}
            found = await http.post(f"{running.url}/v1/files", content=unannounced(), headers=headers)
            assert found.status_code == 413
            cut = b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\nhalf of it'
            found = await http.post(f"{running.url}/v1/files", content=cut, headers=headers)
            assert found.status_code == 400
            assert "cut off" in found.json()["error"]["message"]
            found = await http.post(f"{running.url}/v1/files", json={})
            assert found.status_code == 415
        assert list(running.desk.folder.file_path("file-" + "0" * 32).parent.iterdir()) == []
    async with node(tmp_path, free=10) as running, running.client() as client:
        with pytest.raises(openai.InternalServerError, match="free some space") as full:
            await client.files.create(file=("a.jsonl", b"x"), purpose="batch")
        assert full.value.status_code == 507


async def test_jobs_are_on_the_metrics_page(tmp_path: Path) -> None:
    async with node(tmp_path) as running, running.client() as client:
        file = await client.files.create(file=("in.jsonl", jsonl([chat(1), chat(2)])), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        await finished(client, batch)
        await until(lambda: not running.desk.running)
        async with httpx.AsyncClient(headers={"authorization": "Bearer key-root"}) as http:
            page = (await http.get(f"{running.url}/metrics")).text
        assert 'appliance_job_lines_total{what="completed"} 2.0' in page
        assert 'appliance_jobs_ended_total{status="completed"} 1.0' in page
