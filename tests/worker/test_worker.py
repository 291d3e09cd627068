"""What both worker processes share: the socket, the body limits, the shape of errors, the count of requests."""

import asyncio
import logging
import os
import socket
import stat
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import orjson
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from appliance.errors import ConfigError, RequestError, Unavailable
from appliance.worker.body_limits import parse_json_object, read_body
from appliance.worker.json_log import log, log_library_warnings
from appliance.worker.parent_guard import tie_to_parent
from appliance.worker.responses import EXCEPTION_HANDLERS, json_response
from appliance.worker.server import ActiveRequests
from appliance.worker.unix_socket import bind_unix_socket

pytestmark = pytest.mark.anyio
LIMIT_BYTES = 20


async def echo(request: Request) -> Response:
    return json_response(parse_json_object(await read_body(request, LIMIT_BYTES)))


async def busy(request: Request) -> Response:
    raise Unavailable("not now", retry_after_seconds=0.2)


async def broken(request: Request) -> Response:
    raise ZeroDivisionError("seven by nothing")


def app_client() -> httpx.AsyncClient:
    app = Starlette(
        routes=[Route("/echo", echo, methods=["POST"]), Route("/busy", busy), Route("/broken", broken)],
        exception_handlers=EXCEPTION_HANDLERS,
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://worker")


async def test_a_body_within_the_limit_is_read_as_an_object_and_an_empty_one_is_an_empty_object() -> None:
    async with app_client() as client:
        assert (await client.post("/echo", content=b'{"a":1}')).json() == {"a": 1}
        assert (await client.post("/echo")).json() == {}


async def test_a_body_over_the_limit_is_refused_whether_its_length_is_declared_or_not() -> None:
    async def chunks() -> AsyncGenerator[bytes]:
        for _ in range(3):
            yield b" " * 10

    async with app_client() as client:
        for content in (b" " * 21, chunks()):
            reply = await client.post("/echo", content=content)
            assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("body", [b"{", b"[1]", b"7"])
def test_a_body_that_is_no_json_object_is_an_invalid_request(body: bytes) -> None:
    with pytest.raises(RequestError, match="JSON"):
        parse_json_object(body)


async def test_errors_have_one_shape_and_a_bug_tells_the_client_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    async with app_client() as client:
        unavailable, missing, bug = [await client.get(path) for path in ("/busy", "/nowhere", "/broken")]
    assert unavailable.status_code == 503 and unavailable.headers["retry-after"] == "1"
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert bug.status_code == 500 and "seven" not in bug.text
    logged = [orjson.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(event["event"], event["path"]) for event in logged] == [("request_failed", "/busy"), ("bug", "/broken")]
    assert "seven by nothing" in logged[1]["reason"]


def test_the_log_is_json_a_line_also_for_what_libraries_say(capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:]
    try:
        log_library_warnings()
        logging.getLogger("library").warning("careful")
        log("ready", path=Path("/x"))
    finally:
        logging.getLogger().handlers[:] = before
    first, second = [orjson.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert (first["event"], first["level"], first["reason"]) == ("library", "warning", "careful")
    assert (second["event"], second["path"]) == ("ready", "/x")


def test_a_socket_is_for_its_owner_alone_and_takes_the_place_of_a_stale_one(tmp_path: Path) -> None:
    path = tmp_path / "s"
    bind_unix_socket(path).close()
    again = bind_unix_socket(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="served by another process"):
        bind_unix_socket(path)
    again.close()


def test_a_path_that_is_no_socket_or_too_long_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is no socket"):
        bind_unix_socket(tmp_path / "file")
    with pytest.raises(ConfigError, match="short path"):
        bind_unix_socket(tmp_path / ("x" * 200))


def test_a_guard_pipe_that_is_not_open_is_refused() -> None:
    read, write = os.pipe()
    os.close(read)
    os.close(write)
    with pytest.raises(ConfigError, match="not open"):
        tie_to_parent(read)


async def test_a_drain_waits_until_the_last_request_has_ended() -> None:
    requests = ActiveRequests()
    await requests.wait_until_none()
    with requests.track():
        with requests.track():
            waiting = asyncio.create_task(requests.wait_until_none())
        await asyncio.sleep(0)
        assert requests.count == 1 and not waiting.done()
    await waiting


def test_a_listener_takes_connections_without_blocking(tmp_path: Path) -> None:
    listener = bind_unix_socket(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(tmp_path / "s"))
        assert not listener.getblocking()
    listener.close()
