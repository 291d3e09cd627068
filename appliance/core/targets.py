"""Places that can answer, and the node as requests see it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from appliance.core.literals import (
    Ability,
    Api,
    BatchApi,
    CostBasis,
    Dialect,
    EngineState,
    KeyHeader,
    Location,
    Thinking,
    TokenLimit,
)
from appliance.core.money import Price


@dataclass(frozen=True, slots=True)
class ProviderQuirks:
    """How one target speaks its dialect otherwise than the dialect itself. Plain data; the default: not at all."""

    kind: str = ""
    """The row of the table of providers that this was made from."""
    key_header: KeyHeader = "authorization"
    """Where its API key goes; in `authorization` it is a bearer token."""
    headers: tuple[tuple[str, str], ...] = ()
    """Sent with every call."""
    query: str = ""
    """Added to every address, for example `api-version=2024-10-21`."""
    deployments: bool = False
    """Whether the model stands in the path: `/deployments/MODEL/chat/completions`."""
    token_limit: TokenLimit = "as_given"
    """The name of the field that limits the answer's length."""
    renames: tuple[tuple[str, str], ...] = ()
    """Fields of the body that have another name there: (ours, theirs)."""
    refuses: frozenset[str] = frozenset()
    """Fields that cannot be carried over: a body that has one is not sent."""
    leaves_out: frozenset[str] = frozenset()
    """Fields that the operator wants left out where they cannot be carried over."""
    strips: frozenset[str] = frozenset()
    """Fields of a conversation's messages that hold another model's private reasoning, and are not sent along."""
    stream_usage: bool = True
    """Whether `stream_options` is understood."""
    api: Api = "chat"
    """Which of a provider's two chat APIs the model speaks."""
    batches: BatchApi | None = None
    """How it takes requests in batches; None: not at all, or not known."""
    thinking: Thinking = "effort"
    """How much it is to think: by a word, or by a number of tokens."""
    max_output_tokens: int | None = None
    """Where the dialect wants a limit and the caller gave none."""


PLAIN = ProviderQuirks()


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """Four limits, because a silent target, a slow one and a dead one are three different things."""

    connect_seconds: float = 5.0
    first_byte_seconds: float = 60.0
    between_tokens_seconds: float = 30.0
    total_seconds: float = 600.0


@dataclass(frozen=True, slots=True)
class Target:
    """One place that can answer: a row of data, whatever it is."""

    name: str
    """`onsite/MODEL` or `PROVIDER/MODEL`; unique."""
    location: Location
    dialect: Dialect
    address: str
    """`unix:/path/to.sock`, or the base URL up to and including the version, for example `https://host/v1`."""
    model: str
    """The name the target itself knows the model by."""
    abilities: frozenset[Ability]
    context_tokens: int | None = None
    region: str | None = None
    provider: str | None = None
    """The configured provider whose key is used; None for engines of this node."""
    price: Price | None = None
    """None only on-site: hosted targets always have one."""
    batch_price: Price | None = None
    """Of requests that are sent in one of the provider's own batches; None: they are not sent so."""
    quality: float | None = None
    """How good its answers are, from 0 to 1, as the operator or the catalogue declares it."""
    limits: TimeLimits = TimeLimits()
    variant: str | None = None
    """Which of the model's variants an engine of this node serves; what was calibrated on one is not true of others."""
    wire: ProviderQuirks = PLAIN
    """What its provider does differently."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine last said of itself (its `/load`)."""

    queued_requests: int
    running_sequences: int
    sequences_capacity: int
    queued_prompt_tokens: int
    remaining_output_tokens: int
    kv_used_tokens: int
    kv_cached_tokens: int
    kv_capacity_tokens: int
    steps: int
    prefill_tokens_total: int
    decode_tokens_total: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: Mapping[int, float]
    """By number of running sequences, over all sequences together."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """One engine as the control plane saw it at `seen` (monotonic seconds)."""

    target: str
    state: EngineState
    seen: float
    load: EngineLoad | None = None
    watts: float | None = None
    """Extra power while busy; None where neither a meter nor the operator tells."""
    watts_basis: CostBasis = "configured"
    restarts: int = 0
    reason: str = ""
    on_demand: bool = False
    """Not loaded now, and loaded as soon as a request wants it."""


@dataclass(frozen=True, slots=True)
class HealthWarning:
    """A named condition for the health page: `code` is stable, `text` says what is wrong and what to do."""

    code: str
    text: str


class HealthAlerts(Protocol):
    """Where named conditions are shown to the operator: the health page and the metrics."""

    def warn(self, code: str, text: str, about: str = "") -> None:
        """Raise a condition, or reword it. `about` tells several of one code apart."""

    def clear(self, code: str, about: str = "") -> None:
        """End a condition, if it is there."""


class NoAlerts:
    """Alerts that nobody reads, for programs without a control plane."""

    def warn(self, code: str, text: str, about: str = "") -> None:
        pass

    def clear(self, code: str, about: str = "") -> None:
        pass


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a request may know of the node, replaced whole by the control plane."""

    at: float
    targets: tuple[Target, ...] = ()
    engines: Mapping[str, EngineStatus] = field(default_factory=dict)
    """By target name. A hosted target has none."""
    warnings: tuple[HealthWarning, ...] = ()

    def target(self, name: str) -> Target | None:
        return next((target for target in self.targets if target.name == name), None)
