"""Requests that leave in a provider's own batch: decided, permitted and paid for one by one, sent together.

A request may leave so where its route's first target is hosted, takes batches, and is known to be cheaper that way. It
has a permit and a reservation of its own like any other; its answer is verified and read like that of a single call.
What was decided is kept as text (a line record), because the answer may come after a restart.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

import orjson

from appliance.core import (
    AttemptOutcome,
    AttemptResult,
    BatchApi,
    EgressPermit,
    ExcludedTarget,
    Outcome,
    Price,
    Profile,
    Request,
    Target,
    TaskCall,
    TaskResult,
    Usage,
)
from appliance.errors import ApplianceError, BackendError, BackendRefused, ResidencyRefused, Unavailable, Unsupported
from appliance.router.attempts.outcome import build_outcome, classify_error, describe_error
from appliance.router.attempts.verify import read_verified_reply
from appliance.router.cost import hosted_cost_usd, worst_case_usd
from appliance.router.deps import RouterDeps
from appliance.router.routing.router import RoutingResult
from appliance.router.routing.truncation import trim_call
from appliance.telemetry.redaction import scrub_text
from appliance.upstream import client
from appliance.upstream.batch_client import BatchClient, BatchResult
from appliance.upstream.label_scoring import tokens as token_labels
from appliance.upstream.provider_batches import APIS, BatchApiClient
from appliance.wire.dialect import WireRequest

_NOT_DONE: Final = "not answered within the batch"


@dataclass(frozen=True, slots=True)
class PreparedLine:
    """A request that is ready to leave in a batch."""

    target: Target
    endpoint: str
    """What the batch is made for; a batch has one."""
    line: bytes
    permit: EgressPermit
    usd: float
    """The most it may cost there."""
    outcome: Outcome
    """Without an attempt yet."""
    reason: str

    @property
    def size_bytes(self) -> int:
        return len(self.line)


@dataclass(frozen=True, slots=True)
class ReadLine:
    """The result of a line. Either `result`, or `error`: then it is asked again."""

    decision_id: str
    usage: Usage
    cost_usd: float
    result: TaskResult | None = None
    error: ApplianceError | None = None


@dataclass(frozen=True, slots=True)
class ProviderConnection:
    """One provider, reached on behalf of one batch: `connection.api.look(connection.client, batch_id)`."""

    api: BatchApiClient
    client: BatchClient


class ProviderBatchSubmitter:
    """The pipeline's side of providers' batches. Jobs decide what is sent, and when."""

    def __init__(self, deps: RouterDeps) -> None:
        self._deps = deps

    def _find_target(self, name: str) -> Target:
        """Raises Unavailable where it is not configured any more."""
        found = self._deps.state.snapshot.target(name)
        if found is None or found.wire.batches is None:
            raise Unavailable(f"{name} is not configured, or takes no batches", retry_after_seconds=60.0)
        return found

    def takes(self, target: Target) -> bool:
        """Whether `target` is known to be cheaper in batches, and its breaker is closed."""
        if target.location != "hosted" or target.batch_price is None or target.wire.batches is None:
            return False
        return self._deps.breakers.blocked_until(target.name, self._deps.clock()) is None

    def prepare(self, request: Request, call: TaskCall, routing: RoutingResult) -> PreparedLine | None:
        """None where this request is better asked the usual way. Nothing is reserved or sent yet."""
        route = routing.decision.route
        if routing.refusal is not None or not route.attempts or not self.takes(route.attempts[0].target):
            return None
        if route.cold_targets and request.patience_seconds:
            return None  # an engine of this node is only down for now
        attempt = route.attempts[0]
        target, trimmed = attempt.target, trim_call(call, request.body, routing.trim)
        try:
            wire_request = _write_request(request, trimmed, target)
            permit = self._deps.permits.permit(request, target, route.residency)
        except (Unsupported, ResidencyRefused):
            return None
        endpoint = None if wire_request is None else _api(target).endpoint(wire_request)
        if wire_request is None or endpoint is None:
            return None
        assert target.batch_price is not None
        tokens = self._deps.stats.estimators.tokens.correct(target.name, trimmed.prompt_tokens)
        usd = worst_case_usd(target.batch_price, prompt_tokens=tokens, output_tokens=trimmed.output_tokens)
        if route.max_cost_usd is not None and usd > route.max_cost_usd:
            return None
        outcome = build_outcome(request, routing.decision, (), error=None, first_byte_seconds=None, total_seconds=0.0)
        line = _api(target).line(wire_request, request.id)
        return PreparedLine(target, endpoint, line, permit, usd, outcome, attempt.reason)

    async def reserve(self, line: PreparedLine) -> str:
        """Reserve what it may cost; returns its record as text. Raises BudgetExceeded, LedgerUnavailable."""
        outcome = line.outcome
        reservation = await self._deps.ledger.reserve(
            decision_id=outcome.decision_id,
            target=line.target,
            usd=line.usd,
            route=outcome.route,
            key_id=outcome.key_id,
        )
        self._deps.stats.windows.record_request(outcome.route, self._deps.clock())
        assert line.target.batch_price is not None
        return _LineRecord(
            outcome, line.target.name, line.reason, line.target.batch_price, reservation, line.usd
        ).text()

    def release(self, record: str) -> None:
        """It was not answered there, and is not billed."""
        found = _LineRecord.read(record)
        self._deps.ledger.settle(found.reservation, usd=0.0)

    # The batch as a whole.

    def connect(self, target_name: str, batch_name: str) -> ProviderConnection:
        """For the batch that we call `batch_name`. Raises Unavailable, and ResidencyRefused where no transport leads
        to the target any more."""
        target = self._find_target(target_name)
        transport, permit = (
            self._deps.transports.for_batches(target),
            self._deps.permits.batch_permit(batch_name, target),
        )
        return ProviderConnection(_api(target), BatchClient(transport, target, permit))

    async def send(self, name: str, prepared: Sequence[PreparedLine], note: Callable[[str], Awaitable[None]]) -> str:
        """Send them, of one target and endpoint, as the batch `name`; returns its id there. Raises ApplianceError."""
        target, endpoint = prepared[0].target, prepared[0].endpoint
        lines = [(one.permit, one.line) for one in prepared]
        to = self.connect(target.name, name)
        try:
            batch = await to.api.send(to.client, name, endpoint, lines, note)
        except BackendError as error:
            if not isinstance(error, BackendRefused):
                self._deps.breakers.fail(target.name, self._deps.clock(), error.retry_after_seconds)
            raise
        self._deps.breakers.succeed(target.name)
        return batch

    # A line's answer.

    def read(self, request: Request, call: TaskCall, record: str, batch: str, row: BatchResult) -> ReadLine:
        """Verify and read what came back for it, settle what it cost, and write it down."""
        found = _LineRecord.read(record)
        target = self._find_target(found.target)
        usage, result, error = Usage(), None, None
        try:
            if row.status != 200:
                raise BackendError(f"{target.name}: {_NOT_DONE}")
            wire_request = _write_request(request, call, target)
            if wire_request is None:
                raise BackendError(f"{target.name} was asked otherwise than this node asks now")
            reply = client.read_batched(wire_request, row.payload)
            usage = reply.usage
            result = read_verified_reply(call, target, [wire_request.outgoing], [reply])
        except ApplianceError as problem:
            error = problem
        cost_usd = hosted_cost_usd(found.price, usage, found.usd) if row.status == 200 else 0.0
        self._deps.ledger.settle(found.reservation, usd=cost_usd)
        if row.status == 200:  # a line that was not answered costs nothing and is asked again
            self._deps.ledger.record(self._make_outcome(found, batch, usage, cost_usd, error))
        return ReadLine(found.outcome.decision_id, usage, cost_usd, result, error)

    def _make_outcome(
        self, record: "_LineRecord", batch: str, usage: Usage, cost_usd: float, error: ApplianceError | None
    ) -> Outcome:
        outcome = record.outcome
        result: AttemptResult = "answered" if error is None else classify_error(error)
        elapsed = max(0.0, self._deps.wall() - outcome.received_at)
        attempt = AttemptOutcome(
            index=0,
            target=record.target,
            location="hosted",
            reason=f"in batch {batch}: {record.reason}",
            result=result,
            detail="" if error is None else scrub_text(describe_error(error)),
            started_at=outcome.received_at,
            first_byte_seconds=None,
            total_seconds=elapsed,
            usage=usage,
            cost_usd=cost_usd,
            reservation=record.reservation,
            cost_basis="price",
            cause="provider_batch",
        )
        status, code = (200, None) if error is None else (error.status, error.code)
        return replace(outcome, attempts=(attempt,), status=status, error_code=code, total_seconds=elapsed)


@dataclass(frozen=True, slots=True)
class _LineRecord:
    """What was decided of a line when it was sent, as jobs keep it between restarts."""

    outcome: Outcome
    target: str
    reason: str
    price: Price
    reservation: str
    usd: float

    def text(self) -> str:
        return orjson.dumps(asdict(self)).decode()

    @classmethod
    def read(cls, text: str) -> "_LineRecord":
        fields = orjson.loads(text)
        said = fields["outcome"]
        profile = Profile(**{**said["profile"], "reasons": tuple(said["profile"]["reasons"])})
        excluded = tuple(ExcludedTarget(**one) for one in said["excluded"])
        outcome = Outcome(**{**said, "profile": profile, "excluded": excluded, "attempts": ()})
        return cls(**{**fields, "outcome": outcome, "price": Price(**fields["price"])})


def _write_request(request: Request, call: TaskCall, target: Target) -> WireRequest | None:
    """The request as it is written for `target`; None where it would become several calls, or a stream.

    Raises Unsupported where it cannot be written.
    """
    outgoing = call.outgoing(target)
    if len(outgoing) != 1 or call.streams(target):
        return None
    salt = client.derive_cache_salt(request.caller.key_id)
    wire_request = client.write_request(target, outgoing[0], stream=False, salt=salt)
    return None if token_labels.is_label_request(wire_request) else wire_request


def _api(target: Target) -> BatchApiClient:
    name: BatchApi | None = target.wire.batches
    assert name is not None
    return APIS[name]
