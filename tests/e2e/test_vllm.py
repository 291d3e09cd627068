"""A node with a real vLLM, in its build for CPUs. A start takes half a minute to two, so all tests share one node.

The numbers are those of the table of vLLM's surprises in appliance/docs/vllm.md.
"""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from appliance.node.supervise import orphans
from tests.e2e.test_faults import until
from tests.node.processes import is_running
from tests.running import RunningNode, running_node
from tests.standin import StandIn
from tests.vllm_cpu import real_vllm

pytestmark = [pytest.mark.slow, pytest.mark.anyio, pytest.mark.timeout(400)]

STALL_SECONDS = 6.0
SEQUENCES = 4
MODEL = "smollm2-135m-instruct"
CHOICES = ("billing", "delivery", "card payment", "card", "other")


@pytest.fixture(scope="module")
def provider_port() -> int:
    """Where a hosted provider is, for the tests that start one."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, provider_port: int) -> Iterator[RunningNode]:
    vllm = real_vllm()
    home = tmp_path_factory.mktemp("vllm")
    folder = home / "models" / MODEL
    folder.mkdir(parents=True)
    (folder / "bf16-safetensors").symlink_to(vllm.weights)
    config = f"""
[server]
drain_seconds = 90
[engine]
model = "{MODEL}"
variant = "bf16-safetensors"
vllm = "{vllm.environment.folder}"
vllm_options = ["--enforce-eager"]
context_tokens = 8192
sequences = {SEQUENCES}
max_queued_requests = 4
stall_seconds = {STALL_SECONDS}
[[providers]]
name = "standin"
base_url = "http://127.0.0.1:{provider_port}/v1"
models = [{{ name = "large", input_usd = 2.0, output_usd = 8.0 }}]
"""
    with running_node(home, config=config, seconds=300) as running:
        print(f"ready after {running.seconds_to_ready:.1f} s")  # noqa: T201
        yield running


@pytest.fixture
async def client(node: RunningNode) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"x-appliance-residency": "onsite"}
    async with httpx.AsyncClient(base_url=node.url, timeout=300, headers=headers) as made:
        await until(lambda: _is_ready(made), seconds=300)
        yield made


async def _is_ready(client: httpx.AsyncClient) -> bool:
    return bool((await client.get("/readyz")).json()["targets"][0]["ready"])


async def _why(client: httpx.AsyncClient) -> str:
    return str((await client.get("/readyz")).json()["targets"][0]["reason"])


def _chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "auto", "messages": [{"role": "user", "content": text}], "temperature": 0, **more}


def _processes(node: RunningNode) -> dict[str, int]:
    """vLLM's processes by the names it gives them."""
    found = {}
    for pid in orphans.find_marked_processes(orphans.format_engine_mark(node.data_dir / "run")):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        is_api = "vllm\0serve" in command and "parent_guard" not in command
        found["api" if is_api else command.partition("\0")[0].strip()] = pid
    return found


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _socket(node: RunningNode) -> Path:
    """Of the front end."""
    command = Path(f"/proc/{_processes(node)['api']}/cmdline").read_bytes().split(b"\0")
    return Path(command[command.index(b"--uds") + 1].decode())


async def test_chat_whole_and_streamed(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/chat/completions", json=_chat("Where is the Eiffel Tower?", max_tokens=20))
    assert reply.status_code == 200, reply.text
    assert "Paris" in reply.json()["choices"][0]["message"]["content"]
    assert reply.headers["x-appliance-target"] == f"onsite/{MODEL}"
    body = _chat("Where is the Eiffel Tower?", max_tokens=20, stream=True)
    async with client.stream("POST", "/v1/chat/completions", json=body) as stream:
        text = (await stream.aread()).decode()
    assert text.count("data: ") > 5 and text.endswith("data: [DONE]\n\n")


async def test_extraction_matches_its_schema_and_has_confidence(client: httpx.AsyncClient) -> None:
    schema = {
        "type": "object",
        "properties": {"invoice_number": {"type": "string"}, "total_eur": {"type": "number"}},
        "required": ["invoice_number", "total_eur"],
    }
    text = "Invoice number 4711 from Acme Ltd. The total is 99.50 EUR."
    reply = (await client.post("/v1/extract", json={"text": text, "schema": schema})).json()
    assert reply["object"] == {"invoice_number": "4711", "total_eur": 99.5}
    assert set(reply["confidence"]) == {"/invoice_number", "/total_eur"}


async def test_decisions_have_probabilities_and_label_mass(client: httpx.AsyncClient) -> None:
    choice = {
        "type": "choice",
        "instructions": "What is the message about?",
        "choices": [{"value": value} for value in CHOICES],
    }
    body = {"model": "auto", "input": "My card was charged twice!", "questions": [choice]}
    (answer,) = (await client.post("/v1/decisions", json=body)).json()["answers"]
    assert [row["value"] for row in answer["probabilities"]] == list(CHOICES)
    assert sum(row["probability"] for row in answer["probabilities"]) == pytest.approx(1.0)
    assert 0 < answer["label_mass"] <= 1
    batch = {"model": "auto", "inputs": ["Where is my parcel?", "word " * 9000], "questions": [choice]}
    first, second = (await client.post("/v1/decisions/batch", json=batch)).json()["results"]
    assert "answers" in first
    assert second["error"]["code"] == "context_length_exceeded"


async def test_10_a_field_that_it_would_ignore_is_refused(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/chat/completions", json=_chat("yes or no?", guided_choice=["yes", "no"]))
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "guided_choice"
    wanted = {"choice": ["yes", "no"]}
    reply = await client.post("/v1/chat/completions", json=_chat("yes or no?", structured_outputs=wanted))
    assert reply.json()["choices"][0]["message"]["content"] in ("yes", "no")


async def test_11_a_choice_that_was_cut_off_is_no_answer(client: httpx.AsyncClient) -> None:
    wanted = {"choice": ["no way on earth", "supercalifragilistic"]}
    reply = await client.post("/v1/chat/completions", json=_chat("Hm?", structured_outputs=wanted, max_tokens=1))
    assert reply.status_code == 502
    assert reply.json()["error"]["code"] == "reply_rejected"


async def test_12_a_full_engine_overflows_to_the_provider(node: RunningNode, provider_port: int) -> None:
    async with StandIn(port=provider_port) as provider, httpx.AsyncClient(base_url=node.url, timeout=300) as client:
        await until(lambda: _is_ready(client), seconds=300)
        body = _chat("Tell me a long story.", max_tokens=300)
        replies = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(24)))
        assert [reply.status_code for reply in replies] == [200] * 24
        where = [reply.headers["x-appliance-location"] for reply in replies]
        assert where.count("onsite") >= 1 and where.count("hosted") == provider.calls > 0


