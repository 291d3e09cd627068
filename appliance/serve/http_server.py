"""The process as others see it: one for a data directory, its socket, its signals, its end."""

import asyncio
import contextlib
import fcntl
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import uvicorn

from appliance.api.http_protocol import BoundedHttpProtocol
from appliance.config import NodeConfig
from appliance.errors import OperatorError


class NodeServer(uvicorn.Server):
    """uvicorn, stopped by us: its own signal handling would end the process before the engines are drained."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def stop_on_signals(self, *numbers: signal.Signals) -> Iterator[None]:
        """The first signal drains, a second one stops waiting for requests that are still running."""
        loop = asyncio.get_running_loop()

        def stop() -> None:
            self.force_exit = self.should_exit
            self.should_exit = True

        for number in numbers:
            loop.add_signal_handler(number, stop)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


@contextlib.contextmanager
def reload_on_hangup(reload_all: Callable[[], Awaitable[object]]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    async def reload() -> None:
        with contextlib.suppress(Exception):  # logged, and on the health page, by `reload_all` itself
            await reload_all()

    def hangup() -> None:
        task = loop.create_task(reload())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    loop.add_signal_handler(signal.SIGHUP, hangup)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


async def stop_server(server: NodeServer, serving: "asyncio.Task[None]") -> None:
    server.should_exit = True
    await asyncio.wait({serving})


def check_can_start(config: NodeConfig, home: Path) -> None:
    """Before anything slow is done. Raises OperatorError where another node uses `home`, or something its port."""
    with lock_data_dir(home), open_listener(config.server.host, config.server.port):
        pass


@contextlib.contextmanager
def lock_data_dir(home: Path) -> Iterator[None]:
    """One node a data directory: two would share a ledger file, logs and sockets without knowing of each other."""
    try:
        lock = (home / "node.lock").open("w")
    except OSError as error:
        raise OperatorError(f"cannot write in {home}: {error.strerror}; choose another --data-dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OperatorError(f"another node is using {home}; stop it, or choose another --data-dir") from error
        yield


@contextlib.contextmanager
def open_listener(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket, before anything slow is started: a port in use is said at once."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OperatorError(f"cannot listen on {host!r}: {error.strerror or error}; choose another --host") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise OperatorError(
                f"cannot listen on {host} port {port}: {error.strerror}; end what listens there, or choose another port"
            ) from error
        yield listener


def format_url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_uvicorn_config(app: object, config: NodeConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=BoundedHttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=config.server.max_connections,
        timeout_graceful_shutdown=int(config.server.drain_seconds),
    )
