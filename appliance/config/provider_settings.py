"""Settings of providers: where they are, which models they have, what those can do and cost."""

import ipaddress
import re

from pydantic import Field, field_validator, model_validator

from appliance.config.providers import (
    KEY_HEADERS,
    KINDS,
    ProviderKind,
    check_abilities,
    check_address,
    check_batches,
    find_provider_kind,
)
from appliance.config.strict import Name, PositiveSeconds, Quality, StrictModel, Usd
from appliance.core import Ability, Api, Dialect, Location, Thinking


class NetworkSettings(StrictModel):
    """Addresses that belong to this site besides loopback and unix sockets."""

    onsite: tuple[str, ...] = ()
    """Networks in CIDR form. On-site servers must have an address in one of them."""

    @field_validator("onsite")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            ipaddress.ip_network(text)
        return value


class ProviderModel(StrictModel):
    """One model of a provider, with its price in US dollars per million tokens."""

    name: str = Field(min_length=1)
    """The provider's name for it; the target is `PROVIDER/NAME`."""
    abilities: tuple[Ability, ...] | None = None
    """What it can do; requests that need more are not sent to it. Empty: the usual abilities of its kind: `chat`,
    `json_schema` and `tools`, and mostly `completions` and `logprobs`; never `vision` or `reasoning`."""
    context_tokens: int | None = Field(default=None, gt=0)
    """Longer prompts are not sent to it; empty: not known, not checked."""
    input_usd: Usd | None = None
    """US dollars per million prompt tokens. Required where hosted: unknown is not free."""
    cached_input_usd: Usd | None = None
    """US dollars per million cached prompt tokens; empty: as `input_usd`."""
    output_usd: Usd | None = None
    """US dollars per million completion tokens. Required where hosted."""
    cache_write_usd: Usd | None = None
    """US dollars per million prompt tokens that the provider writes to its cache; empty: the kind's usual multiple of
    `input_usd`."""
    batch_discount: float | None = Field(default=None, gt=0, lt=1)
    """How much cheaper requests are in the provider's own batches, as a share (0.5: half the price). Empty: unknown,
    so jobs never use them."""
    api: Api = "chat"
    """`responses` for a model that speaks only OpenAI's Responses API."""
    thinking: Thinking = "effort"
    """How the amount of thinking is sent: as an `effort`, or as a `budget` of tokens (Claude before 4.6, Gemini
    2.5)."""
    max_output_tokens: int | None = Field(default=None, gt=0)
    """The longest answer. Anthropic and Gemini get it as the limit where the request has none (empty: 8,192 to
    Anthropic, which needs one). It is reserved from budgets for every call without a limit."""
    leaves_out: tuple[str, ...] = ()
    """Fields that this model does not take and that are left out of requests, for example `temperature`."""
    refuses: tuple[str, ...] = ()
    """Fields that this model does not take; requests that have one are not sent to it."""
    quality: Quality | None = None
    """How good its answers are, from 0 to 1 on your own scale, for the quality floors and scores of routes."""


class ProviderLimits(StrictModel):
    connect_seconds: PositiveSeconds = 5.0
    """Longest time to connect."""
    first_byte_seconds: PositiveSeconds = 60.0
    """Longest time from sending to the first byte."""
    between_tokens_seconds: PositiveSeconds = 30.0
    """The longest silence inside a stream."""


class Provider(StrictModel):
    """A server somebody else runs, or another server of this site (`location = "onsite"`)."""

    name: Name
    """Its name, and the first part of its targets' names."""
    kind: ProviderKind | None = None
    """Which provider's differences apply; empty: the one that its address belongs to, else `compatible`."""
    dialect: Dialect | None = None
    """The wire format it speaks; empty: its kind's."""
    location: Location = "hosted"
    """`onsite` for a server of your own; its address must then lie on-site."""
    region: str | None = Field(default=None, pattern=r"^[A-Z]{2}(-[A-Z0-9]{1,8})?$")
    """Region in which it computes, for example `EU`. Without one it gets no region-bound request."""
    base_url: str | None = Field(default=None, pattern=r"^https?://\S+[^/\s]$")
    """Up to and including the version, for example `https://host/v1`. Empty: its kind's own, where that is known."""
    api_version: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    """Azure: the `api-version` of its address. Anthropic: the `anthropic-version`; empty: 2026-10-21, which takes no
    `temperature`, `top_p` or `top_k`; `2023-06-01` does."""
    headers: dict[str, str] = Field(default={})
    """Headers to send with every call, for example an organisation's id. Never a key: that belongs in key_env."""
    key_env: str | None = None
    """Environment variable that holds its API key."""
    key_file: str | None = None
    """File that holds its API key, instead of a variable."""
    models: tuple[ProviderModel, ...] = Field(min_length=1)
    limits: ProviderLimits = ProviderLimits()
    daily_usd: Usd | None = None
    """What this provider may cost in one UTC day; empty: no limit."""

    @field_validator("headers")
    @classmethod
    def _are_no_keys(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if name.lower() in KEY_HEADERS:
                raise ValueError(f"{name} is where the key goes: set key_env or key_file")
            if not re.fullmatch(r"[A-Za-z0-9-]+", name) or not re.fullmatch(r"[\x20-\x7e]*", text):
                raise ValueError(f"{name!r} is no header of plain text")
        return value

    @property
    def is_kind(self) -> ProviderKind:
        """Its kind, as said or as found by its address."""
        return find_provider_kind(self.kind, self.dialect, self.base_url or "")

    @property
    def address(self) -> str:
        """Its base URL, as said or its kind's own."""
        return self.base_url or KINDS[self.is_kind].base_url or ""

    @model_validator(mode="after")
    def _speaks_to_a_sound_address(self) -> "Provider":
        if not self.address:
            raise ValueError("base_url is missing: up to and including the version, for example https://host/v1")
        check_address(self.is_kind, self.address, self.api_version)
        for model in self.models:
            check_abilities(self.is_kind, model.name, model.abilities or ())
            check_batches(self.is_kind, model.name, model.batch_discount)
        return self

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
