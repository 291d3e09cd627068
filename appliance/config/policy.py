"""The policy's own tables: routes, what they are for, where they lead, what they may cost and what happens when not."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from appliance.config.strict import Name, PositiveSeconds, StrictModel, check_residency
from appliance.core import Endpoint, Format, LatencyClass, PersonalKind, Profiler, Residency, Stage, Task, Verification

Share = Annotated[float, Field(gt=0, le=1)]
PositiveUsd = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Tokens = Annotated[int, Field(ge=1)]

SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "x-api-key", "api-key"})


class RouteMatch(StrictModel):
    """Which requests a route is for. Every field given must hold; a list holds if one of its values does."""

    task: tuple[Task, ...] | None = None
    """The profile's task."""
    endpoint: tuple[Endpoint, ...] | None = None
    """The API that the request came by."""
    format: tuple[Format, ...] | None = None
    """The format that the answer must have."""
    latency_class: tuple[LatencyClass, ...] | None = None
    """`batch` for many texts in a call, else `interactive`."""
    language: tuple[str, ...] | None = None
    """ISO 639-1 codes, as the profile guesses them."""
    risk: tuple[Name, ...] | None = None
    """Risk classes: `personal_data` where a search found some, else `normal`."""
    complexity_at_least: float | None = Field(default=None, ge=0, le=1)
    """Least complexity, included. 0 is a look-up, 1 needs a frontier model."""
    complexity_below: float | None = Field(default=None, ge=0, le=1)
    """Upper limit of the complexity, not included."""
    prompt_tokens_at_least: int | None = Field(default=None, ge=0)
    """Least estimated length of the prompt, included."""
    prompt_tokens_below: int | None = Field(default=None, ge=1)
    """Upper limit of the estimated length of the prompt, not included."""
    output_tokens_at_least: int | None = Field(default=None, ge=0)
    """Least length of the answer, included: the request's limit, or the usual length."""
    output_tokens_below: int | None = Field(default=None, ge=1)
    """Upper limit of the length of the answer, not included."""
    key: tuple[str, ...] | None = None
    """Names of API keys."""
    tier: tuple[str, ...] | None = None
    """Tiers of API keys."""
    tag: tuple[str, ...] | None = None
    """Values of the header `x-appliance-tag`."""
    header: Mapping[str, str] | None = None
    """Other headers and the value that each must have, for example `header = { "x-team" = "sales" }`."""

    @field_validator(
        "task", "endpoint", "format", "latency_class", "language", "risk", "key", "tier", "tag", mode="after"
    )
    @classmethod
    def _names_something(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value == ():
            raise ValueError("an empty list matches nothing: leave the field out, or name a value")
        return value

    @field_validator("header")
    @classmethod
    def _in_lower_case(cls, value: Mapping[str, str] | None) -> Mapping[str, str] | None:
        if value is None:
            return None
        if not value:
            raise ValueError("an empty table matches nothing: leave the field out, or name a header")
        secret = sorted(name for name in value if name.lower() in SECRET_HEADERS)
        if secret:
            raise ValueError(f"header {secret[0]!r} carries a secret, which no policy may hold: match on key or tier")
        return {name.lower(): text for name, text in value.items()}

    @model_validator(mode="after")
    def _can_hold(self) -> "RouteMatch":
        for name, low, high in self.ranges():
            if low is not None and high is not None and low >= high:
                raise ValueError(f"{name}_at_least is not below {name}_below: no request can match")
        return self

    def ranges(self) -> tuple[tuple[str, float | None, float | None], ...]:
        """Name, lower bound (included) and upper bound (not included) of each figure."""
        return (
            ("complexity", self.complexity_at_least, self.complexity_below),
            ("prompt_tokens", self.prompt_tokens_at_least, self.prompt_tokens_below),
            ("output_tokens", self.output_tokens_at_least, self.output_tokens_below),
        )

    def lists(self) -> tuple[tuple[str, tuple[str, ...] | None], ...]:
        """Name and accepted values of each field that holds a list."""
        return (
            ("task", self.task),
            ("endpoint", self.endpoint),
            ("format", self.format),
            ("latency_class", self.latency_class),
            ("language", self.language),
            ("risk", self.risk),
            ("key", self.key),
            ("tier", self.tier),
            ("tag", self.tag),
        )


class RouteScore(StrictModel):
    """Weights to choose among the targets by, instead of their order. Only their proportions matter."""

    latency: Weight = 0.0
    """Weight of a short predicted time to the first token."""
    quality: Weight = 0.0
    """Weight of the target's declared quality."""
    cost: Weight = 0.0
    """Weight of a low expected cost."""

    @model_validator(mode="after")
    def _weighs_something(self) -> "RouteScore":
        if self.latency + self.quality + self.cost <= 0:
            raise ValueError("every weight is 0: give at least one of latency, quality and cost a weight")
        return self


class EscalationRule(StrictModel):
    """Ask a better target when the answer is unsure. Decisions, extractions, and chats that ask for logprobs."""

    below_confidence: Share
    """An answer is unsure when the least confidence of its parts is below this."""
    below_label_mass: Share | None = None
    """A decision is unsure too when less probability than this fell on its options."""
    max_rate: Share
    """Most escalations as a share of the answers judged in the window; beyond it unsure answers stand."""
    window_seconds: PositiveSeconds = 3600.0
    """Window over which that share is taken."""
    to: tuple[str, ...] = Field(min_length=1)
    """Targets to escalate to, in order of preference, as a route's targets."""


class CascadeRule(StrictModel):
    """The route's targets as steps for decisions: a classifier first, and each next word of `targets` is asked only
    about the texts that the one before was unsure of. Other requests find the same targets, in order of preference."""

    bound: Annotated[float, Field(gt=0, lt=1)]
    """Largest share of all texts that the classifier may answer otherwise than the reference: the last step, or
    feedback. The confidence from which an answer stands follows from it."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """Confidence with which the bound is kept."""
    over_texts: int = Field(default=1000, ge=0)
    """The bound holds for the next so many texts themselves; 0: in the long run, which short streams may exceed."""
    until_known: Literal["escalate", "below_confidence"] = "escalate"
    """What happens while too few labels are known to keep the bound: every text goes on, or only those below
    `below_confidence`, and then nothing is promised."""
    below_confidence: Share = 0.9
    """An answer of a model between the classifier and the last step is unsure below this confidence."""
    max_rate: Share = 1.0
    """Largest share of texts in the window that go on. The least sure go first; the others keep the classifier's
    answer, marked `unsure`, outside the bound."""
    window_seconds: PositiveSeconds = 3600.0
    """Window over which that share is taken."""
    audit_rate: float = Field(default=0.02, ge=0, le=1)
    """Share of all texts, drawn at random, that the last step answers too, however sure the classifier is. They show
    how often it is right on this traffic. Only texts that may go there are drawn."""
    learn_after: int | None = Field(default=None, ge=20)
    """Train a candidate after so many new labels; empty: only on command. Needs `keep_texts`."""
    learn_from: tuple[Name, ...] | None = Field(default=None, min_length=1)
    """Names of keys whose texts may be learned from together; empty: never those of more than one key."""


class PruningRule(StrictModel):
    keep_tokens: Tokens
    """About how many prompt tokens stay: system messages and the newest turns. The oldest turns are removed first."""


class DegradeRule(StrictModel):
    """One step down, taken when no target could answer in full. Steps are tried in their order.

    `constrained`: a shorter answer or a smaller context. `reduced_scope`: the system messages and the last user message
    alone. `static`: `text` as the answer, without any model. Chat and completions only.
    """

    step: Literal["constrained", "reduced_scope", "static"]
    """What this step gives up."""
    max_output_tokens: Tokens | None = None
    """Longest answer of this step."""
    keep_tokens: Tokens | None = None
    """Largest context of this step, for `constrained`."""
    text: str | None = Field(default=None, min_length=1)
    """The answer of a `static` step: what the caller can do now."""

    @model_validator(mode="after")
    def _is_complete(self) -> "DegradeRule":
        limits = self.max_output_tokens is not None or self.keep_tokens is not None
        if self.step == "static" and (self.text is None or limits):
            raise ValueError("a static step has text, and nothing else")
        if self.step != "static" and self.text is not None:
            raise ValueError(f"a {self.step} step has no text: only a static one answers by itself")
        if self.step == "constrained" and not limits:
            raise ValueError("a constrained step needs max_output_tokens or keep_tokens")
        if self.step == "reduced_scope" and self.keep_tokens is not None:
            raise ValueError("reduced_scope keeps the last user message alone: use constrained for keep_tokens")
        return self


ContentSearch = Literal["off", "personal_data"]

STRUCTURED: tuple[PersonalKind, ...] = (
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
)
"""What has a form of its own, so that patterns and check digits find nearly all of it."""


class PersonalDataRule(StrictModel):
    """Requests that hold personal data are bound, whatever key and header allow.

    All that a model would read is searched before the request is routed. What could not be searched (it took too long,
    it is an image, the detector failed) is bound too.
    """

    content: ContentSearch = "off"
    """`personal_data` searches the requests of every route that does not say otherwise."""
    kinds: tuple[PersonalKind, ...] = Field(default=STRUCTURED, min_length=1)
    """Kinds of personal data that count. `postal_address` and `person_name` are found in part only, so they are not
    among the defaults."""
    bound: str = "onsite"
    """What binds such a request: onsite or region:XX."""
    detector: Literal["patterns", "presidio"] = "patterns"
    """`presidio` needs the extra of that name and a language model for it."""
    timeout_seconds: PositiveSeconds = 2.0
    """Longest search; a request that takes longer is bound."""

    @field_validator("bound")
    @classmethod
    def _binds(cls, value: str) -> str:
        if Residency.parse(value).kind == "any":
            raise ValueError("a bound of 'any' binds nothing: use onsite or region:XX, or set content to off")
        return check_residency(value)


class RouteRule(StrictModel):
    """One route. What is left out comes from [defaults]."""

    name: Name
    """Its name in headers, the ledger and keys."""
    stage: Stage = "managed"
    """Life cycle. Responses of a deprecated route have a warning header."""
    match: RouteMatch = RouteMatch()
    targets: tuple[str, ...] = Field(min_length=1)
    """In order of preference: a target's name, `onsite` (all on-site targets) or `hosted` (all hosted ones)."""
    score: RouteScore | None = None
    """Choose among the targets by these weights instead of by their order."""
    allowed_risk: tuple[Name, ...] | None = Field(default=None, min_length=1)
    """Requests of another risk class are refused."""
    residency: str | None = None
    """Binds every request of this route: onsite, region:XX or any."""
    content: ContentSearch | None = None
    """Whether personal data in a request binds it; empty: as under [residency]."""
    latency_budget_seconds: PositiveSeconds | None = None
    """Time to the first token. A target predicted to need longer is passed over while another one is left."""
    answer_budget_seconds: PositiveSeconds | None = None
    """Time to the end of the answer, where that counts too. A target predicted to need longer is passed over."""
    max_wait_seconds: PositiveSeconds | None = None
    """How long a request may queue on-site when no other target may answer."""
    total_seconds: PositiveSeconds | None = None
    """One deadline for all attempts together."""
    max_attempts: int | None = Field(default=None, ge=1, le=10)
    """One number for the whole request: overflow, fallback, retry and escalation together."""
    daily_usd: float | None = Field(default=None, ge=0)
    """What this route's requests may cost in hosted calls in one UTC day; empty: no limit."""
    retry_billed: bool = False
    """Whether the same target may be asked again after a failure that may have been billed."""
    verify: Verification | None = None
    """When streamed tool calls and JSON are verified: `whole` holds the answer until it was checked, so that another
    target can be asked. `stream` passes it on as it comes; one that proves wrong ends in an error event. Empty: `whole`
    where another attempt is left, else `stream`."""
    min_quality: float | None = Field(default=None, gt=0, le=1)
    """Quality floor: targets that declare less, or nothing, are left out."""
    max_cost_usd: PositiveUsd | None = None
    """Ceiling for one request, all its attempts together."""
    max_cost_per_success_usd: PositiveUsd | None = None
    """Ceiling for the recent cost of an answer of one target, failures included. Above it the target is left out."""
    max_output_tokens: Tokens | None = None
    """Longest answer: a caller's higher limit is lowered to this."""
    prune_context: PruningRule | None = None
    escalation: EscalationRule | None = None
    cascade: CascadeRule | None = None
    keep_texts: bool = False
    """Whether texts that a cascade has labels for are kept on this node, to learn from: texts that went on, were
    audited, or got feedback. [learning] says for how long."""
    fallback: Name | None = None
    """A route whose targets follow this route's own."""
    degrade: tuple[DegradeRule, ...] = ()
    quota: Share | None = None
    """Largest share of all requests over the last hour that this route takes."""
    beyond_quota: Literal["next", "refuse"] = "next"
    """What happens beyond the quota: the next route that matches is taken, or the request is refused."""

    @field_validator("residency")
    @classmethod
    def _is_residency(cls, value: str | None) -> str | None:
        return None if value is None else check_residency(value)


class PolicyDefaults(StrictModel):
    """For every route that does not say otherwise."""

    residency: str = "any"
    """For routes without a residency of their own."""
    latency_budget_seconds: PositiveSeconds = 10.0
    """Longest predicted time to the first token."""
    max_wait_seconds: PositiveSeconds = 60.0
    """Longest time in the queue, where no other target may answer."""
    total_seconds: PositiveSeconds = 600.0
    """One deadline for all attempts together."""
    max_attempts: int = Field(default=3, ge=1, le=10)
    """Most attempts of one request."""
    profiler: Profiler = "rules"
    """What makes the profile of a request (its task, its complexity): `rules`, `learned` (weights trained on open
    routing data), or `llm` (a model of this node; where it does not answer in time the rules decide)."""

    _residency = field_validator("residency")(check_residency)


class CapacityRule(StrictModel):
    """How the on-site engines are shared out."""

    reserved_for_bound: float = Field(default=0.1, ge=0, lt=1)
    """Share of an engine's sequences that is kept free for requests which may not leave the site."""


class Policy(StrictModel):
    """Routes, first match first. `version` is the hash of the file's text, so equal versions are equal policies."""

    version: str = Field(default="", exclude=True)
    defaults: PolicyDefaults = PolicyDefaults()
    residency: PersonalDataRule = PersonalDataRule()
    capacity: CapacityRule = CapacityRule()
    aliases: Mapping[str, str] = {}
    """Model names that clients send, and what they stand for here: `auto`, a target, or a model. `*` matches anything,
    as in `"claude-*" = "auto"`; the first that fits counts."""
    routes: tuple[RouteRule, ...] = Field(min_length=1)

    def resolve_alias(self, model: str) -> str:
        """What a client that asks for `model` is given: what an alias says, else that very name."""
        if model in self.aliases:
            return self.aliases[model]
        return next((to for name, to in self.aliases.items() if "*" in name and fnmatchcase(model, name)), model)

    @property
    def searches_content(self) -> bool:
        """Whether any route wants requests searched: it is done before one is chosen."""
        return any(self.content_bound(route) is not None for route in self.routes)

    def content_bound(self, route: RouteRule) -> Residency | None:
        """What personal data binds a request of `route` to; None where its content does not count."""
        wanted = route.content or self.residency.content
        return Residency.parse(self.residency.bound) if wanted == "personal_data" else None

    def route(self, name: str) -> RouteRule | None:
        return next((route for route in self.routes if route.name == name), None)
