"""Starting a server: a process group of its own, an address, a log, and a certain end."""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from scripts.benchmarks.peers.installing import PeerMissing

STOP_SECONDS = 15.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
REQUEST_SECONDS = 300.0
IDLE_SECONDS = 2.0
"""Less than any server keeps an idle connection open (5 s is usual), so that none is closed just as it is used."""


@dataclass(frozen=True, slots=True)
class Setup:
    """How a server is to be started. `model` is a GGUF file; None leaves the choice to the server's own product."""

    model: Path | None
    threads: int
    slots: int
    slot_tokens: int
    """Context of one slot."""
    quick: bool = False
    """A short start matters more than speed."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server and the way to it."""

    name: str
    session: aiohttp.ClientSession
    model: str
    pids: Callable[[], Sequence[int]]
    """Its processes."""
    seconds_to_ready: float

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The reply's JSON. Raises RuntimeError with the server's own words on anything but 200."""
        async with self.session.post(path, json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"{self.name}: {path}: {response.status}: {(await response.text())[:300]}")
            return await response.json()

    async def get(self, path: str) -> Any:
        async with self.session.get(path) as response:
            return await response.json()


def connect(address: Path | str) -> aiohttp.ClientSession:
    """A client without a limit of its own on connections; `address` is a unix socket or a base URL."""
    connector: aiohttp.BaseConnector
    if isinstance(address, Path):
        connector, url = aiohttp.UnixConnector(str(address), limit=0, keepalive_timeout=IDLE_SECONDS), "http://server"
    else:
        connector, url = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS), address
    return aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS))


def free_port() -> int:
    """For servers that take neither a socket nor port 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def with_descendants(pids: Sequence[int]) -> list[int]:
    """The processes and all their descendants."""
    found: dict[int, None] = {}
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            found.update(dict.fromkeys([pid, *(child.pid for child in process.children(recursive=True))]))
    return list(found)


@contextlib.asynccontextmanager
async def serving(
    name: str,
    command: Callable[[Path], Sequence[str]],
    *,
    address: Callable[[Path], Path | str],
    health: str,
    model: str,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[Server]:
    """Run a server in a scratch folder until the block ends; nothing of it is left then.

    `command` and `address` are given that folder. Raises PeerMissing when the server is not ready after `seconds`.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-") as name_of_folder:
        folder = Path(name_of_folder)
        log = folder / "server.log"
        started = _launch(command(folder), folder, log, environment or {})
        try:
            async with connect(address(folder)) as session:
                try:
                    await _ready(session, health, started, began + seconds)
                except PeerMissing as error:
                    raise PeerMissing(
                        f"{name}: {error}: {' '.join(log.read_text(errors='replace').split())[-400:]}"
                    ) from None
                yield Server(name, session, model, lambda: with_descendants([started.pid]), time.monotonic() - began)
        finally:
            end(started)


def _launch(
    command: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    """In a group of its own, so that whatever it starts can be ended with it."""
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """A benchmark that is killed outright cannot stop its servers: on Linux the kernel tells them."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


async def _ready(
    session: aiohttp.ClientSession, health: str, started: "subprocess.Popen[bytes]", deadline: float
) -> None:
    while True:
        code = started.poll()
        if code is not None:
            raise PeerMissing(f"ended with {code} before it was ready")
        if time.monotonic() > deadline:
            raise PeerMissing("was not ready in time")
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with session.get(health) as response:
                if response.status == 200:
                    return
        await asyncio.sleep(0.1)


def end(started: "subprocess.Popen[bytes]") -> None:
    """Ask the server to end, wait for it, and kill what is left of its group and of its descendants."""
    descendants: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        descendants = psutil.Process(started.pid).children(recursive=True)
    started.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        started.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    for one in descendants:  # some servers put their workers into groups of their own
        with contextlib.suppress(psutil.Error):
            one.kill()
    started.wait()
