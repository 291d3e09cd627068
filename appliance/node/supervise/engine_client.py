"""Asks one engine how it is, over its unix socket."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import httpx

from appliance.core import EngineLoad
from appliance.core.json_types import JsonObject
from appliance.engines.base import LoadEndpointReader, LoadReader, ProbeRequest
from appliance.errors import BackendGarbage

_ANSWER_SECONDS: Final = 5.0
"""An engine computes without holding its interpreter, so even a busy one answers within a step."""


class EngineClient:
    """Calls one engine. An answer other than HTTP 200 counts as no answer."""

    def __init__(self, socket: Path, key: str = "") -> None:
        # verify=False: there is no TLS on a unix socket, and reading the certificates takes longer than the call.
        transport = httpx.AsyncHTTPTransport(uds=str(socket), verify=False)
        self._client = httpx.AsyncClient(
            transport=transport,
            base_url="http://engine",
            timeout=_ANSWER_SECONDS,
            trust_env=False,
            headers={"authorization": f"Bearer {key}"} if key else {},
        )

    async def check_health(self) -> str | None:
        """None when the engine is ready, else what it answered or why it did not."""
        answer = await self._get("/health")
        return answer if isinstance(answer, str) else None

    async def fetch_load(
        self, reader: LoadReader | None = None, clock: Callable[[], float] = time.monotonic
    ) -> EngineLoad | str:
        """The engine's load, or why it cannot be had."""
        reader = reader or LoadEndpointReader()
        answer = await self._get(reader.path)
        if isinstance(answer, str):
            return answer
        try:
            return reader.read(answer.text, clock())
        except BackendGarbage as error:
            return str(error)

    async def fetch_abilities(self) -> frozenset[str] | None:
        """What the engine found that its model can do; None when it does not say."""
        answer = await self._get("/v1/models")
        if isinstance(answer, str):
            return None
        try:
            found = answer.json()["data"][0]["meta"]["abilities"]
        except (ValueError, LookupError, TypeError):
            return None
        return frozenset(str(one) for one in found) if isinstance(found, list) else None

    async def send_probe(self, probe: ProbeRequest, timeout_seconds: float) -> int | None:
        """The HTTP status that answers a probe; None when there is no answer in time."""
        return await self.post(probe.path, probe.body, timeout_seconds)

    async def post(self, path: str, body: JsonObject, timeout_seconds: float) -> int | None:
        """The HTTP status of the answer; None when there is none in time."""
        try:
            response = await self._client.post(path, json=body, timeout=timeout_seconds)
        except httpx.HTTPError:
            return None
        return response.status_code

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _get(self, path: str) -> httpx.Response | str:
        """The response, or a text that says why there is none."""
        try:
            response = await self._client.get(path)
        except httpx.HTTPError as error:
            return f"{path}: {type(error).__name__} {error}".rstrip()
        return response if response.status_code == httpx.codes.OK else f"{path}: HTTP {response.status_code}"
