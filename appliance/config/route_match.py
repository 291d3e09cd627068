"""Which requests a route is for: the conditions of the policy's `[routes.match]`."""

from collections.abc import Mapping

from pydantic import Field, field_validator, model_validator

from appliance.config.strict import Name, StrictModel
from appliance.core import Endpoint, Format, LatencyClass, Task

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
