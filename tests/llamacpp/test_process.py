"""The program's beginning and its end: sockets, bad files, parent guard, signals."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.errors import EngineFailed
from appliance.llamacpp import __main__ as program_module
from appliance.llamacpp.engine import LlamaEngine
from appliance.llamacpp.kernels import Kernels
from appliance.worker.unix_socket import bind_unix_socket
from tests.llamacpp.engine_program import end, eventually, health, start, until


def test_a_live_socket_is_refused_and_a_stale_file_replaced(smollm2_path: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(tmp_path / "engine.sock"))
        live.listen()
        second = start(tmp_path, smollm2_path)
        assert second.process.wait(20) == 2
    os.close(second.guard)
    assert "served by another process" in second.log.read_text()
    (tmp_path / "engine.sock").unlink()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "engine.sock"))
    third = start(tmp_path, smollm2_path)
    until(lambda: health(third.uds) == 200, "readiness")
    end(third)


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated"])
def test_a_bad_model_file_ends_the_program_with_one_clear_line(kind: str, smollm2_path: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    if kind == "truncated":
        with smollm2_path.open("rb") as whole:
            model.write_bytes(whole.read(5_000_000))
    elif kind != "missing":
        model.write_bytes(b"" if kind == "empty" else b"not a model at all")
    program = start(tmp_path, model)
    assert program.process.wait(30) == 3
    os.close(program.guard)
    told = [event for event in program.events() if event["event"] == "model_file_error"]
    assert len(told) == 1 and str(model) in told[0]["reason"]
    assert not program.uds.exists()


@pytest.mark.parametrize(
    "more", [["--threads", "0"], ["--drain-seconds", "-1"], ["--nonsense"], ["--parent-guard-fd", "987"]]
)
def test_bad_arguments_end_the_program_with_2(more: list[str], smollm2_path: Path, tmp_path: Path) -> None:
    program = start(tmp_path, smollm2_path, *more)
    assert program.process.wait(20) == 2
    os.close(program.guard)
    assert program.log.read_text()


def test_the_program_ends_at_once_when_its_parent_closes_the_guard_pipe(smollm2_path: Path, tmp_path: Path) -> None:
    program = start(tmp_path, smollm2_path)
    until(lambda: health(program.uds) != 0, "the socket")
    end(program)
    assert program.process.returncode is not None


def test_the_program_dies_with_a_parent_that_is_killed(smollm2_path: Path, tmp_path: Path) -> None:
    uds = tmp_path / "engine.sock"
    command = [
        sys.executable,
        "-m",
        "appliance.llamacpp",
        "--model",
        str(smollm2_path),
        "--uds",
        str(uds),
        "--threads",
        "1",
    ]
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, subprocess, sys, time\n"
            "read, write = os.pipe()\n"
            "child = subprocess.Popen([*sys.argv[1:], '--parent-guard-fd', str(read)], pass_fds=(read,))\n"
            "print(child.pid, flush=True)\n"
            "time.sleep(60)\n",
            *command,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    until(lambda: health(uds) != 0, "the socket")
    parent.kill()
    parent.wait(5)
    parent.stdout.close()
    until(lambda: not alive(child), "the end of the child", 5)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_sigterm_while_loading_ends_the_program_cleanly(smollm2_path: Path, tmp_path: Path) -> None:
    program = start(tmp_path, smollm2_path)
    until(lambda: health(program.uds) != 0, "the socket")
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(10) == 0
    os.close(program.guard)
    assert not program.uds.exists()


@pytest.mark.anyio
async def test_an_engine_that_fails_ends_the_program_with_4_and_says_why(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class FailingEngine(LlamaEngine):
        def start(self) -> None:
            super().start()
            asyncio.get_running_loop().call_later(0.2, self._fail)

        def _fail(self) -> None:
            self.failed = EngineFailed("the sky fell")

    monkeypatch.setattr(program_module, "LlamaEngine", FailingEngine)
    options = program_module._arguments(["--model", str(smollm2_path), "--uds", str(tmp_path / "s"), "--threads", "1"])
    sock = bind_unix_socket(options.uds)
    async with asyncio.timeout(30):
        assert await program_module.serve(options, sock) == 4
    events = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [event["reason"] for event in events if event["event"] == "engine_failed"] == ["the sky fell"]


@pytest.mark.anyio
async def test_sigterm_lets_what_runs_finish_and_refuses_what_is_new(smollm2_path: Path, tmp_path: Path) -> None:
    program = start(tmp_path, smollm2_path, "--context-tokens", "1024", "--sequences", "2")
    until(lambda: health(program.uds) == 200, "readiness")
    ask = {"prompt": "Once", "max_tokens": 60, "ignore_eos": True, "stream": True}
    async with program.client() as http, http.stream("POST", "/v1/completions", json=ask) as reply:
        lines = reply.aiter_lines()
        await anext(lines)
        program.process.send_signal(signal.SIGTERM)

        async def draining() -> bool:
            return bool((await http.get("/health")).json()["status"] == "draining")

        await eventually(draining)
        refused = await http.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "unavailable"
        assert [line async for line in lines if line][-1] == "data: [DONE]"
    assert program.process.wait(10) == 0
    os.close(program.guard)
    assert not program.uds.exists()


@pytest.mark.parametrize(
    ("asked", "kernels", "wanted"),
    [(None, (), None), (None, ("attention",), 0), (512, ("attention",), 512), (0, (), 0)],
)
def test_slots_are_left_out_where_attention_costs_only_a_sequence_its_own_cells(
    asked: int | None, kernels: tuple[str, ...], wanted: int | None
) -> None:
    assert program_module.choose_slot_setting(asked, Kernels(kernels)) == wanted
