"""A request: who asks, what was made of it before anything was decided, and what it looks like."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from appliance.core.json_types import JsonObject
from appliance.core.literals import Ability, Endpoint, Format, LatencyClass, PersonalKind, Scope, Task
from appliance.core.residency import ANYWHERE, Residency


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
class ParsedRequest:
    """What a task's reader made of a body, before anybody looked at headers or keys."""

    endpoint: Endpoint
    model: str
    body: JsonObject
    text: str
    stream: bool = False
    format: Format = "text"
    needs: frozenset[Ability] = frozenset()
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class PiiScanResult:
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
    body: JsonObject
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
    content: PiiScanResult | None = None
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
