"""Streams and leaving clients over real sockets: whatever happens, the answer is closed."""

import asyncio
import socket
from collections.abc import AsyncIterator, MutableMapping
from typing import Any
from urllib.parse import urlsplit

import httpx
import orjson
import pytest

from appliance.api import relay
from appliance.api.relay import StreamResponse, wait_unless_disconnected
from appliance.core import ResponseMetadata
from appliance.errors import ClientGone, StreamBroken
from tests.api.stand_ins import SMALL, StandInAnswer, StandInPipeline, StandInStream, make_app, served

pytestmark = pytest.mark.anyio

BODY = orjson.dumps({"messages": [{"role": "user", "content": "Hello"}], "stream": True})
PIECES = [b'data: {"choices":[]}\n\n', b"data: [DONE]\n\n"]


class Caller:
    """A client that can leave at any moment, which HTTP libraries do not let one do."""

    def __init__(self, url: str) -> None:
        self._address = (urlsplit(url).hostname, urlsplit(url).port)

    async def __aenter__(self) -> "Caller":
        self.reader, self.writer = await asyncio.open_connection(*self._address)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def post(self, path: str, body: bytes, length: int | None = None) -> None:
        size = len(body) if length is None else length
        head = f"POST {path} HTTP/1.1\r\nhost: node\r\ncontent-length: {size}\r\n\r\n"
        self.writer.write(head.encode() + body)
        await self.writer.drain()

    def leave(self) -> None:
        """At once, without the pleasantries of TCP."""
        linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.close()


async def test_a_stream_arrives_as_it_was_sent_with_headers_against_buffering() -> None:
    pipeline = StandInPipeline(pieces=PIECES)
    async with served(make_app(pipeline)) as url, httpx.AsyncClient() as http:
        response = await http.post(f"{url}/v1/chat/completions", content=BODY)
    assert response.content == b"".join(PIECES)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-appliance-decision"] == "dec_1"
    assert pipeline.answers[0].closed.is_set()


async def test_a_stream_that_must_be_verified_comes_whole_and_as_events() -> None:
    reply = {"choices": [{"message": {"role": "assistant", "content": '{"a": 1}'}, "finish_reason": "stop"}]}
    pipeline = StandInPipeline(reply=lambda outgoing: reply)
    body = {**orjson.loads(BODY), "response_format": {"type": "json_object"}}
    async with served(make_app(pipeline)) as url, httpx.AsyncClient() as http:
        response = await http.post(f"{url}/v1/chat/completions", json=body)
    assert response.content.endswith(b"data: [DONE]\n\n")
    assert b'"finish_reason":"stop"' in response.content
    assert "stream" not in pipeline.sent[0].body
    assert pipeline.answers[0].closed.is_set()


@pytest.mark.parametrize("error", [StreamBroken("the engine died"), RuntimeError("secret")])
async def test_a_stream_that_breaks_ends_with_an_error_event_and_never_with_done(error: Exception) -> None:
    pipeline = StandInPipeline(pieces=PIECES[:1], stream_error=error)
    async with served(make_app(pipeline)) as url, httpx.AsyncClient() as http:
        response = await http.post(f"{url}/v1/chat/completions", content=BODY)
    events = response.content.split(b"\n\n")
    assert orjson.loads(events[1].removeprefix(b"data: "))["error"]["code"] == "stream_broken"
    assert b"[DONE]" not in response.content and b"secret" not in response.content
    assert pipeline.answers[0].closed.is_set()


async def test_a_client_that_leaves_before_the_first_byte_frees_its_place() -> None:
    pipeline = StandInPipeline(hangs=True)
    async with served(make_app(pipeline)) as url, Caller(url) as caller:
        await caller.post("/v1/chat/completions", BODY)
        await pipeline.started.wait()
        caller.leave()
        await asyncio.wait_for(pipeline.cancelled.wait(), 5)


