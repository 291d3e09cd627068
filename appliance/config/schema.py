"""The settings themselves: every table and field of the configuration file and of the policy."""

import ipaddress
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from appliance.core import Ability, Endpoint, Format, Location, Residency, Scope, Task

PositiveSeconds = Annotated[float, Field(gt=0, le=86_400)]
Usd = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


def _check_residency(text: str) -> str:
    return str(Residency.parse(text))


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Server(Strict):
    """Where the HTTP API listens."""

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65_535)
    max_body_bytes: int = Field(default=8_000_000, gt=0)
    max_connections: int = Field(default=1024, gt=0)
    drain_seconds: PositiveSeconds = 30.0


class Engine(Strict):
    """The CPU engine. Whatever is left out is planned from what the machine has."""

    model: str = "smollm2-135m-instruct"
    """A catalogue name, or the path of a GGUF file."""
    variant: str | None = None
    threads: int | None = Field(default=None, gt=0)
    context_tokens: int | None = Field(default=None, ge=256)
    """KV cells shared by all sequences."""
    sequences: int | None = Field(default=None, ge=1, le=256)
    max_queued_requests: int = Field(default=256, ge=1)
    start_seconds: PositiveSeconds = 300.0
    stall_seconds: PositiveSeconds = 60.0
    """No token for this long while work is waiting: the engine counts as hung and is restarted."""


class Cost(Strict):
    """What local work costs. The defaults are assumptions, and reports say so until they are set."""

    usd_per_kwh: Usd | None = None
    watts_per_busy_core: Usd | None = None
    hardware_usd_per_hour: Usd = 0.0


class Ledger(Strict):
    """Where decisions and money are recorded. Empty: a SQLite file in the data directory."""

    url: str | None = None
    retention_days: int = Field(default=90, ge=1)


class Log(Strict):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"


class Network(Strict):
    """Addresses that belong to this site besides loopback and unix sockets."""

    onsite: tuple[str, ...] = ()

    @field_validator("onsite")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            ipaddress.ip_network(text)
        return value


class ProviderModel(Strict):
    """One model of a provider, with its price in US dollars per million tokens."""

    name: str = Field(min_length=1)
    abilities: tuple[Ability, ...] = ("chat", "completions", "json_schema", "logprobs", "tools")
    context_tokens: int | None = Field(default=None, gt=0)
    input_usd: Usd | None = None
    cached_input_usd: Usd | None = None
    output_usd: Usd | None = None


class Limits(Strict):
    connect_seconds: PositiveSeconds = 5.0
    first_byte_seconds: PositiveSeconds = 60.0
    between_tokens_seconds: PositiveSeconds = 30.0


class Provider(Strict):
    """A server somebody else runs, or another server of this site (`location = "onsite"`)."""

    name: Name
    dialect: Literal["openai"] = "openai"
    location: Location = "hosted"
    region: str | None = Field(default=None, pattern=r"^[A-Z]{2}(-[A-Z0-9]{1,8})?$")
    base_url: str = Field(pattern=r"^https?://\S+[^/\s]$")
    key_env: str | None = None
    key_file: str | None = None
    models: tuple[ProviderModel, ...] = Field(min_length=1)
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _is_consistent(self) -> "Provider":
        if self.name == "onsite":
            raise ValueError("a provider cannot be named 'onsite': that name means this node's own engines")
        if self.key_env and self.key_file:
            raise ValueError("key_env and key_file are both set: keep one")
        if self.location == "hosted":
            for model in self.models:
                if model.input_usd is None or model.output_usd is None:
                    raise ValueError(
                        f"model {model.name!r} has no price: set input_usd and output_usd (unknown is not free)"
                    )
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError("a model is listed twice")
        return self


class Key(Strict):
    """An API key, stored as the SHA-256 of its text: `appliance keys create` prints such a row."""

    name: Name
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: tuple[Scope, ...] = ("client",)
    residency: str = "any"
    tier: str | None = None
    routes: tuple[str, ...] | None = None

    _residency = field_validator("residency")(_check_residency)


class NodeConfig(Strict):
    """The whole configuration file."""

    data_dir: str | None = None
    policy: str | None = None
    """Path of the policy file; empty: the one that comes with the appliance."""
    server: Server = Server()
    engine: Engine = Engine()
    cost: Cost = Cost()
    ledger: Ledger = Ledger()
    log: Log = Log()
    network: Network = Network()
    providers: tuple[Provider, ...] = ()
    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> "NodeConfig":
        for kind, rows in (("provider", self.providers), ("key", self.keys)):
            names = [row.name for row in rows]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{kind} {name!r} is defined twice")
        return self


class Match(Strict):
    """Which requests a route is for. Every field given must hold; a list holds if one of its values does."""

    task: tuple[Task, ...] | None = None
    endpoint: tuple[Endpoint, ...] | None = None
    format: tuple[Format, ...] | None = None
    complexity_at_least: float | None = Field(default=None, ge=0, le=1)
    complexity_below: float | None = Field(default=None, ge=0, le=1)
    prompt_tokens_at_least: int | None = Field(default=None, ge=0)
    prompt_tokens_below: int | None = Field(default=None, ge=1)
    key: tuple[str, ...] | None = None
    tag: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _can_hold(self) -> "Match":
        if None not in (self.complexity_at_least, self.complexity_below):
            assert self.complexity_at_least is not None and self.complexity_below is not None
            if self.complexity_at_least >= self.complexity_below:
                raise ValueError("complexity_at_least is not below complexity_below: no request can match")
        if None not in (self.prompt_tokens_at_least, self.prompt_tokens_below):
            assert self.prompt_tokens_at_least is not None and self.prompt_tokens_below is not None
            if self.prompt_tokens_at_least >= self.prompt_tokens_below:
                raise ValueError("prompt_tokens_at_least is not below prompt_tokens_below: no request can match")
        return self


class RouteRule(Strict):
    """One route. What is left out comes from [defaults]."""

    name: Name
    match: Match = Match()
    targets: tuple[str, ...] = Field(min_length=1)
    """In order of preference: a target's name, `onsite` (all on-site targets) or `hosted` (all hosted ones)."""
    residency: str | None = None
    latency_budget_seconds: PositiveSeconds | None = None
    max_wait_seconds: PositiveSeconds | None = None
    total_seconds: PositiveSeconds | None = None
    max_attempts: int | None = Field(default=None, ge=1, le=10)

    @field_validator("residency")
    @classmethod
    def _is_residency(cls, value: str | None) -> str | None:
        return None if value is None else _check_residency(value)


class Defaults(Strict):
    """For every route that does not say otherwise."""

    residency: str = "any"
    latency_budget_seconds: PositiveSeconds = 10.0
    max_wait_seconds: PositiveSeconds = 60.0
    total_seconds: PositiveSeconds = 600.0
    max_attempts: int = Field(default=3, ge=1, le=10)

    _residency = field_validator("residency")(_check_residency)


class Policy(Strict):
    """Routes, first match first. `version` is the hash of the file's text, so equal versions are equal policies."""

    version: str = Field(default="", exclude=True)
    defaults: Defaults = Defaults()
    routes: tuple[RouteRule, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_consistent(self) -> "Policy":
        names = [route.name for route in self.routes]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"route {name!r} is defined twice")
        last = self.routes[-1]
        if last.match != Match():
            raise ValueError(f"the last route, {last.name!r}, has a match: end with a route for everything else")
        for route in self.routes[:-1]:
            if route.match == Match():
                raise ValueError(f"route {route.name!r} matches everything, so the routes after it can never be used")
        return self
