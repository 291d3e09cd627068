"""The half of a node that a reload replaces."""

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

import structlog

from appliance.api.auth import Authenticator
from appliance.config import KeySettings
from appliance.errors import ConfigError, LedgerUnavailable
from appliance.node.supervise.status import StatusPublisher
from appliance.quality.learning import CascadeLearning
from appliance.router.accounting import SpendAccounting, SpendCaps
from appliance.router.capacity.admission import Admission
from appliance.router.capacity.breaker import Breakers
from appliance.router.deps import NoFeedback, RouterDeps, RuntimeStats
from appliance.router.pipeline import Pipeline
from appliance.router.residency import EgressPermitIssuer
from appliance.serve.startup_config import NodeSpec
from appliance.state import State
from appliance.telemetry.redaction import scrub_text
from appliance.upstream.base import Transports
from appliance.upstream.egress import EgressTransport
from appliance.upstream.local import LocalTransport

_KEYS_SECONDS: Final = 2.0
"""How soon a key that is made or revoked by command counts."""
_FIXED: Final = ("data_dir", "server", "engine", "ledger", "jobs", "learning", "log")
"""Settings that are read at start alone."""

_log = structlog.get_logger(__name__)


class KeySource(Protocol):
    """Where API keys made by command are kept (`Ledger`)."""

    async def read_keys_mark(self) -> tuple[Any, ...]: ...

    async def list_keys(self) -> Sequence[KeySettings]: ...


class ReloadableNode:
    """The half of a node that a reload replaces: policy, providers with their prices and keys, API keys.

    Engines, ledger, admission, breakers and what was learned of targets go on; requests that have begun keep the
    pipeline they began with. Everything is called on the event loop.
    """

    def __init__(
        self,
        site: NodeSpec,
        reread: Callable[[], NodeSpec],
        state: State,
        signals: StatusPublisher,
        books: SpendAccounting,
        learning: CascadeLearning | None = None,
    ) -> None:
        self._site, self._reread, self._learning = site, reread, learning
        self._state, self._signals, self._books = state, signals, books
        self._office, self._breakers, self._stats = EgressPermitIssuer(), Breakers(), RuntimeStats()
        self._admission = Admission(state, time.monotonic, self._stats.estimators, signals)
        self._retired: list[Transports] = []
        self._changing = asyncio.Lock()
        """What was read first comes into force first: an older reading never replaces a newer one."""
        self._doors = self._make_doors(site)
        host = site.config.server.host
        self.auth = Authenticator(tuple(site.keys.values()), host=host, has_had_keys=site.has_had_keys)
        self.pipeline = self._make_pipeline(site)

    async def reload(self) -> Mapping[str, Any]:
        """Read configuration and policy again and use them from the next request on.

        Says what is in force and which changed settings wait for a restart. Raises ConfigError for a mistake, and then
        all stays as it was.
        """
        async with self._changing:
            try:
                site = await asyncio.to_thread(self._reread)
                return self._replace(site)
            except Exception as error:
                reason = str(error) if isinstance(error, ConfigError) else repr(error)
                self._signals.warn("reload_failed", f"the old settings stay in force: {scrub_text(reason)}")
                _log.error(
                    "reload failed; the old settings stay in force",
                    reason=reason,
                    exc_info=not isinstance(error, ConfigError),
                )
                raise

    def _replace(self, site: NodeSpec) -> Mapping[str, Any]:
        if site.stored_keys is None:
            # An unreadable ledger must not take away keys: with them would go what binds their requests.
            site = replace(site, stored_keys=self._site.stored_keys)
        old, self._site = self._site.config, site
        if (
            site.config.providers != old.providers
            or site.secrets != self._doors_secrets
            or site.config.network != old.network
        ):
            # Requests under way still hold the old doors; they are closed when the node stops.
            self._retired.append(self._doors)
            self._doors = self._make_doors(site)
        self._signals.set_configured_targets(site.configured)
        self._use(site)
        self.pipeline = self._make_pipeline(site)
        self._signals.clear("reload_failed")
        waiting = [name for name in _FIXED if getattr(site.config, name) != getattr(old, name)]
        _log.info("reloaded", policy=site.policy.version, needs_restart=waiting)
        return {"policy_version": site.policy.version, "policy": str(site.policy_path), "needs_restart": waiting}

    def _use(self, site: NodeSpec) -> None:
        self._site = site
        self.auth.load(tuple(site.keys.values()))
        self._books.caps = SpendCaps(site.config, site.policy, site.keys)

    async def follow_keys(self, ledger: KeySource, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Use keys that are made or revoked by command while the node runs. Runs until cancelled.

        The first look reads the keys in any case: one may have been revoked since the start, or since a failure.
        """
        known: tuple[Any, ...] | None = None
        while True:
            with contextlib.suppress(LedgerUnavailable):  # the health page says so; keys stay as they are
                async with self._changing:
                    mark = await ledger.read_keys_mark()
                    if mark != known:
                        self._use(replace(self._site, stored_keys=tuple(await ledger.list_keys())))
                    known = mark
            await sleep(_KEYS_SECONDS)

    async def aclose(self) -> None:
        await self._admission.aclose()
        for doors in (*self._retired, self._doors):
            await doors.local.aclose()
            if doors.egress is not None:
                await doors.egress.aclose()

    def _make_doors(self, site: NodeSpec) -> Transports:
        """What leads to targets. Without a hosted provider there is only the local door."""
        config, self._doors_secrets = site.config, site.secrets
        hosted = {one.name: one.address for one in config.providers if one.location == "hosted"}
        onsite_secrets = {name: secret for name, secret in site.secrets.items() if name not in hosted}
        local = LocalTransport(config.network.onsite, onsite_secrets)
        if not hosted:
            return Transports(local)
        secrets = {name: secret for name, secret in site.secrets.items() if name in hosted}
        return Transports(local, EgressTransport(hosted, secrets, self._office.key))

    def _make_pipeline(self, site: NodeSpec) -> Pipeline:
        deps = RouterDeps(
            state=self._state,
            ledger=self._books,
            admission=self._admission,
            breakers=self._breakers,
            stats=self._stats,
            transports=self._doors,
            permits=self._office,
            cost=site.config.cost,
            cores=site.config.engine.threads or len(os.sched_getaffinity(0)),
            alerts=self._signals,
            feedback=self._learning or NoFeedback(),
        )
        return Pipeline(site.policy, deps, site.detector)
