"""What a connection may do before it is a request: how long and how large its head may be, and how many there are."""

import asyncio
from typing import Any, Final

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from appliance.api.caller_dialect import respond_error
from appliance.api.error_middleware import ErrorMiddleware, make_request_id
from appliance.errors import ApplianceError, RequestError, Unavailable

MAX_HEAD_BYTES: Final = 65_536
"""Request line and headers. The parser puts a header together anew with every piece of it that comes, so an endless one
would keep the event loop busy for minutes."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's, for strangers: silent or half a request head does not hold a connection, and every refusal is an
    error in the shape of the API that was asked, or in OpenAI's where that is not known yet. `limit_concurrency` of
    uvicorn's configuration is how many connections are served."""

    head_seconds = 10.0
    """From a connection's or a request's first sign of life to the end of its headers."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._served = self.app
        self._most, self.limit_concurrency = self.limit_concurrency, None
        self._is_in_head = True
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(RequestError(f"the request's headers have more than {MAX_HEAD_BYTES} bytes", status=431))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._is_in_head:
            self._begin_head()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_timer()
        is_full = self._most is not None and len(self.connections) > self._most
        self.app = _FULL if is_full else self._served
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(RequestError("this is not an HTTP request that can be understood: send HTTP/1.1"))

    def _begin_head(self) -> None:
        self._is_in_head = True
        self._head_bytes = 0
        self._stop_timer()
        self._head_timer = self.loop.call_later(self.head_seconds, self.transport.close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, error: ApplianceError) -> None:
        """Answer without an application, and close."""
        response = respond_error(error)
        response.headers["x-request-id"] = make_request_id()
        response.headers["connection"] = "close"
        lines = [name + b": " + value + b"\r\n" for name, value in response.raw_headers]
        head = b"HTTP/1.1 %d Bad Request\r\n" % error.status
        self.transport.write(b"".join([head, *lines, b"\r\n", bytes(response.body)]))
        self.transport.close()


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    error = Unavailable(
        "as many connections are open as this node serves (server.max_connections): wait and try again",
        retry_after_seconds=1.0,
    )
    error.headers = {"connection": "close"}
    raise error


_FULL: Final[Any] = ErrorMiddleware(_full)
