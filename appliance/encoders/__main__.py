"""The encoder program: read the arguments, open the socket, serve until told to stop.

Exit codes: 0 clean, 2 bad arguments.
"""

import argparse
import asyncio
import logging
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import uvicorn
import uvloop

from appliance.encoders.json_log import EncoderJsonLog, log
from appliance.encoders.process import EXIT_ARGUMENTS, EXIT_CLEAN, bind_socket, tie_to_parent
from appliance.encoders.server import EncoderEndpoints, make_app
from appliance.encoders.service import EncoderService
from appliance.errors import ConfigError

_KEEP_ALIVE_SECONDS = 3_600


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, handlers=[EncoderJsonLog()], force=True)
    options = _arguments(argv)
    os.umask(0o077)  # classifiers hold words of the texts that they were trained on
    try:
        if options.parent_guard_fd is not None:
            tie_to_parent(options.parent_guard_fd)
        listener = bind_socket(options.uds)
        options.data.mkdir(parents=True, exist_ok=True)
    except (ConfigError, OSError) as error:
        log("bad_arguments", reason=str(error))
        return EXIT_ARGUMENTS
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(options, listener))
    finally:
        options.uds.unlink(missing_ok=True)
    return EXIT_CLEAN


async def serve(options: argparse.Namespace, listener: socket.socket) -> None:
    desk = EncoderService(data=options.data, models=options.models, threads=options.threads)
    endpoints = EncoderEndpoints(desk)
    server = _Server(
        uvicorn.Config(
            make_app(endpoints),
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
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    log("ready", models=list(desk.library.kinds()), classifiers=list(desk.versions.names()), threads=options.threads)
    await stop.wait()
    endpoints.is_draining = True
    await desk.runs.aclose()
    with suppress(TimeoutError):
        async with asyncio.timeout(options.drain_seconds):
            await desk.idle()
    server.should_exit = True
    await serving
    log("stopped")


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: the drain comes first."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m appliance.encoders", description="Serve embedding models and trained classifiers on a CPU."
    )
    parser.add_argument("--uds", type=Path, required=True, help="unix socket to serve on")
    parser.add_argument("--data", type=Path, required=True, help="folder of the classifiers")
    parser.add_argument("--models", type=Path, required=True, help="folder of the pulled models")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--drain-seconds", type=float, default=20.0, help="time for running requests after SIGTERM")
    parser.add_argument(
        "--parent-guard-fd", type=int, help="read end of a pipe the parent holds; end when it is closed"
    )
    options = parser.parse_args(argv)
    if options.threads < 1 or options.drain_seconds < 0:
        parser.error("--threads must be at least 1 and --drain-seconds not negative")
    return options


if __name__ == "__main__":
    # Threads deep in a numerical library do not end with the interpreter.
    os._exit(main())
