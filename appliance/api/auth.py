"""Who asks: API keys, kept as SHA-256 digests, with scopes. A key's text is never logged and never kept."""

import hashlib
import ipaddress
from collections.abc import Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit

from appliance.config import KeySettings
from appliance.core import Caller, Residency, Scope
from appliance.errors import Forbidden, Unauthorized

ANONYMOUS: Final = Caller("anonymous", "anonymous", frozenset({"client", "admin"}))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`. Names other than localhost count as open."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Authenticator:
    """Turns headers into a Caller. `replace_keys` is what a reload calls."""

    def __init__(self, keys: Sequence[KeySettings], *, host: str, has_had_keys: bool = False) -> None:
        """`has_had_keys`: there were keys before, even if none is left."""
        self._host = host
        self._is_loopback = is_loopback(host)
        self._callers: Mapping[str, Caller] = {}
        self._has_had_keys = has_had_keys
        """A node whose last key is revoked or lost is closed, not open to everybody."""
        self.replace_keys(keys)

    def replace_keys(self, keys: Sequence[KeySettings]) -> None:
        self._callers = {key.sha256: _caller(key) for key in keys}
        self._has_had_keys = self._has_had_keys or bool(keys)

    def authenticate(self, headers: Mapping[str, str], scope: Scope = "client") -> Caller:
        """Who asks. `headers` must not mind case. Raises Unauthorized, or Forbidden where the key lacks `scope`."""
        if not self._has_had_keys:
            return self._anonymous(headers)
        text = _key_text(headers)
        if not text:
            raise Unauthorized(
                "no API key was sent: put it in the header `Authorization: Bearer KEY`, `x-api-key` or `x-goog-api-key`"
            )
        # Looked up by digest: how long that takes tells nothing of a key that could be guessed from it.
        caller = self._callers.get(hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest())
        if caller is None:
            raise Unauthorized("this API key is not known here: check it, or make one with `appliance keys create`")
        if scope not in caller.scopes:
            raise Forbidden(
                f"API key {caller.name!r} lacks the scope {scope!r}: add it to the key in the configuration"
            )
        return caller

    def find_caller(self, key_id: str) -> Caller:
        """The caller of that name as its key is now, for work that it left behind. Raises Unauthorized."""
        if key_id == ANONYMOUS.key_id and not self._has_had_keys:
            return ANONYMOUS
        found = next((caller for caller in self._callers.values() if caller.key_id == key_id), None)
        if found is None:
            raise Unauthorized(f"API key {key_id!r} is not in use any more: work is done only for keys that are")
        return found

    def is_known(self, headers: Mapping[str, str]) -> bool:
        """Whether `headers` name a caller at all, for pages that show strangers less."""
        try:
            self.authenticate(headers)
        except (Unauthorized, Forbidden):
            return False
        return True

    def _anonymous(self, headers: Mapping[str, str]) -> Caller:
        """Without keys only this machine's own programs may ask, and not web pages that happen to be open on it."""
        if not self._is_loopback:
            raise Unauthorized(
                f"this node listens on {self._host} and has no API keys: make one with `appliance keys create NAME`, "
                "or listen on 127.0.0.1"
            )
        origin = headers.get("origin")
        if origin is not None and not is_loopback(urlsplit(origin).hostname or ""):
            raise Forbidden(f"requests from the web page {origin[:100]!r} are refused while this node has no API keys")
        return ANONYMOUS


def _caller(key: KeySettings) -> Caller:
    return Caller(
        key_id=key.name,
        name=key.name,
        scopes=frozenset(key.scopes),
        residency=Residency.parse(key.residency),
        tier=key.tier,
        routes=None if key.routes is None else frozenset(key.routes),
        requests_per_minute=key.requests_per_minute,
    )


def _key_text(headers: Mapping[str, str]) -> str:
    scheme, _, text = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and text.strip():
        return text.strip()
    return headers.get("x-api-key", "").strip() or headers.get("x-goog-api-key", "").strip()
