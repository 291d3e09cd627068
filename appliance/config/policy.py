"""The policy's own tables: routes, what they are for, where they lead, what they may cost and what happens when not."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field, field_validator, model_validator

from appliance.config.route_match import RouteMatch
from appliance.config.route_rules import (
    CascadeRule,
    ContentSearch,
    DegradeRule,
    EscalationRule,
    PersonalDataRule,
    PositiveUsd,
    PruningRule,
    Share,
    Tokens,
    Weight,
)
from appliance.config.strict import Name, PositiveSeconds, StrictModel, check_residency
from appliance.core import Profiler, Residency, Stage, Verification


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
