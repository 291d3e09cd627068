"""What the operator wrote: the node's configuration and the policy, strict, frozen, replaced whole on reload.

Both are TOML. A mistake raises ConfigError with file, line and field; nothing is guessed, nothing unknown is ignored.
"""

from appliance.config.loader import DEFAULT_POLICY_PATH, load_config, load_policy, parse_policy, read_secret
from appliance.config.policy import (
    Capacity,
    Cascade,
    Defaults,
    Degrade,
    Escalation,
    Match,
    PersonalData,
    Policy,
    Pruning,
    RouteRule,
    Score,
)
from appliance.config.settings import (
    Cost,
    Engine,
    EngineModel,
    Jobs,
    Key,
    Learning,
    Ledger,
    Limits,
    Log,
    Network,
    NodeConfig,
    Provider,
    ProviderModel,
    Server,
    Tolerance,
    Workload,
)
from appliance.config.strict import Strict
from appliance.config.targets import provider_targets

__all__ = [
    "DEFAULT_POLICY_PATH",
    "Capacity",
    "Cascade",
    "Cost",
    "Defaults",
    "Degrade",
    "Engine",
    "EngineModel",
    "Escalation",
    "Jobs",
    "Key",
    "Learning",
    "Ledger",
    "Limits",
    "Log",
    "Match",
    "Network",
    "NodeConfig",
    "PersonalData",
    "Policy",
    "Provider",
    "ProviderModel",
    "Pruning",
    "RouteRule",
    "Score",
    "Server",
    "Strict",
    "Tolerance",
    "Workload",
    "load_config",
    "load_policy",
    "parse_policy",
    "provider_targets",
    "read_secret",
]
