"""What the operator wrote: the node's configuration and the policy, strict, frozen, replaced whole on reload.

Both are TOML. A mistake raises ConfigError with file, line and field; nothing is guessed, nothing unknown is ignored.
"""

from appliance.config.loader import DEFAULT_POLICY_PATH, load_config, load_policy, parse_policy, read_secret
from appliance.config.policy import (
    CapacityRule,
    CascadeRule,
    DegradeRule,
    EscalationRule,
    PersonalDataRule,
    Policy,
    PolicyDefaults,
    PruningRule,
    RouteMatch,
    RouteRule,
    RouteScore,
)
from appliance.config.settings import (
    CostSettings,
    EngineModel,
    EngineSettings,
    JobsSettings,
    KeySettings,
    LearningSettings,
    LedgerSettings,
    LogSettings,
    NetworkSettings,
    NodeConfig,
    Provider,
    ProviderLimits,
    ProviderModel,
    ServerSettings,
    ToleranceSettings,
    Workload,
)
from appliance.config.strict import StrictModel
from appliance.config.targets import provider_targets

__all__ = [
    "DEFAULT_POLICY_PATH",
    "CapacityRule",
    "CascadeRule",
    "CostSettings",
    "DegradeRule",
    "EngineModel",
    "EngineSettings",
    "EscalationRule",
    "JobsSettings",
    "KeySettings",
    "LearningSettings",
    "LedgerSettings",
    "LogSettings",
    "NetworkSettings",
    "NodeConfig",
    "PersonalDataRule",
    "Policy",
    "PolicyDefaults",
    "Provider",
    "ProviderLimits",
    "ProviderModel",
    "PruningRule",
    "RouteMatch",
    "RouteRule",
    "RouteScore",
    "ServerSettings",
    "StrictModel",
    "ToleranceSettings",
    "Workload",
    "load_config",
    "load_policy",
    "parse_policy",
    "provider_targets",
    "read_secret",
]
