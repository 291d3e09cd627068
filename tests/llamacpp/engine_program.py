"""The CPU engine as a child process, for tests."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx


@dataclass
class Program:
    process: subprocess.Popen[bytes]
    uds: Path
    guard: int
    log: Path

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(self.uds)), base_url="http://engine", timeout=60
        )

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def start(folder: Path, model: Path, *more: str) -> Program:
    uds, log = folder / "engine.sock", folder / "log"
    read, write = os.pipe()
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "appliance.llamacpp", "--model", str(model), "--uds", str(uds)),
                *("--threads", "1", "--parent-guard-fd", str(read), "--alias", "smol", *more),
            ],
            pass_fds=(read,),
            stderr=stderr,
        )
    os.close(read)
    return Program(process, uds, write, log)


def end(program: Program) -> None:
    os.close(program.guard)
    program.process.wait(10)


def until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.02)


def health(uds: Path) -> int:
    """The status of /health, or 0 when nobody answers."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        try:
            sock.connect(str(uds))
            sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            answer = sock.recv(1_024)
        except OSError:
            return 0
    return int(answer.split()[1]) if answer else 0


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110  what is waited for is in another process
            await asyncio.sleep(0.01)


async def free(http: httpx.AsyncClient) -> dict[str, Any]:
    """Wait until the engine works on nothing; give its load then."""
    load: dict[str, Any] = {}

    async def idle() -> bool:
        load.update((await http.get("/load")).json())
        return not load["running_sequences"] and not load["queued_requests"] and not load["queued_prompt_tokens"]

    await eventually(idle)
    return load
