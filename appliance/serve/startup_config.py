"""What a node is started with, read and checked before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from appliance.api.auth import is_loopback
from appliance.config import (
    DEFAULT_POLICY_PATH,
    KeySettings,
    NodeConfig,
    Policy,
    list_provider_targets,
    load_policy,
    read_secret,
)
from appliance.core import Target
from appliance.engines.base import Placement
from appliance.errors import ConfigError, LedgerUnavailable
from appliance.ledger.database import sqlite_url
from appliance.ledger.keys import list_keys
from appliance.node.plan.swap import list_memory_pools
from appliance.router.pii.scanner import PiiDetector, make_detector
from appliance.router.profile import check_profiler


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """What a node is started with. `home` is the data directory, `secrets` are the providers' keys by name."""

    config: NodeConfig
    home: Path
    placements: tuple[Placement, ...]
    configured: tuple[Target, ...]
    policy: Policy
    policy_path: Path
    secrets: Mapping[str, str] = field(repr=False)
    stored_keys: tuple[KeySettings, ...] | None = ()
    """API keys made by command; those of the configuration are in `config`. None where they could not be read."""
    pools: Mapping[str, int] = field(default_factory=dict)
    """Bytes that all models of a pool of memory may hold together (`swap.pools_of`)."""
    detector: PiiDetector | None = None
    """Of personal data, where the policy wants requests searched."""
    has_had_keys: bool = False
    """Whether any key was ever made by command, revoked ones included: then nobody is anonymous."""

    @property
    def keys(self) -> Mapping[str, KeySettings]:
        """By name; the configuration's win."""
        return {key.name: key for key in (*(self.stored_keys or ()), *self.config.keys)}


def locate_ledger(config: NodeConfig, home: Path) -> str:
    """Where the ledger lies: the configured database, else a file in the data directory."""
    return config.ledger.url or sqlite_url(home / "ledger.sqlite")


def build_node_spec(
    config: NodeConfig, home: Path, placements: tuple[Placement, ...], pools: Mapping[str, int] | None = None
) -> NodeSpec:
    """Read everything that a start depends on. `pools`: bytes that models may hold together; None: all fit.

    Raises ConfigError for what contradicts itself or is missing.
    """
    configured = list_provider_targets(config)
    policy_path = Path(config.policy).expanduser() if config.policy else DEFAULT_POLICY_PATH
    policy = load_policy(policy_path, [*configured, *(placed.target for placed in placements)])
    secrets = {one.name: secret for one in config.providers if (secret := read_secret(one)) is not None}
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)  # files of jobs hold prompts
    except OSError as error:
        raise ConfigError(f"cannot make the data directory {home}: {error.strerror}; choose another one") from error
    stored, has_had_keys = _stored_keys(config, home)
    if not config.keys and not stored and not is_loopback(config.server.host):
        raise ConfigError(
            f"listening on {config.server.host} lets others in, so API keys are needed: make one with "
            "`appliance keys create NAME` (with the same data directory), or listen on 127.0.0.1",
            field="server.host",
        )
    detector = make_detector(policy)
    check_profiler(policy.defaults.profiler)
    if pools is None:
        whole = sum(one.memory.total_bytes for one in placements)
        pools = {pool: whole for one in placements for pool in list_memory_pools(one)}
    return NodeSpec(
        config,
        home,
        placements,
        configured,
        policy,
        policy_path,
        secrets,
        stored,
        pools=pools,
        detector=detector,
        has_had_keys=has_had_keys,
    )


def _stored_keys(config: NodeConfig, home: Path) -> tuple[tuple[KeySettings, ...] | None, bool]:
    """API keys made by command, and whether there ever were any. None where there is no ledger yet, or it cannot be
    read (said when it is opened)."""
    try:
        stored = list_keys(locate_ledger(config, home))
    except LedgerUnavailable:
        return None, False
    return tuple(one.key for one in stored if one.revoked_at is None), bool(stored)
