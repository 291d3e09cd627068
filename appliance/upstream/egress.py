"""The only transport that leaves the site. It is built only with a hosted provider, and opens only to a permit."""

from collections.abc import Mapping, Sequence
from typing import Final

import aiohttp
import httpx

from appliance.core import EgressPermit, Target
from appliance.errors import BackendAuth, ResidencyRefused
from appliance.upstream.base import Method, RequestFrame, make_key_headers, make_session, make_transport, post, send
from appliance.upstream.permit_signature import is_for_batch, is_signed, line_start

_MAX_CONNECTIONS: Final = 1024
_KEEPALIVE_SECONDS: Final = 15.0
"""Hosted front ends keep idle connections for a minute or more; a new one costs a TLS handshake."""

_MAX_FRAME_BYTES: Final = 2_000
"""Enough for names of files and batches, and no place for a request."""

_HEADERS: Final = {"content-type": "application/json", "accept-encoding": "identity", "user-agent": "appliance"}


class EgressTransport:
    """`addresses`: base URL of every hosted provider by name. `secrets`: their keys; a provider may have none.

    `key` is the key that permits are sealed with. Must be made inside a running event loop.
    """

    def __init__(self, addresses: Mapping[str, str], secrets: Mapping[str, str], key: bytes) -> None:
        self._addresses = dict(addresses)
        self._secrets = dict(secrets)
        self._key = key
        self._urls: dict[tuple[str, str], httpx.URL] = {}
        connector = aiohttp.TCPConnector(
            limit=_MAX_CONNECTIONS, keepalive_timeout=_KEEPALIVE_SECONDS, ssl=httpx.create_ssl_context()
        )
        self._transport = make_transport(make_session(connector))

    def __repr__(self) -> str:
        return f"EgressTransport(providers={sorted(self._addresses)})"

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
        if at_root:
            raise ResidencyRefused(f"{target.name} is hosted: nothing beside its address is asked")
        self._check(target, permit)
        assert permit is not None
        if is_for_batch(permit.request_id):
            raise ResidencyRefused(f"the permit for {target.name} is for a batch's affairs alone, not for a request")
        url = self._urls.get((target.address, path))
        if url is None:
            url = self._urls[target.address, path] = httpx.URL(target.address + path)
        return await post(self._transport, target, url, body, self._headers(target, headers))

    async def open_lines(
        self,
        target: Target,
        path: str,
        lines: Sequence[tuple[EgressPermit, bytes]],
        frame: RequestFrame,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        if len(frame.head) + len(frame.tail) > _MAX_FRAME_BYTES or len(frame.between) > 2:
            raise ResidencyRefused("what stands around the lines of a batch is too long to be only that")
        for permit, line in lines:
            self._check(target, permit)
            if is_for_batch(permit.request_id) or not line.startswith(line_start(permit.request_id)):
                raise ResidencyRefused(f"a line for {target.name} is not the request that its permit is for")
        self._check_each_once([permit.request_id for permit, _ in lines], target)
        body = b"".join((frame.head, frame.between.join(line for _, line in lines), frame.tail))
        sent = self._headers(target, {**(headers or {}), "content-type": frame.content_type})
        return await post(self._transport, target, httpx.URL(target.address + path), body, sent)

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
        self._check(target, permit)
        if not is_for_batch(permit.request_id) or len(body) > _MAX_FRAME_BYTES:
            raise ResidencyRefused(f"there is no permit for a batch's affairs with {target.name}")
        url = httpx.URL(target.address + path)
        return await send(self._transport, target, method, url, body, self._headers(target, headers))

    def _headers(self, target: Target, more: Mapping[str, str] | None) -> Mapping[str, str]:
        return {**_HEADERS, **(more or {}), **make_key_headers(target, self._secrets)}

    def _check_each_once(self, ids: Sequence[str], target: Target) -> None:
        if not ids or len(set(ids)) != len(ids):
            raise ResidencyRefused(f"every line for {target.name} needs a permit of its own")

    async def aclose(self) -> None:
        await self._transport.aclose()

    def _check(self, target: Target, permit: EgressPermit | None) -> None:
        """Default deny: a permit for this very endpoint, sealed by this process, to an address that was configured."""
        if permit is None or permit.target != target.name:
            raise ResidencyRefused(f"there is no permit to send this request to {target.name}")
        if not is_signed(self._key, permit.request_id, target, permit.seal):
            raise ResidencyRefused(f"the permit for {target.name} was not made by this node's residency decision")
        if target.provider is None or target.provider not in self._addresses:
            raise BackendAuth(f"{target.name} belongs to no configured provider")
        if self._addresses[target.provider] != target.address:
            raise ResidencyRefused(f"{target.name} has another address than its provider {target.provider!r}")
