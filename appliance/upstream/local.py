"""The transport to this node's engines (unix sockets) and to other servers of the site. It leads nowhere else."""

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import httpx

from appliance.core import EgressPermit, Target
from appliance.errors import ResidencyRefused
from appliance.upstream.base import KEEPALIVE_SECONDS, make_key_headers, make_session, make_transport, post, server_root

_MAX_CONNECTIONS: Final = 512
"""Per socket or host. Admission keeps engines at far fewer; this bounds what a mistake could open."""

_MAX_SOCKETS: Final = 64
_HEADERS: Final = {"content-type": "application/json", "accept-encoding": "identity", "user-agent": "appliance"}

IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class NotOnSite(OSError):
    """An on-site name led to an address outside the site's networks."""


class LocalTransport:
    """`networks`: the CIDRs that belong to the site besides loopback. `secrets`: keys of on-site providers by name.

    The networks are enforced on the address that is about to be connected to, so neither DNS nor a literal leads out.
    Must be made inside a running event loop.
    """

    def __init__(self, networks: Sequence[str] = (), secrets: Mapping[str, str] | None = None) -> None:
        self._networks: tuple[IpNetwork, ...] = tuple(ipaddress.ip_network(text) for text in networks)
        self._secrets = dict(secrets or {})
        self._sockets: dict[str, httpx.AsyncBaseTransport] = {}
        self._engine_keys: dict[str, Mapping[str, str]] = {}
        self._tcp: httpx.AsyncBaseTransport | None = None
        self._urls: dict[tuple[str, str, bool], httpx.URL] = {}

    def __repr__(self) -> str:
        return f"LocalTransport(networks={[str(network) for network in self._networks]})"

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
        if target.location != "onsite":
            raise ResidencyRefused(f"{target.name} is not on this site, and this transport leads nowhere else")
        keys = (
            make_key_headers(target, self._secrets) if target.provider is not None else self._engine_key(target.address)
        )
        sent = {**_HEADERS, **(headers or {}), **keys}
        url = self._url(target.address, path, at_root=at_root)
        return await post(self._transport(target.address), target, url, body, sent)

    async def aclose(self) -> None:
        transports = [*self._sockets.values(), *([self._tcp] if self._tcp else [])]
        self._sockets, self._tcp = {}, None
        for transport in transports:
            await transport.aclose()

    def _engine_key(self, address: str) -> Mapping[str, str]:
        """The key of an engine of this node that asks for one; it lies beside its socket."""
        if address not in self._engine_keys:
            try:
                key = Path(address.removeprefix("unix:")).with_name("key").read_text()
            except OSError:
                return {}
            self._engine_keys[address] = {"authorization": f"Bearer {key}"} if key else {}
        return self._engine_keys[address]

    def _transport(self, address: str) -> httpx.AsyncBaseTransport:
        if not address.startswith("unix:"):
            if self._tcp is None:
                self._tcp = make_transport(make_session(self._site_connector()))
            return self._tcp
        if address not in self._sockets:
            if len(self._sockets) >= _MAX_SOCKETS:
                raise ResidencyRefused(f"more than {_MAX_SOCKETS} engine sockets are open: restart the node")
            connector = aiohttp.UnixConnector(
                path=address.removeprefix("unix:"), limit=_MAX_CONNECTIONS, keepalive_timeout=KEEPALIVE_SECONDS
            )
            self._sockets[address] = make_transport(make_session(connector))
        return self._sockets[address]

    def _site_connector(self) -> aiohttp.TCPConnector:
        return aiohttp.TCPConnector(
            limit=0,
            limit_per_host=_MAX_CONNECTIONS,
            keepalive_timeout=KEEPALIVE_SECONDS,
            ssl=httpx.create_ssl_context(),
            socket_factory=self._site_socket,
        )

    def _site_socket(self, info: tuple[Any, ...]) -> socket.socket:
        """Called by the connector with each address just before it connects to it."""
        family, kind, protocol, _, address = info
        self.check_address(address[0])
        made = socket.socket(family=family, type=kind, proto=protocol)
        made.setblocking(False)
        return made

    def check_address(self, address: str) -> None:
        """Raise NotOnSite unless `address` (a literal) is loopback or inside the site's networks."""
        parsed = ipaddress.ip_address(address.partition("%")[0])
        mapped = getattr(parsed, "ipv4_mapped", None)
        parsed = mapped or parsed
        if not parsed.is_loopback and not any(parsed in network for network in self._networks):
            raise NotOnSite(f"{parsed} is not on this site: list its network under [network] onsite")

    def _url(self, address: str, path: str, *, at_root: bool) -> httpx.URL:
        key = (address, path, at_root)
        url = self._urls.get(key)
        if url is None:
            base = "http://engine/v1" if address.startswith("unix:") else address
            url = self._urls[key] = httpx.URL((server_root(base) if at_root else base) + path)
        return url
