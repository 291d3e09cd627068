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
        spec: NodeSpec,
        read_spec: Callable[[], NodeSpec],
        state: State,
        status: StatusPublisher,
        accounting: SpendAccounting,
        learning: CascadeLearning | None = None,
    ) -> None:
        self._spec, self._read_spec, self._learning = spec, read_spec, learning
        self._state, self._status, self._accounting = state, status, accounting
        self._permit_issuer, self._breakers, self._stats = EgressPermitIssuer(), Breakers(), RuntimeStats()
        self._admission = Admission(state, time.monotonic, self._stats.estimators, status)
        self._retired_transports: list[Transports] = []
        self._reload_lock = asyncio.Lock()
        """What was read first comes into force first: an older reading never replaces a newer one."""
        self._transports = self._make_transports(spec)
        host = spec.config.server.host
        self.auth = Authenticator(tuple(spec.keys.values()), host=host, has_had_keys=spec.has_had_keys)
        self.pipeline = self._make_pipeline(spec, self._transports)

    async def reload(self) -> Mapping[str, Any]:
        """Read configuration and policy again and use them from the next request on.

        Says what is in force and which changed settings wait for a restart. Raises ConfigError for a mistake, and then
        all stays as it was.
        """
        async with self._reload_lock:
            try:
                spec = await asyncio.to_thread(self._read_spec)
                return self._replace(spec)
            except Exception as error:
                reason = str(error) if isinstance(error, ConfigError) else repr(error)
                self._status.warn("reload_failed", f"the old settings stay in force: {scrub_text(reason)}")
                _log.error(
                    "reload failed; the old settings stay in force",
                    reason=reason,
                    exc_info=not isinstance(error, ConfigError),
                )
                raise

    def _replace(self, spec: NodeSpec) -> Mapping[str, Any]:
        if spec.stored_keys is None:
            # An unreadable ledger must not take away keys: with them would go what binds their requests.
            spec = replace(spec, stored_keys=self._spec.stored_keys)
        old = self._spec
        transports = self._transports if _same_upstreams(old, spec) else self._make_transports(spec)
        pipeline = self._make_pipeline(spec, transports)
        # Nothing below fails: either all of the new settings come into force, or none.
        if transports is not self._transports:
            # Requests under way still hold the old transports; they are closed when the node stops.
            self._retired_transports.append(self._transports)
            self._transports = transports
        self._status.set_configured_targets(spec.configured)
        self._apply_keys(spec)
        self.pipeline = pipeline
        self._status.clear("reload_failed")
        waiting = [name for name in _FIXED if getattr(spec.config, name) != getattr(old.config, name)]
        _log.info("reloaded", policy=spec.policy.version, needs_restart=waiting)
        return {"policy_version": spec.policy.version, "policy": str(spec.policy_path), "needs_restart": waiting}

    def _apply_keys(self, spec: NodeSpec) -> None:
        self._spec = spec
        self.auth.replace_keys(tuple(spec.keys.values()))
        self._accounting.caps = SpendCaps(spec.config, spec.policy, spec.keys)

    async def follow_keys(self, ledger: KeySource, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Use keys that are made or revoked by command while the node runs. Runs until cancelled.

        The first look reads the keys in any case: one may have been revoked since the start, or since a failure.
        """
        known: tuple[Any, ...] | None = None
        while True:
            with contextlib.suppress(LedgerUnavailable):  # the health page says so; keys stay as they are
                async with self._reload_lock:
                    mark = await ledger.read_keys_mark()
                    if mark != known:
                        self._apply_keys(replace(self._spec, stored_keys=tuple(await ledger.list_keys())))
                    known = mark
            await sleep(_KEYS_SECONDS)

    async def aclose(self) -> None:
        await self._admission.aclose()
        for transports in (*self._retired_transports, self._transports):
            await transports.local.aclose()
            if transports.egress is not None:
                await transports.egress.aclose()

    def _make_transports(self, spec: NodeSpec) -> Transports:
        """Connections to targets. Without a hosted provider there is only the local transport."""
        config = spec.config
        hosted = {one.name: one.address for one in config.providers if one.location == "hosted"}
        onsite_secrets = {name: secret for name, secret in spec.secrets.items() if name not in hosted}
        local = LocalTransport(config.network.onsite, onsite_secrets)
        if not hosted:
            return Transports(local)
        secrets = {name: secret for name, secret in spec.secrets.items() if name in hosted}
        return Transports(local, EgressTransport(hosted, secrets, self._permit_issuer.key))

    def _make_pipeline(self, spec: NodeSpec, transports: Transports) -> Pipeline:
        deps = RouterDeps(
            state=self._state,
            ledger=self._accounting,
            admission=self._admission,
            breakers=self._breakers,
            stats=self._stats,
            transports=transports,
            permits=self._permit_issuer,
            cost=spec.config.cost,
            cores=spec.config.engine.threads or len(os.sched_getaffinity(0)),
            alerts=self._status,
            feedback=self._learning or NoFeedback(),
        )
        return Pipeline(spec.policy, deps, spec.detector)


def _same_upstreams(old: NodeSpec, new: NodeSpec) -> bool:
    """Whether the transports of `old` serve `new` too."""
    before, after = old.config, new.config
    return (before.providers, before.network, old.secrets) == (after.providers, after.network, new.secrets)
