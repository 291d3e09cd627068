"""What the operator wrote: the node's configuration and the policy, strict, frozen, replaced whole on reload.

Both are TOML. A mistake raises ConfigError with file, line and field; nothing is guessed, nothing unknown is ignored.
"""

from appliance.config.lines import line_of
from appliance.config.reading import (
    DEFAULT_POLICY_PATH,
    load_config,
    load_policy,
    parse_policy,
    read_secret,
)
from appliance.config.schema import (
    Cost,
    Defaults,
    Engine,
    Key,
    Ledger,
    Limits,
    Log,
    Match,
    Network,
    NodeConfig,
    Policy,
    Provider,
    ProviderModel,
    RouteRule,
    Server,
    Strict,
)
from appliance.config.targets import provider_targets

__all__ = [
    "DEFAULT_POLICY_PATH",
    "Cost",
    "Defaults",
    "Engine",
    "Key",
    "Ledger",
    "Limits",
    "Log",
    "Match",
    "Network",
    "NodeConfig",
    "Policy",
    "Provider",
    "ProviderModel",
    "RouteRule",
    "Server",
    "Strict",
    "line_of",
    "load_config",
    "load_policy",
    "parse_policy",
    "provider_targets",
    "read_secret",
]
