"""The nouns: frozen values that every room shares. No I/O, no clock; times are monotonic seconds unless named `_at`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Task = Literal[
    "classification",
    "extraction",
    "summarisation",
    "generation",
    "code",
    "reasoning",
    "translation",
    "chat",
    "tool_use",
]
Format = Literal["text", "json_object", "json_schema", "labels", "tools"]
LatencyClass = Literal["interactive", "batch"]
Profiler = Literal["rules", "learned", "llm"]
Endpoint = Literal[
    "chat", "completions", "decisions", "extract", "embeddings", "messages", "responses", "generate_content"
]
Location = Literal["onsite", "hosted"]
Dialect = Literal["openai", "anthropic", "gemini"]
Ability = Literal[
    "chat",
    "completions",
    "labels",
    "decisions",
    "json_schema",
    "logprobs",
    "token_logprobs",
    "tools",
    "vision",
    "embeddings",
    "reasoning",
    "classify",
]
KeyHeader = Literal["authorization", "x-api-key", "api-key", "x-goog-api-key"]
TokenLimit = Literal["as_given", "max_tokens", "max_completion_tokens"]
Api = Literal["chat", "responses"]
BatchApi = Literal["openai", "mistral", "anthropic"]
"""How a provider takes many requests at once, to be answered within a day."""
Thinking = Literal["effort", "budget"]
ToolFormat = Literal[
    "hermes",
    "hermes_list",
    "granite",
    "phi4",
    "mistral",
    "mistral_named",
    "llama3",
    "deepseek_v3",
    "deepseek_v31",
    "qwen3_coder",
    "glm",
    "pythonic",
    "lfm2",
    "harmony",
]
"""How a model writes its tool calls; named after the family that is best known for it."""
ReasoningFormat = Literal["think", "mistral_think", "harmony"]
"""How a model marks what it thinks before it answers."""
Scope = Literal["client", "admin"]
EngineState = Literal["starting", "ready", "draining", "failed", "stopped"]
PersonalKind = Literal[
    "email",
    "phone",
    "payment_card",
    "iban",
    "bic",
    "national_id",
    "passport",
    "driver_license",
    "medical_record",
    "date_of_birth",
    "ip_address",
    "mac_address",
    "crypto_wallet",
    "credentials",
    "postal_address",
    "person_name",
]
"""Kinds of personal or secret data that content is searched for."""
Stage = Literal["experimental", "managed", "deprecated"]
"""Life cycle of a route."""
CostBasis = Literal["price", "measured", "configured", "assumed"]
"""How far a cost is known: by a price list, by a meter, by the operator's word, or by nobody."""
AttemptResult = Literal["answered", "overflowed", "failed", "rejected", "refused", "cancelled"]

_REGION = re.compile(r"[A-Z]{2}(-[A-Z0-9]{1,8})?")


@dataclass(frozen=True, slots=True)
class Residency:
    """Where a request may be answered: on this site, in one region (the site included), or anywhere allowed."""

    kind: Literal["onsite", "region", "any"]
    region: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Residency":
        """Read `onsite`, `any` or `region:XX`. Raises ValueError on anything else; nothing is read as "any"."""
        word = text.strip()
        if word == "onsite":
            return ONSITE
        if word == "any":
            return ANYWHERE
        prefix, _, region = word.partition(":")
        if prefix == "region" and _REGION.fullmatch(region.upper()):
            return cls("region", region.upper())
        raise ValueError(f"residency {text!r} is not known: use onsite, any, or region:XX (for example region:EU)")

    def allows(self, target: "Target") -> bool:
        """Whether `target` lies inside the bound. A hosted target without a region is outside every region."""
        if target.location == "onsite" or self.kind == "any":
            return True
        return self.kind == "region" and target.region is not None and target.region == self.region

    def __str__(self) -> str:
        return f"region:{self.region}" if self.kind == "region" else self.kind


ONSITE = Residency("onsite")
ANYWHERE = Residency("any")


