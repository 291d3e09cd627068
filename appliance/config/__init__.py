"""What the operator wrote: the node's configuration and the policy, strict, frozen, replaced whole on reload.

Both are TOML. A mistake raises ConfigError with file, line and field; nothing is guessed, nothing unknown is ignored.
"""

from appliance.config.engine_settings import EngineModel, EngineSettings, ToleranceSettings, Workload
from appliance.config.loader import DEFAULT_POLICY_PATH, load_config, load_policy, parse_policy, read_secret
from appliance.config.policy import CapacityRule, Policy, PolicyDefaults, RouteRule, RouteScore
from appliance.config.provider_settings import NetworkSettings, Provider, ProviderLimits, ProviderModel
from appliance.config.route_match import RouteMatch
from appliance.config.route_rules import CascadeRule, DegradeRule, EscalationRule, PersonalDataRule, PruningRule
from appliance.config.settings import (
    CostSettings,
    JobsSettings,
    KeySettings,
    LearningSettings,
    LedgerSettings,
    LogSettings,
    NodeConfig,
    ServerSettings,
)
from appliance.config.strict import StrictModel
from appliance.config.targets import list_provider_targets

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
    "list_provider_targets",
    "load_config",
    "load_policy",
    "parse_policy",
    "read_secret",
]
