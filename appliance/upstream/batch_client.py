"""The connection to one provider's batches: requests, uploads and rows, all bounded."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import httpx
import orjson

from appliance.core import EgressPermit, Target
from appliance.errors import BackendGarbage, BackendTimeout
from appliance.upstream.base import BatchTransport, Method, RequestFrame, close_response, transport_error
from appliance.upstream.error_mapping import error_of_status

_SECONDS: Final = 60.0


_UPLOAD_SECONDS: Final = 600.0


_MAX_REPLY_BYTES: Final = 8_000_000


_MAX_ROW_BYTES: Final = 64_000_000


BOUNDARY: Final = "appliance-a9f2c71e5b"


Lines = Sequence[tuple[EgressPermit, bytes]]


Note = Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class BatchStatus:
    """How a batch at a provider stands."""

    is_over: bool
    said: str = ""
    """Why it failed as a whole."""
    files: tuple[str, ...] = ()
    """What its rows are fetched from."""


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What came of one line. `status` 200: `payload` is the reply that the same request alone would have got."""

    request_id: str
    status: int
    payload: Any


@dataclass(frozen=True, slots=True)
class BatchClient:
    """Speaks to one provider of one batch."""

    transport: BatchTransport
    target: Target
    permit: EgressPermit

    async def ask(self, method: Method, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A JSON object. Raises BackendError's family."""
        raw = b"" if body is None else orjson.dumps(body)
        return await self._told(
            self.transport.follow(
                self.target, method, self._path(path), permit=self.permit, body=raw, headers=self._headers
            ),
            _SECONDS,
        )

    async def send(self, path: str, lines: Lines, frame: RequestFrame) -> dict[str, Any]:
        opening = self.transport.open_lines(self.target, self._path(path), lines, frame, headers=self._headers)
        return await self._told(opening, _UPLOAD_SECONDS)

    async def rows(self, path: str) -> AsyncIterator[dict[str, Any]]:
        """A JSONL file, a line at a time. Raises BackendGarbage where it is cut off."""
        try:
            async with asyncio.timeout(_SECONDS):
                response = await self.transport.follow(
                    self.target, "GET", self._path(path), permit=self.permit, headers=self._headers
                )
        except TimeoutError as error:
            raise BackendTimeout(f"{self.target.name} did not hand out a batch's results") from error
        try:
            if response.status_code != 200:
                raise error_of_status(
                    self.target, response.status_code, await self._read(response), response.headers, time.time()
                )
            async for line in self._lines(response):
                yield self._object(line)
        finally:
            await close_response(response)

    async def _told(self, opening: Awaitable[httpx.Response], seconds: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout(seconds):
                response = await opening
                try:
                    raw = await self._read(response)
                finally:
                    await close_response(response)
        except TimeoutError as error:
            late = BackendTimeout(f"{self.target.name} did not answer within {seconds:.0f} s")
            late.may_have_cost = True
            raise late from error
        if not 200 <= response.status_code < 300:
            raise error_of_status(self.target, response.status_code, raw, response.headers, time.time())
        return self._object(raw)

    async def _read(self, response: httpx.Response) -> bytes:
        parts, size = [], 0
        try:
            async for part in response.aiter_bytes():
                parts.append(part)
                size += len(part)
                if size > _MAX_REPLY_BYTES:
                    raise BackendGarbage(f"{self.target.name} sent more than {_MAX_REPLY_BYTES} bytes")
        except (httpx.HTTPError, aiohttp.ClientError, OSError) as error:
            raise transport_error(self.target, error) from error
        return b"".join(parts)

    async def _lines(self, response: httpx.Response) -> AsyncIterator[bytes]:
        held = b""
        try:
            async for part in response.aiter_bytes():
                *whole, held = (held + part).split(b"\n")
                for line in whole:
                    if line.strip():
                        yield line
                if len(held) > _MAX_ROW_BYTES:
                    raise BackendGarbage(f"{self.target.name} sent a row of more than {_MAX_ROW_BYTES} bytes")
        except (httpx.HTTPError, aiohttp.ClientError, OSError) as error:
            raise transport_error(self.target, error) from error
        if held.strip():
            yield held

    def _object(self, raw: bytes) -> dict[str, Any]:
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise BackendGarbage(f"{self.target.name} answered {raw[:60]!r}, which is not JSON") from error
        if not isinstance(value, dict):
            raise BackendGarbage(f"{self.target.name} answered a JSON {type(value).__name__} where an object belongs")
        return value

    @property
    def _headers(self) -> Mapping[str, str]:
        return dict(self.target.wire.headers)

    def _path(self, path: str) -> str:
        query = self.target.wire.query
        return path if not query else f"{path}{'&' if '?' in path else '?'}{query}"