def strictest(*bounds: Residency) -> Residency:
    """The bound that satisfies all of `bounds`; two different regions leave only the site itself."""
    regions = {bound.region for bound in bounds if bound.kind == "region"}
    if any(bound.kind == "onsite" for bound in bounds) or len(regions) > 1:
        return ONSITE
    return Residency("region", regions.pop()) if regions else ANYWHERE


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as the API key says."""

    key_id: str
    name: str
    scopes: frozenset[Scope] = frozenset({"client"})
    residency: Residency = ANYWHERE
    tier: str | None = None
    routes: frozenset[str] | None = None
    """Names of the routes this key may use; None: all."""
    requests_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a task's reader made of a body, before anybody looked at headers or keys."""

    endpoint: Endpoint
    model: str
    body: Mapping[str, Any]
    text: str
    stream: bool = False
    format: Format = "text"
    needs: frozenset[Ability] = frozenset()
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Content:
    """What a request's content was found to hold before it was routed. Holds kinds alone, never the data."""

    kinds: tuple[PersonalKind, ...] = ()
    not_searched: str = ""
    """Why not all of it was searched; what nobody has looked at counts as personal data."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the caller wrote it, envelope checked, body verbatim."""

    id: str
    decision_id: str
    endpoint: Endpoint
    model: str
    body: Mapping[str, Any]
    """The parsed JSON; fields we do not know travel on."""
    text: str
    """All text a model would read, in order: what the profile and the residency detector look at."""
    stream: bool
    caller: Caller
    received: float
    received_at: float
    """Wall clock, seconds since the epoch."""
    residency: Residency | None = None
    """From the request's own header; None when it said nothing."""
    tag: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """In lower case, or a mapping that does not mind; may hold secrets, so they are never shown."""
    format: Format = "text"
    needs: frozenset[Ability] = frozenset()
    """What a target must be able to do to answer this at all."""
    output_tokens: int | None = None
    """Upper bound the caller set; None when it set none."""
    content: Content | None = None
    """None until it has been searched, and where no route asks for that."""
    latency_class: LatencyClass | None = None
    """Lines of a job are `batch`, and give way to everything else; None: told from the body."""
    patience_seconds: float | None = None
    """How long work that can wait may wait on-site before it goes elsewhere, in place of its route's budgets."""


@dataclass(frozen=True, slots=True)
class Profile:
    task: Task
    complexity: float
    """0 (a look-up) to 1 (needs a frontier model)."""
    format: Format
    latency_class: LatencyClass
    language: str | None
    prompt_tokens: int
    output_tokens: int
    risk: str = "normal"
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens. What is not given falls back to the input price: unknown is never free."""

    input_usd: float
    output_usd: float
    cached_input_usd: float | None = None
    cache_write_usd: float | None = None
    """Of prompt tokens that the provider puts into its cache."""
    cache_write_long_usd: float | None = None
    """Of those that it is to keep for an hour; empty: as `cache_write_usd`."""

    def cost_usd(self, usage: "Usage") -> float:
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        cached_usd = self.input_usd if self.cached_input_usd is None else self.cached_input_usd
        written = min(usage.cache_write_tokens, usage.prompt_tokens - cached)
        long = min(usage.cache_write_long_tokens, written)
        write_usd = self.input_usd if self.cache_write_usd is None else self.cache_write_usd
        long_usd = write_usd if self.cache_write_long_usd is None else self.cache_write_long_usd
        fresh = usage.prompt_tokens - cached - written
        prompt = fresh * self.input_usd + cached * cached_usd + (written - long) * write_usd + long * long_usd
        return (prompt + usage.completion_tokens * self.output_usd) / 1e6

    def times(self, share: float) -> "Price":
        """This price, `share` of it."""
        rest = (self.cached_input_usd, self.cache_write_usd, self.cache_write_long_usd)
        shares = (None if usd is None else usd * share for usd in rest)
        return Price(self.input_usd * share, self.output_usd * share, *shares)


@dataclass(frozen=True, slots=True)
class Wire:
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


PLAIN = Wire()


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
    wire: Wire = PLAIN
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
class EngineView:
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
class Warning_:
    """A named condition for the health page: `code` is stable, `text` says what is wrong and what to do."""

    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a request may know of the node, replaced whole by the control plane."""

    at: float
    targets: tuple[Target, ...] = ()
    engines: Mapping[str, EngineView] = field(default_factory=dict)
    """By target name. A hosted target has none."""
    warnings: tuple[Warning_, ...] = ()

    def target(self, name: str) -> Target | None:
        return next((target for target in self.targets if target.name == name), None)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One target to try, and why it stands where it stands."""

    target: Target
    reason: str


@dataclass(frozen=True, slots=True)
class Excluded:
    target: str
    reason: str


@dataclass(frozen=True, slots=True)
class Route:
    """What the policy made of one request. `attempts` may be empty, and then stays empty."""

    name: str
    policy_version: str
    residency: Residency
    residency_reason: str
    attempts: tuple[Attempt, ...]
    excluded: tuple[Excluded, ...]
    latency_budget_seconds: float
    """To the first byte; a target predicted to need longer is passed over while another one is left."""
    max_wait_seconds: float
    """How long a request may queue on-site when there is nowhere else to go."""
    total_seconds: float
    """One deadline for the whole chain."""
    max_attempts: int
    pinned: bool = False
    stage: Stage = "managed"
    answer_budget_seconds: float | None = None
    """To the end of the answer, where the route limits that too."""
    max_cost_usd: float | None = None
    """For all attempts of the request together."""
    retry_billed: bool = False
    """Whether the same target may be asked again after a failure that may have been billed."""
    escalations: tuple[Attempt, ...] = ()
    """Who is asked when an answer is unsure, in order."""
    standby: tuple[Attempt, ...] = ()
    """Engines that are not up now: waited for only where every attempt has come to nothing."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Everything before the first call: a pure function of request, policy and snapshot. What explain shows."""

    id: str
    request_id: str
    profile: Profile
    route: Route


