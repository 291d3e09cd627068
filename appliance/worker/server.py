"""A worker's life around its HTTP application: arguments, socket, uvicorn, signals, running requests."""

import argparse
import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import uvicorn
import uvloop
from starlette.applications import Starlette

from appliance.errors import ConfigError
from appliance.worker import EXIT_ARGUMENTS, EXIT_CLEAN
from appliance.worker.json_log import log
from appliance.worker.parent_guard import tie_to_parent
from appliance.worker.unix_socket import bind_unix_socket

_KEEP_ALIVE_SECONDS: Final = 3_600
"""Peers are ours, on one machine, and keep their connections: closing an idle one would race with its next use."""


class ActiveRequests:
    """Counts the requests that are being worked on, so that a drain can wait for them."""

    def __init__(self) -> None:
        self.count = 0
        self._none_left = asyncio.Event()
        self._none_left.set()

    @contextmanager
    def track(self) -> Iterator[None]:
        self.count += 1
        self._none_left.clear()
        try:
            yield
        finally:
            self.count -= 1
            if not self.count:
                self._none_left.set()

    async def wait_until_none(self) -> None:
        while self.count:  # a stream follows its handler without a pause, but not without a gap
            await self._none_left.wait()


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every worker takes."""
    parser.add_argument("--uds", type=Path, required=True, help="unix socket to serve on")
    parser.add_argument("--drain-seconds", type=float, default=20.0, help="time for running requests after SIGTERM")
    parser.add_argument(
        "--parent-guard-fd", type=int, help="read end of a pipe the parent holds; end when it is closed"
    )


def run_worker(
    options: argparse.Namespace, serve: Callable[[argparse.Namespace, socket.socket], Coroutine[Any, Any, int]]
) -> int:
    """Bind the socket, run `serve(options, listener)` on an event loop, remove the socket; the exit code."""
    try:
        if options.parent_guard_fd is not None:
            tie_to_parent(options.parent_guard_fd)
        listener = bind_unix_socket(options.uds)
    except ConfigError as error:
        log("bad_arguments", reason=str(error))
        return EXIT_ARGUMENTS
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve(options, listener))
    finally:
        options.uds.unlink(missing_ok=True)


@asynccontextmanager
async def serve_app(app: Starlette, listener: socket.socket) -> AsyncIterator[asyncio.Event]:
    """Answer on `listener` while the context is open. Gives the event that SIGTERM and SIGINT set.

    A second signal ends the process at once.
    """
    server = _WorkerServer(
        uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=2,
        )
    )
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, stop)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield stop
    finally:
        server.should_exit = True
        await serving


def _on_signal(stop: asyncio.Event) -> None:
    if stop.is_set():
        os._exit(EXIT_CLEAN)
    stop.set()


class _WorkerServer(uvicorn.Server):
    """uvicorn without its own signal handling: it would close the socket first, and a drain answers 503 on it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
