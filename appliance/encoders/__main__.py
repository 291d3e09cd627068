"""The encoder program: read the arguments, open the socket, serve until a signal.

Exit codes: 0 clean, 2 bad arguments.
"""

import argparse
import asyncio
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from appliance.encoders.server import EncoderEndpoints, make_app
from appliance.encoders.service import EncoderService
from appliance.worker import EXIT_ARGUMENTS, EXIT_CLEAN
from appliance.worker.json_log import log, log_library_warnings
from appliance.worker.server import add_worker_arguments, run_worker, serve_app


def main(argv: Sequence[str] | None = None) -> int:
    log_library_warnings()
    options = _arguments(argv)
    os.umask(0o077)  # classifiers hold words of the texts that they were trained on
    try:
        options.data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log("bad_arguments", reason=str(error))
        return EXIT_ARGUMENTS
    return run_worker(options, serve)


async def serve(options: argparse.Namespace, listener: socket.socket) -> int:
    """Answer on `listener` until a signal; then wait `drain_seconds` at most for running requests."""
    service = EncoderService(data=options.data, models=options.models, threads=options.threads)
    endpoints = EncoderEndpoints(service)
    async with serve_app(make_app(endpoints), listener) as stop:
        models, classifiers = list(service.model_cache.list_kinds()), list(service.store.list_names())
        log("ready", models=models, classifiers=classifiers, threads=options.threads)
        await stop.wait()
        endpoints.is_draining = True
        await service.training_jobs.aclose()
        with suppress(TimeoutError):
            await asyncio.wait_for(service.requests.wait_until_none(), options.drain_seconds)
    log("stopped")
    return EXIT_CLEAN


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m appliance.encoders", description="Serve embedding models and trained classifiers on a CPU."
    )
    add_worker_arguments(parser)
    parser.add_argument("--data", type=Path, required=True, help="folder of the classifiers")
    parser.add_argument("--models", type=Path, required=True, help="folder of the pulled models")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(argv)
    if options.threads < 1 or options.drain_seconds < 0:
        parser.error("--threads must be at least 1 and --drain-seconds not negative")
    return options


if __name__ == "__main__":
    # Threads deep in a numerical library do not end with the interpreter.
    os._exit(main())
