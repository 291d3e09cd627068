"""Connections that do not become requests, over real sockets: none is held, and none holds up the others."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from appliance.api import body
from appliance.api.http_protocol import MAX_HEAD_BYTES, BoundedHttpProtocol
from tests.api.stand_ins import StandInPipeline, make_app, served

pytestmark = pytest.mark.anyio


class Impatient(BoundedHttpProtocol):
    head_seconds = 0.05


async def opened(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)


async def said(url: str, *pieces: bytes) -> bytes:
    """All that the server answers until it closes the connection."""
    reader, writer = await opened(url)
    async with asyncio.timeout(10):
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            return await reader.read()
        except ConnectionResetError:
            return b""
        finally:
            writer.close()


def error_in(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, content = answer.partition(b"\r\n\r\n")
    assert b"x-request-id: req_" in head and b"content-type: application/json" in head
    error: dict[str, Any] = json.loads(content)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), error


@pytest.fixture
async def impatient() -> AsyncIterator[str]:
    async with served(make_app(StandInPipeline()), http=Impatient) as url:
        yield url


@pytest.mark.parametrize("begun", [b"", b"POST /v1/chat", b"GET /healthz HTTP/1.1\r\nhost: node\r\nx-slow: "])
async def test_a_connection_without_a_whole_request_head_is_closed(impatient: str, begun: bytes) -> None:
    assert await said(impatient, begun) == b""


async def test_a_second_head_that_stays_half_is_closed_too(impatient: str) -> None:
    answer = await said(impatient, b"GET /healthz HTTP/1.1\r\nhost: node\r\n\r\nGET /hea")
    assert answer.startswith(b"HTTP/1.1 200")


async def test_a_slow_answer_outlives_the_time_for_the_head() -> None:
    pipeline = StandInPipeline(pieces=[b"data: 1\n\n"], hangs_after=1)
    async with served(make_app(pipeline), http=Impatient) as url, httpx.AsyncClient() as http:
        content = b'{"messages":[{"role":"user","content":"x"}],"stream":true}'
        async with http.stream("POST", f"{url}/v1/chat/completions", content=content) as response:
            pieces = response.aiter_bytes()
            assert await anext(pieces) == b"data: 1\n\n"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(4 * Impatient.head_seconds):
                    await anext(pieces)


async def test_endless_headers_are_refused_as_soon_as_they_are_too_long() -> None:
    async with served(make_app(StandInPipeline()), http=BoundedHttpProtocol) as url:
        # as much as is read before the refusal, for what is never read turns the close into a reset
        head = b"GET /healthz HTTP/1.1\r\nhost: node\r\nx-long: "
        status, error = error_in(await said(url, head + b"a" * (MAX_HEAD_BYTES + 1)))
        assert (status, error["code"]) == (431, "invalid_request")
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"{url}/healthz", headers={"x-long": "a" * 8000})).status_code == 200


async def test_what_is_no_http_gets_an_error_in_openais_shape() -> None:
    async with served(make_app(StandInPipeline()), http=BoundedHttpProtocol) as url:
        assert error_in(await said(url, b"GARBAGE\r\n\r\n"))[0] == 400


async def test_more_connections_than_are_served_get_an_error_in_openais_shape() -> None:
    async with served(make_app(StandInPipeline()), http=BoundedHttpProtocol, limit_concurrency=2) as url:
        held = [await opened(url) for _ in range(2)]
        answer = await said(url, b"GET /healthz HTTP/1.1\r\nhost: node\r\n\r\n")
        status, error = error_in(answer)
        assert (status, error["code"]) == (503, "unavailable")
        assert "max_connections" in error["message"] and b"retry-after: 1\r\n" in answer
        held.pop()[1].close()
        while not (await said(url, b"GET /healthz HTTP/1.1\r\nhost: n\r\nconnection: close\r\n\r\n")).startswith(
            b"HTTP/1.1 200"
        ):
            pass
        held.pop()[1].close()


async def test_a_body_that_does_not_come_ends_in_an_error_and_a_closed_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(body, "BODY_SECONDS", 0.05)
    async with served(make_app(StandInPipeline()), http=BoundedHttpProtocol) as url:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: node\r\ncontent-length: 1000\r\n\r\n{"
        assert error_in(await said(url, head))[0] == 408