async def test_13_its_private_endpoints_are_reached_by_nobody(node: RunningNode, client: httpx.AsyncClient) -> None:
    socket = _socket(node)
    assert socket.parent.stat().st_mode & 0o777 == 0o700
    transport = httpx.AsyncHTTPTransport(uds=str(socket), verify=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as bare:
        assert (await bare.post("/v1/completions", json={"prompt": "a"})).status_code == 401
        assert (await bare.post("/sleep")).status_code == 404
    key = (socket.parent / "key").read_bytes()
    assert not any(key in _command(pid) for pid in _processes(node).values())


async def _stream_until_broken(client: httpx.AsyncClient, begun: asyncio.Event) -> str:
    text = ""
    body = _chat("Tell me a very long story.", max_tokens=1500, stream=True, ignore_eos=True)
    async with client.stream("POST", "/v1/chat/completions", json=body) as stream:
        async for chunk in stream.aiter_text():
            text += chunk
            if text.count("data: ") > 5:
                begun.set()
    return text


@pytest.mark.parametrize(
    ("number", "who", "sent", "within_seconds"),
    [
        (1, "VLLM::EngineCore", signal.SIGKILL, 8.0),
        (5, "VLLM::EngineCore", signal.SIGSTOP, STALL_SECONDS + 4.0),
        (6, "api", signal.SIGKILL, 3.0),
    ],
    ids=["1 and 9: its core is killed", "5: its core hangs", "6: its front end is killed"],
)
async def test_a_stream_ends_with_an_error_and_the_engine_comes_back(
    node: RunningNode, client: httpx.AsyncClient, number: int, who: str, sent: signal.Signals, within_seconds: float
) -> None:
    begun = asyncio.Event()
    stream = asyncio.create_task(_stream_until_broken(client, begun))
    await begun.wait()
    before, shared = _processes(node), orphans.find_shared_memory(_processes(node).values())
    assert shared  # hundreds of megabytes, which it leaves behind when it is killed
    started = time.monotonic()
    os.kill(before[who], sent)
    text = await stream
    noticed = time.monotonic() - started
    last = json.loads(text.strip().rpartition("data: ")[2])
    assert last["error"]["code"] == "stream_broken" and "[DONE]" not in text
    assert noticed < within_seconds

    async def is_down() -> bool:
        return not await _is_ready(client)

    await until(is_down)
    await until(lambda: _is_ready(client), seconds=300)
    print(f"{number}: noticed after {noticed:.1f} s, ready again after {time.monotonic() - started:.1f} s")  # noqa: T201
    assert not set(before.values()) & set(_processes(node).values())
    assert not any(path.exists() for path in shared)
    assert (await client.post("/v1/chat/completions", json=_chat("Hi", max_tokens=3))).status_code == 200


async def test_5_an_idle_hang_is_noticed_although_its_health_page_says_200(
    node: RunningNode, client: httpx.AsyncClient
) -> None:
    socket = _socket(node)
    started = time.monotonic()
    os.kill(_processes(node)["VLLM::EngineCore"], signal.SIGSTOP)
    transport = httpx.AsyncHTTPTransport(uds=str(socket), verify=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as bare:
        assert (await bare.get("/health")).status_code == 200

    async def is_noticed() -> bool:
        return "no step was done" in await _why(client)

    await until(is_noticed, seconds=3 * STALL_SECONDS)
    print(f"idle hang noticed after {time.monotonic() - started:.1f} s")  # noqa: T201


async def test_2_and_4_sigterm_during_a_request_lets_it_finish_and_leaves_nothing(
    node: RunningNode, client: httpx.AsyncClient
) -> None:
    body = _chat("Tell me a long story.", max_tokens=100, ignore_eos=True)
    request = asyncio.create_task(client.post("/v1/chat/completions", json=body))
    await asyncio.sleep(1.0)
    members = _processes(node)
    started = time.monotonic()
    node.process.send_signal(signal.SIGTERM)
    reply = await request
    assert reply.status_code == 200
    assert reply.json()["usage"]["completion_tokens"] == 100
    assert await asyncio.to_thread(node.process.wait, 60) == 0
    print(f"stopped {time.monotonic() - started:.1f} s after SIGTERM")  # noqa: T201
    assert not any(map(is_running, members.values()))
    assert orphans.find_marked_processes(orphans.format_engine_mark(node.data_dir / "run")) == []
