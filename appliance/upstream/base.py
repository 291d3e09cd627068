"""Transports: the only ways to a target's HTTP server. Nothing but the two of them opens connections."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, runtime_checkable

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

from appliance.core import EgressPermit, Target
from appliance.errors import BackendError, BackendGarbage, BackendUnreachable, ResidencyRefused

KEEPALIVE_SECONDS: Final = 3.0
"""Below the 5 s after which uvicorn (and so vLLM and our engine) closes an idle connection: a POST sent into a closing
one would be lost, and POSTs are not sent twice."""

CLOSE_SECONDS: Final = 1.0
"""Giving a connection back waits for a body still being written; a peer that does not read must not hold us."""


class Transport(Protocol):
    async def open(
        self,
        target: Target,
        path: str,
        body: bytes,
        *,
        permit: EgressPermit | None,
        headers: Mapping[str, str] | None = None,
        at_root: bool = False,
    ) -> httpx.Response:
        """Send a POST and return as soon as status and headers are there; the body is not read yet.

        `path` may have a query. It is below the target's address; with `at_root` it is beside the version that the
        address ends with, as `server_root` says. `headers` are the dialect's own; the transport adds the key.

        Raises ResidencyRefused where this transport does not lead to `target`, BackendUnreachable, BackendGarbage.
        """

    async def aclose(self) -> None: ...


def server_root(address: str) -> str:
    """The address of a server without the version (`/v1`) that a target's address ends with."""
    return address.rstrip("/").rpartition("/")[0]


Method = Literal["GET", "POST", "DELETE"]


@dataclass(frozen=True, slots=True)
class RequestFrame:
    """What stands around and between the lines of a batch, so that they become one body."""

    content_type: str
    head: bytes
    between: bytes
    tail: bytes


@runtime_checkable
class BatchTransport(Transport, Protocol):
    """A transport through which a provider's own batches go as well."""

    async def open_lines(
        self,
        target: Target,
        path: str,
        lines: Sequence[tuple[EgressPermit, bytes]],
        frame: RequestFrame,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send many requests as one body, each with a permit of its own; all go or none.

        A line begins with `{"custom_id":"ID"`, the id of the request that its permit is for.

        Raises ResidencyRefused where any line's permit is not good for it, BackendUnreachable, BackendGarbage.
        """

    async def follow(
        self,
        target: Target,
        method: Method,
        path: str,
        *,
        permit: EgressPermit,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Start a batch of lines that were sent, look at it, fetch or cancel it: with a permit good for that alone.

        Raises as `open_lines`, also for a body too long to be about files and batches only.
        """


def make_key_headers(target: Target, secrets: Mapping[str, str]) -> Mapping[str, str]:
    """The key of `target`'s provider, where there is one, in the header that the provider reads it from."""
    secret = secrets.get(target.provider) if target.provider is not None else None
    if not secret:
        return {}
    name = target.wire.key_header
    return {name: f"Bearer {secret}" if name == "authorization" else secret}


def make_session(connector: aiohttp.BaseConnector) -> aiohttp.ClientSession:
    """A session that keeps no cookies (callers are not to meet in a jar) and asks no environment for proxies."""
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)


def make_transport(session: aiohttp.ClientSession) -> AiohttpTransport:
    """httpx's API over aiohttp's connections. Used without httpx.Client: so no redirect is ever followed."""
    return AiohttpTransport(client=session, verify=False)


async def post(
    transport: httpx.AsyncBaseTransport, target: Target, url: httpx.URL, body: bytes, headers: Mapping[str, str]
) -> httpx.Response:
    """One POST, as `send`."""
    return await send(transport, target, "POST", url, body, headers)


async def send(
    transport: httpx.AsyncBaseTransport,
    target: Target,
    method: Method,
    url: httpx.URL,
    body: bytes,
    headers: Mapping[str, str],
) -> httpx.Response:
    """One exchange. Only the connect limit is set here; silence after that is timed by who reads."""
    timeout = {"connect": target.limits.connect_seconds, "read": None, "write": None, "pool": None}
    request = httpx.Request(method, url, headers=headers, content=body, extensions={"timeout": timeout})
    try:
        return await transport.handle_async_request(request)
    except (httpx.HTTPError, aiohttp.ClientError, OSError) as error:
        raise transport_error(target, error) from error


def transport_error(target: Target, error: Exception) -> BackendError:
    """What a failure below HTTP means. Both libraries' exceptions are mapped here and nowhere else."""
    cause = error.__cause__ if isinstance(error, httpx.HTTPError) and error.__cause__ else error
    match cause:
        case aiohttp.ConnectionTimeoutError():
            seconds = target.limits.connect_seconds
            return BackendUnreachable(f"{target.name} did not accept a connection within {seconds:g} s")
        case aiohttp.ClientConnectorError():
            return BackendUnreachable(f"cannot connect to {target.name}: {_words(cause)}")
        case aiohttp.ClientConnectionError() | OSError():
            gone = BackendUnreachable(f"{target.name} closed the connection before it answered")
            gone.may_have_cost = True
            return gone
        case aiohttp.ClientPayloadError():
            return BackendGarbage(f"{target.name} sent only part of its reply")
        case _:
            return BackendGarbage(f"{target.name} does not speak HTTP as expected ({type(cause).__name__})")


async def close_response(response: httpx.Response) -> None:
    """Give the connection back; one whose body was not read to its end is closed, which cancels the work upstream."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await response.aclose()
    except (TimeoutError, httpx.HTTPError, aiohttp.ClientError, OSError):
        return


def _words(error: aiohttp.ClientConnectorError) -> str:
    reason = error.os_error
    return reason.strerror or str(reason) or type(reason).__name__


@dataclass(frozen=True, slots=True)
class Transports:
    """Both transports of a node. `egress` is None where no hosted provider is configured: there is nothing to open."""

    local: Transport
    egress: Transport | None = None

    def to(self, target: Target) -> Transport:
        """Raises ResidencyRefused where no transport leads to `target`."""
        if target.location == "onsite":
            return self.local
        if self.egress is None:
            raise ResidencyRefused(f"{target.name} is hosted, and this node has no way off its site")
        return self.egress

    def for_batches(self, target: Target) -> BatchTransport:
        """Raises ResidencyRefused where none leads to `target`."""
        transport = self.to(target)
        if not isinstance(transport, BatchTransport):
            raise ResidencyRefused(f"no transport for batches leads to {target.name}")
        return transport

    async def aclose(self) -> None:
        await self.local.aclose()
        if self.egress is not None:
            await self.egress.aclose()
