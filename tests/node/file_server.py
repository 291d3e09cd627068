"""A small file server on a free port: ranges, logins, and faults on request."""

import threading
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Fault:
    """What happens to the next request for a path, once."""

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    stop_after_bytes: int | None = None
    ignore_range: bool = False


@dataclass
class FileServer:
    """`files` by path. `seen` lists method, path and range of every request."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    login: str | None = None
    seen: list[tuple[str, str, str | None]] = field(default_factory=list)

    def fetched(self, path: str) -> list[str | None]:
        """The ranges with which `path` was asked for by GET."""
        return [range_ for method, seen_path, range_ in self.seen if method == "GET" and seen_path == path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FileServer

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        state, path = self.state, unquote(urlsplit(self.path).path)
        state.seen.append((self.command, path, self.headers.get("range")))
        fault = (state.faults.get(path) or [Fault()]).pop(0) if with_body else Fault()
        if state.login and self.headers.get("authorization") != f"Basic {b64encode(state.login.encode()).decode()}":
            self.say(401, {"www-authenticate": "Basic"})
        elif fault.status:
            self.say(fault.status, fault.headers)
        elif path not in state.files:
            self.say(404, state.headers.get(path, {}))
        else:
            self.send(path, fault, with_body)

    def send(self, path: str, fault: Fault, with_body: bool) -> None:
        content, status, headers = self.state.files[path], 200, dict(self.state.headers.get(path, {}))
        asked = self.headers.get("range")
        if asked and not fault.ignore_range:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            if start >= len(content):
                return self.say(416, {})
            headers["content-range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        self.say(status, {"content-length": str(len(content)), **headers})
        if with_body:
            self.wfile.write(content[: fault.stop_after_bytes])
            self.close_connection = fault.stop_after_bytes is not None

    def say(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"content-length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def serving() -> Iterator[FileServer]:
    state = FileServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
