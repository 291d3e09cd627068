"""Work as it goes out and comes back, and a request as it ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from appliance.core.json_types import JsonObject
from appliance.core.literals import AttemptCause, AttemptResult, CostBasis, Endpoint, Location
from appliance.core.money import Usage
from appliance.core.requests import Profile
from appliance.core.routing import ExcludedTarget
from appliance.core.targets import Target


class CallerBody(NamedTuple):
    """A request's body as it came, and the endpoint whose dialect it is in."""

    endpoint: Endpoint
    body: JsonObject


@dataclass(frozen=True, slots=True)
class UpstreamCall:
    """One HTTP call to a target: path below its address, and the body. Its `model` is put in on sending."""

    path: str
    body: JsonObject
    original: CallerBody | None = None
    """What came in another dialect than OpenAI's chat, where a target that speaks it may be sent that."""


@dataclass(frozen=True, slots=True)
class UpstreamReply:
    """A whole answer from a target."""

    payload: Any
    """The parsed JSON body."""
    usage: Usage
    first_byte_seconds: float
    total_seconds: float
    rest_seconds: float | None = None
    """How long the target wants no more requests, where it said that this one took the last that it allows."""
    raw: bytes | None = None
    """The JSON body as it came, where it is in the caller's own dialect; `payload` is its translation then."""


class TaskResult(Protocol):
    """What a call came to."""

    @property
    def payload(self) -> Any:
        """The JSON that the client gets, or its part of that where a request has several calls."""

    @property
    def usage(self) -> Usage: ...

    @property
    def confidence(self) -> float | None:
        """The least confidence among the answer's parts, from 0 to 1; None where none is known."""

    @property
    def label_mass(self) -> float | None:
        """The least share of a model's distribution that fell on the labels asked for; None where not known."""


class TaskCall(Protocol):
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

    def verified_late(self) -> "LateVerifiedCall | None":
        """The same work as a stream that is verified at its end; None where no stream of it is wanted."""

    def outgoing(self, target: Target) -> Sequence[UpstreamCall]: ...

    def read(self, target: Target, replies: Sequence[UpstreamReply]) -> TaskResult: ...


class StreamCheck(Protocol):
    """Verifies one stream of a chat while it passes."""

    def feed(self, block: bytes) -> None:
        """Whole events of OpenAI's, in order."""

    def finish(self) -> None:
        """The stream is whole. Raises RejectedReply where it does not pass."""


class LateVerifiedCall(NamedTuple):
    call: TaskCall
    check: StreamCheck


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
    cause: AttemptCause = "first"
    is_unsure: bool = False
    """Its answer was below the confidence that the route wants; `result` says whether it stood."""


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
    excluded: tuple[ExcludedTarget, ...]
    status: int
    error_code: str | None
    stream: bool
    first_byte_seconds: float | None
    total_seconds: float


@dataclass(frozen=True, slots=True)
class ResponseMetadata:
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
