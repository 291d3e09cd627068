"""What the control plane sees, made into snapshots for the requests; and the line on which engines are asked."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import httpx

from appliance.core import CostBasis, EngineLoad, EngineStatus, HealthWarning, Snapshot, Target
from appliance.engines.base import LoadEndpointReader, LoadReader, ProbeRequest
from appliance.errors import BackendGarbage
from appliance.state import State

_ANSWER_SECONDS: Final = 5.0
"""An engine computes without holding its interpreter, so even a busy one answers within a step."""


class StatusPublisher:
    """Keeps targets, engine views and warnings, and publishes them together. The only writer of snapshots.

    Every change is published at once: a request must not be sent to an engine that is known to be down.
    """

    def __init__(self, state: State, clock: Callable[[], float], configured: Sequence[Target] = ()) -> None:
        self._state, self._clock = state, clock
        self._configured = tuple(configured)
        self._own: tuple[Target, ...] = ()
        self._served: dict[str, tuple[Target, ...]] = {}
        self._views: dict[str, EngineStatus] = {}
        self._warnings: dict[tuple[str, str], HealthWarning] = {}
        self._watts: Mapping[str, tuple[float, CostBasis]] = {}

    def set_configured_targets(self, targets: Sequence[Target]) -> None:
        """Replace the rows of the configured providers, at start and on reload."""
        self._configured = tuple(targets)
        self._publish()

    def set_engine_targets(self, targets: Sequence[Target]) -> None:
        """Replace the rows of this node's own engines; views of others are forgotten."""
        self._own = tuple(targets)
        names = {target.name for target in self._own}
        self._views = {name: view for name, view in self._views.items() if name in names}
        self._publish()

    def set_served_targets(self, engine: str, targets: Sequence[Target]) -> None:
        """What an engine serves in place of its own row: one program may be many targets. They share its view."""
        if self._served.get(engine) != tuple(targets):
            self._served[engine] = tuple(targets)
            self._publish()

    def replace_target(self, target: Target) -> None:
        """Put `target` in the place of the row of its name."""
        self._own = tuple(target if one.name == target.name else one for one in self._own)
        self._publish()

    def publish_status(self, view: EngineStatus) -> None:
        self._views[view.target] = view
        self._publish()

    def set_watts(self, watts: Mapping[str, tuple[float, CostBasis]]) -> None:
        """What engines draw while busy, by target, and how that is known. It takes the place of what views say."""
        if watts != self._watts:
            self._watts = dict(watts)
            self._publish()

    def warn(self, code: str, text: str, about: str = "") -> None:
        """Raise a named condition, or reword it. `about` tells several of one code apart."""
        warning = HealthWarning(code, text)
        if self._warnings.get((code, about)) != warning:
            self._warnings[code, about] = warning
            self._publish()

    def clear(self, code: str, about: str = "") -> None:
        """End a condition, if it is there."""
        if self._warnings.pop((code, about), None) is not None:
            self._publish()

    def _publish(self) -> None:
        own = [row for target in self._own for row in self._served.get(target.name, (target,))]
        views = {name: self._powered(view) for name, view in self._views.items()}
        for engine, targets in self._served.items():
            view = views.pop(engine, None)
            if view is not None:
                views.update({target.name: replace(view, target=target.name) for target in targets})
        snapshot = Snapshot(
            at=self._clock(),
            targets=(*own, *self._configured),
            engines=views,
            warnings=tuple(self._warnings.values()),
        )
        self._state.publish(snapshot)

    def _powered(self, view: EngineStatus) -> EngineStatus:
        known = self._watts.get(view.target)
        return view if known is None else replace(view, watts=known[0], watts_basis=known[1])


class EngineClient:
    """Asks one engine how it is, over its unix socket. Answers of anything but HTTP 200 count as no answer."""

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
        """None when it is ready, else what it answered or why it did not."""
        answer = await self._get("/health")
        return answer if isinstance(answer, str) else None

    async def fetch_load(
        self, gauges: LoadReader | None = None, clock: Callable[[], float] = time.monotonic
    ) -> EngineLoad | str:
        """Its load, or why it cannot be had."""
        gauges = gauges or LoadEndpointReader()
        answer = await self._get(gauges.path)
        if isinstance(answer, str):
            return answer
        try:
            return gauges.read(answer.text, clock())
        except BackendGarbage as error:
            return str(error)

    async def fetch_abilities(self) -> frozenset[str] | None:
        """What the engine found that its model can do; None where it does not say."""
        answer = await self._get("/v1/models")
        if isinstance(answer, str):
            return None
        try:
            found = answer.json()["data"][0]["meta"]["abilities"]
        except (ValueError, LookupError, TypeError):
            return None
        return frozenset(str(one) for one in found) if isinstance(found, list) else None

    async def send_probe(self, probe: ProbeRequest, timeout_seconds: float) -> int | None:
        """The status that a probe is answered with; None where there is no answer in time."""
        return await self.post(probe.path, probe.body, timeout_seconds)

    async def post(self, path: str, body: Mapping[str, Any], timeout_seconds: float) -> int | None:
        try:
            response = await self._client.post(path, json=body, timeout=timeout_seconds)
        except httpx.HTTPError:
            return None
        return response.status_code

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _get(self, path: str) -> Any:
        """The response, or a text that says why there is none."""
        try:
            response = await self._client.get(path)
        except httpx.HTTPError as error:
            return f"{path}: {type(error).__name__} {error}".rstrip()
        return response if response.status_code == httpx.codes.OK else f"{path}: HTTP {response.status_code}"
