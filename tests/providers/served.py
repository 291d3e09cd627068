"""What all stand-in providers share: a real server on a port of its own, and strict validation of what it is sent."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import orjson
import uvicorn
from pydantic import TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tests.providers.speech import HELLO, Cut, Fail, Say

Speech = Say | Fail | Cut


class Served:
    """A provider on 127.0.0.1 that says `says`, or what `plan` holds, one a call. Subclasses know a dialect.

    `bodies`, `headers` and `paths` are what it was sent; `wrongs` what the SDK's own types find wrong with it (and then
    it answers 400, as the real one would). `limits` are headers of every reply.
    """

    version = "/v1"

    def __init__(self, says: Speech = HELLO) -> None:
        self.says: Speech = says
        self.plan: list[Speech] = []
        self.limits: Mapping[str, str] = {}
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.replies: list[bytes] = []
        """What it answered, streams as a whole."""
        self.wrongs: list[str] = []
        self.address = ""
        self._server: uvicorn.Server | None = None

    async def __aenter__(self) -> "Any":
        app = Starlette(routes=[Route("/{path:path}", self._answer, methods=["GET", "POST", "DELETE"])])
        config = uvicorn.Config(app, log_level="critical", lifespan="off", ws="none")
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        await server.startup([listener])
        self.address = f"http://127.0.0.1:{listener.getsockname()[1]}{self.version}"
        self._server = server
        return self

    async def __aexit__(self, *_: object) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        for listener in server.servers:
            listener.close()
        for connection in list(server.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        tasks = list(server.server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        path = request.url.path.removeprefix(self.version)
        query = f"?{request.url.query}" if request.url.query else ""
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.paths.append(path + query)
        speech = self.plan.pop(0) if self.plan else self.says
        wrongs = list(self.wrong_with(path, body))
        if wrongs:
            self.wrongs += wrongs
            speech = self.misunderstood("; ".join(wrongs))
        if isinstance(speech, Fail) and not speech.late:
            error = orjson.dumps(self.error(speech))
            return Response(error, speech.status, {**self.limits, **speech.headers}, "application/json")
        if self.is_stream(path, body):
            events = list(self.events(path, body, speech))
            self.replies.append(b"".join(events))
            return StreamingResponse(_flow(events), 200, self.limits, "text/event-stream")
        assert isinstance(speech, Say), "only streams are cut or fail late"
        self.replies.append(self.whole(path, body, speech))
        return Response(self.replies[-1], 200, self.limits, "application/json")

    def is_stream(self, path: str, body: Mapping[str, Any]) -> bool:
        return bool(body.get("stream"))

    def wrong_with(self, path: str, body: dict[str, Any]) -> Iterable[str]:
        """What the SDK's own types say is wrong with this request."""
        raise NotImplementedError

    def misunderstood(self, said: str) -> Fail:
        raise NotImplementedError

    def whole(self, path: str, body: Mapping[str, Any], say: Say) -> bytes:
        raise NotImplementedError

    def events(self, path: str, body: Mapping[str, Any], speech: Speech) -> Iterable[bytes]:
        raise NotImplementedError

    def error(self, fail: Fail) -> Any:
        raise NotImplementedError


async def _flow(events: Iterable[bytes]) -> AsyncIterator[bytes]:
    for event in events:
        yield event
        await asyncio.sleep(0)


def typed_wrongs(adapter: TypeAdapter[Any], body: Any) -> Iterable[str]:
    """Errors of `body` against a TypedDict; a field that the type does not know is one too."""
    try:
        read = _forced(adapter.validate_python(body))
    except ValidationError as error:
        for one in error.errors()[:5]:
            yield f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}"
        return
    yield from _unknown(read, body, "")


def _forced(value: Any) -> Any:
    """Iterables are validated as they are walked."""
    if isinstance(value, Mapping):
        return {name: _forced(part) for name, part in value.items()}
    if isinstance(value, str | bytes | int | float | None):
        return value
    return [_forced(part) for part in value]


def _unknown(read: Any, given: Any, path: str) -> Iterable[str]:
    if isinstance(given, Mapping) and isinstance(read, Mapping):
        for name, value in given.items():
            if name not in read:
                yield f"{path}.{name} is not known"
            else:
                yield from _unknown(read[name], value, f"{path}.{name}")
    elif isinstance(given, list) and isinstance(read, list):
        for index, (one, other) in enumerate(zip(read, given, strict=True)):
            yield from _unknown(one, other, f"{path}[{index}]")