@dataclass(frozen=True, slots=True)
class EgressPermit:
    """Leave to call one hosted target for one request. Only the residency decision can make a valid one.

    `seal` is a keyed digest over the other fields; the egress door refuses a permit whose seal it cannot verify.
    """

    request_id: str
    target: str
    seal: bytes


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    """Of the completion."""
    cache_write_tokens: int = 0
    """Of the prompt, not cached before and now put into the provider's cache."""
    cache_write_long_tokens: int = 0
    """Of those, what is kept for an hour."""

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.cache_write_tokens + other.cache_write_tokens,
            self.cache_write_long_tokens + other.cache_write_long_tokens,
        )


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One HTTP call to a target: path below its address, and the body. Its `model` is put in on sending."""

    path: str
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer from a target."""

    payload: Any
    """The parsed JSON body."""
    usage: Usage
    first_byte_seconds: float
    total_seconds: float
    rest_seconds: float | None = None
    """How long the target wants no more requests, where it said that this one took the last that it allows."""


class Call(Protocol):
    """One piece of work in a form that any able target can be given. Pure: no I/O.

    `outgoing` raises Unsupported where the target cannot be asked this. `read` turns the replies (one per outgoing, in
    order) into what the caller gets, and raises RejectedReply where they do not pass verification.
    """

    def streams(self, target: Target) -> bool:
        """Whether `target` is to answer piece by piece; what must be verified first is asked for whole."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def output_tokens(self) -> int: ...

    def outgoing(self, target: Target) -> Sequence[Outgoing]: ...

    def read(self, target: Target, replies: Sequence[Reply]) -> Any: ...


@dataclass(frozen=True, slots=True)
class AttemptOutcome:
    """One attempt as it went. Every attempt keeps its own cost, answered or not."""

    index: int
    target: str
    location: Location
    reason: str
    result: AttemptResult
    detail: str
    started_at: float
    first_byte_seconds: float | None
    total_seconds: float
    usage: Usage
    cost_usd: float | None
    """None where the cost is not known (an on-site target nobody priced)."""
    reservation: str | None = None
    """Id of the spend reservation that this attempt settled, for hosted targets."""
    cost_basis: CostBasis | None = None
    energy_joules: float | None = None
    """Of an engine of this node, beyond what the machine takes idling."""
    energy_basis: CostBasis | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request as it ended: the ledger's row. Holds no prompt and no answer."""

    decision_id: str
    request_id: str
    received_at: float
    endpoint: Endpoint
    model: str
    key_id: str
    route: str
    policy_version: str
    residency: str
    residency_reason: str
    profile: Profile
    attempts: tuple[AttemptOutcome, ...]
    excluded: tuple[Excluded, ...]
    status: int
    error_code: str | None
    stream: bool
    first_byte_seconds: float | None
    total_seconds: float


@dataclass(frozen=True, slots=True)
class Facts:
    """What every response says of itself in its headers."""

    request_id: str
    decision_id: str
    target: str | None
    location: Location | None
    route: str
    reason: str
    policy_version: str
    cost_usd: float | None
    cost_is_final: bool
    cost_basis: CostBasis | None = None
    warning: str | None = None
    """What the caller should know of the route besides: that it is deprecated."""

    def headers(self) -> dict[str, str]:
        headers = {
            "x-request-id": self.request_id,
            "x-appliance-decision": self.decision_id,
            "x-appliance-target": self.target or "none",
            "x-appliance-location": self.location or "none",
            "x-appliance-route": self.route,
            "x-appliance-reason": self.reason.encode("ascii", "replace").decode(),
            "x-appliance-policy": self.policy_version,
            "x-appliance-cost-usd": "unknown" if self.cost_usd is None else f"{self.cost_usd:.8f}",
        }
        if not self.cost_is_final:
            headers["x-appliance-cost-basis"] = "estimate"
        elif self.cost_basis is not None:
            headers["x-appliance-cost-basis"] = self.cost_basis
        if self.warning is not None:
            headers["x-appliance-warning"] = self.warning.encode("ascii", "replace").decode()
        return headers
