"""What goes wrong in real life, done to real processes."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import SMALL_ENGINE, home_with_model
from tests.running import ROOT, RunningNode, running_node
from tests.standin import StandIn

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

CHAT = {"messages": [{"role": "user", "content": "Tell me a long story."}], "max_tokens": 200, "temperature": 0.9}


def provider_config(address: str) -> str:
    return f"""
[[providers]]
name = "standin"
base_url = "{address}"
models = [{{ name = "large", input_usd = 2.0, output_usd = 8.0 }}]
"""


@contextlib.contextmanager
def node_at(home: Path, model: Path, config: str = "") -> Iterator[RunningNode]:
    with running_node(home_with_model(home, model), config=SMALL_ENGINE + config) as node:
        yield node


async def until(holds: Callable[[], Awaitable[bool]], seconds: float = 60.0) -> None:
    """Ask another process until it says so: there is no event of its to wait for."""
    async with asyncio.timeout(seconds):
        while not await holds():
            await asyncio.sleep(0.02)


async def is_ready(client: httpx.AsyncClient) -> bool:
    return (await client.get("/readyz")).status_code == 200


async def running_sequences(client: httpx.AsyncClient) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("appliance_engine_running_sequences{"))


async def read_stream(client: httpx.AsyncClient, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, str]:
    async with client.stream(
        "POST", "/v1/chat/completions", json={**body, "stream": True}, headers=headers
    ) as response:
        return response.status_code, (await response.aread()).decode()


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_until_gone(pid: int, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there after {seconds} s"
        time.sleep(0.02)


async def test_killing_the_engine_under_20_streams_leaves_the_router_and_every_stream_ends_clearly(
    smollm2_path: Path, tmp_path: Path
) -> None:
    with node_at(tmp_path, smollm2_path) as node:
        async with httpx.AsyncClient(base_url=node.url, timeout=60) as client:
            streams = [asyncio.create_task(read_stream(client, CHAT, {})) for _ in range(20)]
            (engine,) = node.engine_pids()

            async def are_running() -> bool:
                return await running_sequences(client) >= 10

            await until(are_running)
            os.kill(engine, signal.SIGKILL)
            for status, text in await asyncio.gather(*streams):
                if status == 200 and text.endswith("data: [DONE]\n\n"):
                    continue  # it was through before the engine died
                assert '"error"' in text, text[-200:]
                assert "[DONE]" not in text
            assert (await client.get("/healthz")).status_code == 200
            assert node.process.poll() is None
            await until(lambda: is_ready(client))
            reply = await client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 4})
            assert reply.status_code == 200
            assert node.engine_pids() != [engine]


async def test_while_the_engine_is_dead_unbound_requests_are_answered_hosted_and_bound_ones_never_leave(
    smollm2_path: Path, tmp_path: Path
) -> None:
    async with StandIn() as provider:
        with node_at(tmp_path, smollm2_path, provider_config(provider.address)) as node:
            async with httpx.AsyncClient(base_url=node.url, timeout=60) as client:
                (engine,) = node.engine_pids()
                os.kill(engine, signal.SIGKILL)
                bound = {"x-appliance-residency": "onsite"}
                replies = await asyncio.gather(
                    *(client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 4}) for _ in range(5)),
                    *(
                        client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 4}, headers=bound)
                        for _ in range(5)
                    ),
                )
                assert all(reply.status_code == 200 for reply in replies[:5])
                assert any(reply.headers["x-appliance-location"] == "hosted" for reply in replies[:5])
                for reply in replies[5:]:
                    # It waited for the engine to come back, or was refused; it did not leave.
                    assert reply.headers["x-appliance-location"] in ("onsite", "none")
                hosted = sum(reply.headers["x-appliance-location"] == "hosted" for reply in replies)
                assert provider.calls == hosted


def test_sigterm_lets_a_running_stream_finish_and_leaves_no_process(smollm2_path: Path, tmp_path: Path) -> None:
    with node_at(tmp_path, smollm2_path) as node:
        (engine,) = node.engine_pids()
        body = {**CHAT, "max_tokens": 60, "stream": True}
        with httpx.stream("POST", f"{node.url}/v1/chat/completions", json=body, timeout=60) as response:
            pieces = response.iter_text()
            text = next(pieces)
            node.process.send_signal(signal.SIGTERM)
            text += "".join(pieces)
        assert text.endswith("data: [DONE]\n\n")
        assert node.process.wait(30) == 0
        wait_until_gone(engine)


def test_killing_the_router_takes_the_engine_with_it(smollm2_path: Path, tmp_path: Path) -> None:
    with node_at(tmp_path, smollm2_path) as node:
        (engine,) = node.engine_pids()
        node.process.kill()
        node.process.wait()
        wait_until_gone(engine)


def test_an_engine_sees_no_secret_of_a_provider(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = provider_config("http://127.0.0.1:9/v1").replace("base_url", 'key_env = "SOME_SECRET"\nbase_url')
    monkeypatch.setenv("SOME_SECRET", "sk-very-secret")
    with node_at(tmp_path, smollm2_path, config) as node:
        (engine,) = node.engine_pids()
        assert b"sk-very-secret" not in Path(f"/proc/{engine}/environ").read_bytes()
        assert b"sk-very-secret" not in Path(f"/proc/{engine}/cmdline").read_bytes()
        assert "sk-very-secret" not in node.ready_text
    assert "sk-very-secret" not in (tmp_path / "node.log").read_text()


def serve_fails(home: Path, config: str = "", arguments: tuple[str, ...] = ()) -> str:
    """What `appliance serve` says when it cannot start; it must say it in one sentence and soon."""
    home.mkdir(exist_ok=True)
    (home / "c.toml").write_text(config)
    command = [sys.executable, "-m", "appliance", "serve", "--port", "0", "--config", str(home / "c.toml")]
    done = subprocess.run(
        [*command, "--data-dir", str(home), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_port_in_use_is_said_before_anything_is_started(smollm2_path: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = serve_fails(home_with_model(tmp_path, smollm2_path), SMALL_ENGINE, ("--port", str(port)))
    assert f"port {port}" in said
    assert "in use" in said


def test_a_second_node_on_the_same_data_directory_is_refused(smollm2_path: Path, tmp_path: Path) -> None:
    with node_at(tmp_path, smollm2_path):
        assert "another node is using" in serve_fails(tmp_path, SMALL_ENGINE)


@pytest.mark.parametrize("damage", ["missing", "truncated", "corrupt", "not a model"])
def test_a_model_file_that_cannot_be_used_is_named_with_the_reason(
    smollm2_path: Path, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "own.gguf"
    whole = smollm2_path.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "corrupt":
        path.write_bytes(whole[:64] + os.urandom(4096) + whole[4160:])
    elif damage == "not a model":
        path.write_text("once upon a time")
    said = serve_fails(tmp_path, SMALL_ENGINE, ("--model", str(path)))
    assert "own.gguf" in said


def test_a_missing_provider_key_names_the_variable(smollm2_path: Path, tmp_path: Path) -> None:
    config = provider_config("https://api.example.com/v1").replace("base_url", 'key_env = "NO_SUCH_KEY"\nbase_url')
    said = serve_fails(home_with_model(tmp_path, smollm2_path), SMALL_ENGINE + config)
    assert "NO_SUCH_KEY" in said


def test_a_contradictory_policy_names_file_line_and_field(smollm2_path: Path, tmp_path: Path) -> None:
    home = home_with_model(tmp_path, smollm2_path)
    (home / "p.toml").write_text('[[routes]]\nname = "a"\ntargets = ["openai/none"]\n')
    said = serve_fails(home, f"policy = {json.dumps(str(home / 'p.toml'))}\n" + SMALL_ENGINE)
    assert "p.toml:3: routes[0].targets" in said


def test_listening_beyond_loopback_without_keys_is_refused(smollm2_path: Path, tmp_path: Path) -> None:
    said = serve_fails(home_with_model(tmp_path, smollm2_path), SMALL_ENGINE, ("--host", "0.0.0.0"))
    assert "appliance keys create" in said


def cli(home: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "appliance", *arguments, "--data-dir", str(home)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


async def test_a_key_made_while_the_node_runs_works_and_a_revoked_one_stops_working(
    smollm2_path: Path, tmp_path: Path
) -> None:
    home = home_with_model(tmp_path, smollm2_path)
    cli(home, "keys", "create", "first")
    with running_node(home, config=SMALL_ENGINE) as node:
        async with httpx.AsyncClient(base_url=node.url, timeout=60) as client:
            assert (await client.get("/v1/models")).status_code == 401
            made = cli(home, "keys", "create", "second", "--residency", "onsite")
            key = next(line.strip() for line in made.splitlines() if line.strip().startswith("apl_"))

            async def status() -> int:
                return (await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})).status_code

            async def works() -> bool:
                return await status() == 200

            async def is_refused() -> bool:
                return await status() == 401

            await until(works, 15)
            cli(home, "keys", "revoke", "second")
            await until(is_refused, 15)


async def test_a_reload_that_cannot_read_the_ledger_keeps_the_keys_and_what_they_bind(
    smollm2_path: Path, tmp_path: Path
) -> None:
    home = home_with_model(tmp_path, smollm2_path)
    made = cli(home, "keys", "create", "clinic", "--residency", "onsite", "--admin")
    key = next(line.strip() for line in made.splitlines() if line.strip().startswith("apl_"))
    with running_node(home, config=SMALL_ENGINE + provider_config("http://127.0.0.1:9/v1")) as node:
        async with httpx.AsyncClient(base_url=node.url, timeout=60) as client:
            (home / "ledger.sqlite").rename(home / "elsewhere.sqlite")
            headers = {"authorization": f"Bearer {key}"}
            assert (await client.post("/admin/reload", headers=headers)).status_code == 200
            assert (await client.get("/v1/models")).status_code == 401
            dry = {"messages": [{"role": "user", "content": "Hi"}]}
            told = (await client.post("/v1/explain", json=dry, headers=headers)).json()
            assert told["residency"] == "onsite"


async def test_a_reload_changes_the_policy_and_drops_no_stream(smollm2_path: Path, tmp_path: Path) -> None:
    policy = '[[routes]]\nname = "before"\ntargets = ["onsite"]\n'
    with running_node(home_with_model(tmp_path, smollm2_path), config=SMALL_ENGINE, policy=policy) as node:
        (engine,) = node.engine_pids()
        async with httpx.AsyncClient(base_url=node.url, timeout=60) as client:
            body = {**CHAT, "max_tokens": 400, "temperature": 1, "ignore_eos": True}
            streams = [asyncio.create_task(read_stream(client, body, {})) for _ in range(4)]

            async def are_running() -> bool:
                return await running_sequences(client) >= 4

            await until(are_running)
            (tmp_path / "policy.toml").write_text(policy.replace("before", "after"))
            node.process.send_signal(signal.SIGHUP)
            dry = {"messages": [{"role": "user", "content": "Hi"}]}

            async def is_new() -> bool:
                return bool((await client.post("/v1/explain", json=dry)).json()["route"] == "after")

            await until(is_new)
            (tmp_path / "policy.toml").write_text("nonsense")
            refused = await client.post("/admin/reload")
            assert refused.status_code == 422
            assert "policy.toml" in refused.json()["error"]["message"]
            assert (await client.get("/healthz")).json()["warnings"][0]["code"] == "reload_failed"
            assert await is_new()
            for status, text in await asyncio.gather(*streams):
                assert status == 200
                assert text.endswith("data: [DONE]\n\n")
            assert node.engine_pids() == [engine]


async def test_a_spent_budget_keeps_answers_on_the_site(smollm2_path: Path, tmp_path: Path) -> None:
    async with StandIn() as provider:
        config = provider_config(provider.address) + "\n[budget]\ndaily_usd = 0.002\n"
        policy = '[[routes]]\nname = "all"\ntargets = ["hosted", "onsite"]\n'
        home = home_with_model(tmp_path, smollm2_path)
        with running_node(home, config=SMALL_ENGINE + config, policy=policy) as node:
            async with httpx.AsyncClient(base_url=node.url, timeout=60) as client:
                body = {**CHAT, "max_tokens": 16}
                replies = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(30)))
                # One that finds the engine busy for too long is told so; none is answered beyond the cap.
                for reply in replies:
                    assert reply.status_code == 200 or reply.json()["error"]["code"] in (
                        "budget_exceeded",
                        "capacity_exceeded",
                    ), reply.text
                locations = [reply.headers["x-appliance-location"] for reply in replies]
                assert {"hosted", "onsite"} <= set(locations)
                assert provider.calls == locations.count("hosted")
                assert provider.usd <= 0.002
