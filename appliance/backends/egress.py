"""The only door off this machine's site. Built only where a hosted provider is configured; opens only to a permit."""

from collections.abc import Mapping
from typing import Final

import aiohttp
import httpx

from appliance.backends.base import key_headers, post, session_over, transport_over
from appliance.backends.seal import is_sealed
from appliance.core import EgressPermit, Target
from appliance.errors import BackendAuth, ResidencyRefused

_MAX_CONNECTIONS: Final = 1024
_KEEPALIVE_SECONDS: Final = 15.0
"""Hosted front ends keep idle connections for a minute or more; a new one costs a TLS handshake."""

_HEADERS: Final = {"content-type": "application/json", "accept-encoding": "identity", "user-agent": "appliance"}


class EgressDoor:
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
        self._transport = transport_over(session_over(connector))

    def __repr__(self) -> str:
        return f"EgressDoor(providers={sorted(self._addresses)})"

    async def open(
        self,
        target: Target,
        path: str,
        body: bytes,
        *,
        permit: EgressPermit | None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        self._check(target, permit)
        sent = {**_HEADERS, **(headers or {}), **key_headers(target, self._secrets)}
        url = self._urls.get((target.address, path))
        if url is None:
            url = self._urls[target.address, path] = httpx.URL(target.address + path)
        return await post(self._transport, target, url, body, sent)

    async def aclose(self) -> None:
        await self._transport.aclose()

    def _check(self, target: Target, permit: EgressPermit | None) -> None:
        """Default deny: a permit for this very endpoint, sealed by this process, to an address that was configured."""
        if permit is None or permit.target != target.name:
            raise ResidencyRefused(f"there is no permit to send this request to {target.name}")
        if not is_sealed(self._key, permit.request_id, target, permit.seal):
            raise ResidencyRefused(f"the permit for {target.name} was not made by this node's residency decision")
        if target.provider is None or target.provider not in self._addresses:
            raise BackendAuth(f"{target.name} belongs to no configured provider")
        if self._addresses[target.provider] != target.address:
            raise ResidencyRefused(f"{target.name} has another address than its provider {target.provider!r}")
