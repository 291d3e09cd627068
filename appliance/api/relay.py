"""Sending answers. The response owns the answer: whatever happens to the client, the answer is closed."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import structlog
from starlette.types import Receive, Scope, Send

from appliance.errors import ApplianceError, ClientGone, StreamBroken
from appliance.router.protocols import PipelineAnswer
from appliance.wire.sse import write_event

Result = TypeVar("Result")

STREAM_HEADERS: Mapping[str, str] = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # Proxies that buffer (nginx does by default) would hold tokens back.
    "x-accel-buffering": "no",
}

STALLED_SECONDS = 60.0
"""A client that takes nothing for so long has stopped reading: what answers it is needed by others."""

log = structlog.stdlib.get_logger(__name__)


async def wait_unless_disconnected(receive: Receive, work: Awaitable[Result]) -> Result:
    """Wait for `work`, but not for a client that has left: then `work` is cancelled and ClientGone raised.

    The body must have been read before, so that the next message can only be the disconnect. A result that comes in the
    same moment as the disconnect is returned: its owner finds the client gone when it sends.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone("the client left before its answer came")
    finally:
        await _stop(gone)
        if not task.done():
            await _stop(task)
            await _close_late(task)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stop(task: "asyncio.Future[Any]") -> None:
    """Cancel and wait for the end of it, so that nothing runs on behind the response."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # seen, so that asyncio does not report it as lost


async def _close_late(task: "asyncio.Future[Any]") -> None:
    """An answer that came in spite of the cancellation has an owner no more."""
    if not task.cancelled() and task.exception() is None:
        close = getattr(task.result(), "aclose", None)
        if close is not None:
            await close()


class StreamResponse:
    """An answer's stream as server-sent events. Closes the answer when the client leaves, before or after it began.

    `failure` writes an error as an event of the caller's dialect; `content_type` is for other streams than of
    events.
    """

    def __init__(
        self,
        answer: PipelineAnswer,
        events: AsyncIterator[bytes],
        failure: Callable[[ApplianceError], bytes] | None = None,
        content_type: str | None = None,
    ) -> None:
        self._answer = answer
        self._events = events
        self._failure = failure or _openai_failure
        self._content_type = {} if content_type is None else {"content-type": content_type}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        relay = asyncio.ensure_future(self._relay(send))
        gone = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({relay, gone}, return_when=asyncio.FIRST_COMPLETED)
            if relay.done():
                relay.result()
        finally:
            await _stop(gone)
            await _stop(relay)
            await asyncio.shield(asyncio.ensure_future(self._answer.aclose()))

    async def _relay(self, send: Send) -> None:
        headers = {**STREAM_HEADERS, **self._content_type, **self._answer.metadata.headers()}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        try:
            await send({"type": "http.response.start", "status": self._answer.status, "headers": raw})
            async with aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    async with asyncio.timeout(STALLED_SECONDS):
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            return  # the client's connection broke while we wrote to it, or the time for that was over

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        """The events. After the first byte an error is an event of its own, and no `[DONE]` follows it."""
        try:
            async for piece in self._events:
                yield piece
        except ApplianceError as error:
            yield self._failure(error)
        except Exception:
            log.error("stream failed unexpectedly", request_id=self._answer.metadata.request_id, exc_info=True)
            yield self._failure(StreamBroken("the appliance failed unexpectedly in the middle of this stream"))


def _openai_failure(error: ApplianceError) -> bytes:
    return write_event(error.to_openai())


async def stream_pieces(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