async def test_an_answer_that_comes_although_its_client_left_is_closed() -> None:
    pipeline = StandInPipeline(hangs=True, late=True, pieces=PIECES)
    async with served(make_app(pipeline)) as url, Caller(url) as caller:
        await caller.post("/v1/chat/completions", BODY)
        await pipeline.started.wait()
        caller.leave()
        await asyncio.wait_for(pipeline.cancelled.wait(), 5)
        await asyncio.wait_for(pipeline.answered.wait(), 5)
        await asyncio.wait_for(pipeline.answers[0].closed.wait(), 5)


async def test_a_client_that_leaves_in_the_middle_of_a_silent_stream_frees_its_place() -> None:
    pipeline = StandInPipeline(pieces=PIECES, hangs_after=1)
    async with served(make_app(pipeline)) as url, Caller(url) as caller:
        await caller.post("/v1/chat/completions", BODY)
        await caller.reader.readuntil(PIECES[0])
        stream = pipeline.answers[0].stream
        assert stream is not None
        await stream.waiting.wait()
        caller.leave()
        await asyncio.wait_for(pipeline.answers[0].closed.wait(), 5)


async def test_a_client_that_leaves_while_it_sends_its_body_asks_nothing() -> None:
    pipeline = StandInPipeline()
    async with served(make_app(pipeline)) as url:
        async with Caller(url) as caller:
            await caller.post("/v1/chat/completions", BODY[:10], length=len(BODY))
            caller.leave()
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"{url}/healthz")).status_code == 200
    assert not pipeline.requests


async def test_a_client_that_left_before_the_stream_began_still_gets_its_answer_closed() -> None:
    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: object) -> None:
        raise OSError("nobody there")

    stream = StandInStream(PIECES, hangs_after=0)
    metadata = ResponseMetadata("req", "dec", SMALL.name, "onsite", "general", "first choice", "sha256:0", None, False)
    answer = StandInAnswer(metadata, stream=stream)
    await StreamResponse(answer, stream)({"type": "http"}, receive, send)
    assert answer.closed.is_set()


async def test_a_body_that_announces_too_much_is_refused_unread_with_both_numbers() -> None:
    pipeline = StandInPipeline()
    async with served(make_app(pipeline, max_body_bytes=1000)) as url, Caller(url) as caller:
        await caller.post("/v1/chat/completions", b"{", length=10_000_000)
        head = await asyncio.wait_for(caller.reader.readuntil(b"\r\n\r\n"), 5)
        assert b"413" in head.splitlines()[0]
        error = await caller.reader.readuntil(b"}}")
        assert b"10000000" in error and b"1000 are read" in error


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_of_ten_megabytes_is_refused_and_the_node_goes_on(chunked: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * 1_000_000

    async with served(make_app(StandInPipeline(), max_body_bytes=8_000_000)) as url, httpx.AsyncClient() as http:
        content = pieces() if chunked else b"x" * 10_000_000
        response = await http.post(f"{url}/v1/chat/completions", content=content)
        assert response.status_code == 413
        error = response.json()["error"]
        assert error["code"] == "body_too_large" and "8000000" in error["message"]
        assert (await http.get(f"{url}/healthz")).status_code == 200


async def test_waiting_ends_when_the_client_leaves_and_not_before() -> None:
    left = asyncio.Event()

    async def receive() -> MutableMapping[str, Any]:
        await left.wait()
        return {"type": "http.disconnect"}

    async def work() -> int:
        return 7

    assert await wait_unless_disconnected(receive, work()) == 7
    left.set()
    with pytest.raises(ClientGone):
        await wait_unless_disconnected(receive, asyncio.Event().wait())


async def test_a_client_that_stops_reading_does_not_hold_what_answers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "STALLED_SECONDS", 0.05)
    answer = StandInAnswer(
        ResponseMetadata("req", "dec", SMALL.name, "onsite", "general", "only one", "sha256:0", 0.0, True)
    )

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def receive() -> MutableMapping[str, Any]:
        await asyncio.Event().wait()
        return {}

    async with asyncio.timeout(10):
        await StreamResponse(answer, StandInStream(PIECES))({"type": "http"}, receive, send)
    assert answer.closed.is_set()
