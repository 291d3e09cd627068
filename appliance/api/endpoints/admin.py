"""Health, readiness, metrics and reload: for load balancers, orchestrators, scrapers and operators."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import structlog
from starlette.requests import Request as Http
from starlette.responses import Response

from appliance import __version__
from appliance.api.intake import RequestIntake
from appliance.api.json_responses import respond_json
from appliance.api.protocols import LedgerReader, MetricsPage, SnapshotSource
from appliance.core import Snapshot, Target
from appliance.errors import ConfigError, RequestError
from appliance.router.capacity.predictor import STALE_SECONDS

_log = structlog.get_logger(__name__)


class AdminEndpoints:
    def __init__(
        self,
        intake: RequestIntake,
        state: SnapshotSource,
        ledger: LedgerReader,
        metrics: MetricsPage,
        reload: Callable[[], Awaitable[Mapping[str, Any]]],
    ) -> None:
        self._intake = intake
        self._reload = reload
        self._state = state
        self._ledger = ledger
        self._metrics = metrics

    async def show_health(self, http: Http) -> Response:
        """Alive: always 200. `status` is degraded where something needs a person; callers with a key see what."""
        health = self._ledger.health()
        warnings = [{"code": warning.code, "text": warning.text} for warning in self._state.snapshot.warnings]
        status = "ok" if health.ok and not warnings else "degraded"
        if not self._intake.auth.is_known(http.headers):
            return respond_json({"status": status})
        ledger = {"ok": health.ok, "reason": health.reason, "pending": health.pending, "dropped": health.dropped}
        return respond_json({"status": status, "version": __version__, "ledger": ledger, "warnings": warnings})

    async def show_readiness(self, http: Http) -> Response:
        """200 while some target can answer, 503 with the reasons otherwise."""
        rows = list_readiness(self._state.snapshot, self._intake.clock())
        ready = any(row["ready"] for row in rows)
        body: dict[str, Any] = {"ready": ready}
        if self._intake.auth.is_known(http.headers):
            body["targets"] = rows
        headers = {} if ready else {"retry-after": "5"}
        return respond_json(body, status=200 if ready else 503, headers=headers)

    async def show_metrics(self, http: Http) -> Response:
        self._intake.auth.authenticate(http.headers, "admin")
        self._metrics.observe_snapshot(self._state.snapshot)
        self._metrics.observe_ledger(self._ledger.health())
        content, content_type = self._metrics.render()
        return Response(content, headers={"content-type": content_type})

    async def reload_settings(self, http: Http) -> Response:
        """Policy, providers, prices and keys from their files, from the next request on; a mistake changes nothing."""
        caller = self._intake.auth.authenticate(http.headers, "admin")
        _log.info("reload asked for", key=caller.key_id)
        try:
            return respond_json(await self._reload())
        except ConfigError as error:
            raise RequestError(f"nothing was changed: {error}", status=422) from error


def list_readiness(snapshot: Snapshot, now: float) -> Sequence[Mapping[str, Any]]:
    """Each target, whether it can answer now, and why not. `now` is monotonic."""
    rows = []
    for target in snapshot.targets:
        reason = _why_not(target, snapshot, now)
        rows.append({"target": target.name, "location": target.location, "ready": not reason, "reason": reason})
    return rows


def _why_not(target: Target, snapshot: Snapshot, now: float) -> str:
    if target.provider is not None:
        return ""  # whether it is up shows when it is called
    view = snapshot.engines.get(target.name)
    if view is None:
        return "its engine has not been seen yet"
    if view.on_demand:
        return ""  # a request waits until it is loaded
    if view.state != "ready":
        return f"its engine is {view.state}" + (f": {view.reason}" if view.reason else "")
    if now - view.seen > STALE_SECONDS:
        return f"its engine was last seen {now - view.seen:.1f} s ago"
    return ""
