"""What the policy makes of one request, before the first call."""

from dataclasses import dataclass

from appliance.core.literals import AttemptCause, Stage, Verification
from appliance.core.requests import Profile
from appliance.core.residency import Residency
from appliance.core.targets import Target


@dataclass(frozen=True, slots=True)
class Attempt:
    """One target to try, and why it stands where it stands."""

    target: Target
    reason: str
    """A sentence for people; what programs read is `cause`."""
    cause: AttemptCause = "first"


@dataclass(frozen=True, slots=True)
class ExcludedTarget:
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
    excluded: tuple[ExcludedTarget, ...]
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
    verify: Verification | None = None
    """When a streamed answer is verified; None: before its first byte only where another target could still answer."""
    escalations: tuple[Attempt, ...] = ()
    """Who is asked when an answer is unsure, in order."""
    cold_targets: tuple[Attempt, ...] = ()
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
