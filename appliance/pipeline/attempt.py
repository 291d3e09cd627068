"""One attempt at one target: it takes a slot, a spend reservation and a connection, and gives each of them back."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from appliance.backends import openai
from appliance.backends.base import Doors
from appliance.config import Cost
from appliance.core import (
    Attempt,
    AttemptOutcome,
    AttemptResult,
    Call,
    Decision,
    EgressPermit,
    Outcome,
    Outgoing,
    Reply,
    Request,
    Target,
    Usage,
)
from appliance.errors import (
    ApplianceError,
    BackendError,
    BackendRefused,
    BackendTimeout,
    BackendUnreachable,
    Busy,
    EngineBusy,
    LedgerUnavailable,
    RejectedReply,
    RequestError,
    ResidencyRefused,
    Unavailable,
)
from appliance.pipeline.admission import Admission, Load, Slot
from appliance.pipeline.breaker import Breakers
from appliance.pipeline.capacity import TokenRatios
from appliance.pipeline.cost import hosted_usd, onsite_usd, reserve_usd
from appliance.pipeline.residency import PermitOffice
from appliance.pipeline.verify import read_verified
from appliance.state import State

_CALLS_AT_ONCE: Final = 8
"""One piece of work may become many calls to a hosted target; more at once only meets its rate limit sooner."""


class SpendLedger(Protocol):
    """What the pipeline asks of the ledger."""

    async def reserve(self, *, decision_id: str, target: Target, usd: float) -> str: ...

    def settle(self, reservation_id: str, *, usd: float) -> None: ...

    def record(self, outcome: Outcome) -> None: ...


@dataclass(frozen=True, slots=True)
class Means:
    """What attempts work with."""

    state: State
    ledger: SpendLedger
    admission: Admission
    breakers: Breakers
    ratios: TokenRatios
    doors: Doors
    permits: PermitOffice
    cost: Cost
    cores: int
    clock: Callable[[], float]
    wall: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an attempt may take, in seconds from now."""

    total_seconds: float
    wait_seconds: float
    budget_seconds: float | None
    """None where there is nowhere else to go."""
    first: bool
    """Whether it waits before those who are not bound."""


class Trial:
    """One attempt while it runs. `run` it once; it ends itself unless it returns an open stream: then `end` it."""

    __slots__ = (
        "_is_counted",
        "_means",
        "_request",
        "_reservation",
        "_reserved_usd",
        "_sent",
        "_slot",
        "_started",
        "_started_at",
        "decision",
        "first_byte_seconds",
        "index",
        "outcome",
        "reason",
        "stream",
        "target",
        "usage",
    )

    def __init__(self, means: Means, request: Request, decision: Decision, index: int, attempt: Attempt) -> None:
        self._means = means
        self._request = request
        self._slot: Slot | None = None
        self._reservation: str | None = None
        self._reserved_usd = 0.0
        self._is_counted = False
        self._sent = False
        self._started = means.clock()
        self._started_at = means.wall()
        self.decision = decision
        self.index = index
        self.target = attempt.target
        self.reason = attempt.reason
        self.stream: openai.ReplyStream | None = None
        self.usage = Usage()
        self.first_byte_seconds: float | None = None
        self.outcome: AttemptOutcome | None = None

    async def run(self, call: Call, patience: Patience) -> Any:
        """The verified payload, or None with `stream` open. Raises ApplianceError, having ended itself."""
        target = self.target
        outgoing: Sequence[Outgoing] = ()
        try:
            outgoing = call.outgoing(target)
            await self._enter(call, patience)
            self._check_breaker()
            permit = self._permit()
            await self._reserve(call, len(outgoing))
            seconds = patience.total_seconds - (self._means.clock() - self._started)
            self._sent = True
            if call.stream:
                await self._open(outgoing[0], permit, seconds)
                return None
            payload = await self._whole(call, outgoing, permit, seconds)
        except ApplianceError as error:
            self._tell(error)
            several = self._sent and len(outgoing) > 1  # the others may have been answered
            self.end(result_of(error), detail_of(error), may_have_cost=several or _may_have_cost(error))
            raise
        except BaseException:
            self.end("cancelled", "the caller left")
            raise
        self._means.breakers.succeed(target.name)
        self.end("answered", "")
        if len(outgoing) == 1:
            self._means.ratios.learn(target.name, call.prompt_tokens, self.usage.prompt_tokens)
        return payload

    def end(self, result: AttemptResult, detail: str, *, may_have_cost: bool = True) -> AttemptOutcome:
        """Give back slot, probe and reservation, and say how it went. Only the first call counts."""
        if self.outcome is not None:
            return self.outcome
        means = self._means
        if self._slot is not None:
            self._slot.leave()
        if self._is_counted:
            means.breakers.release(self.target.name)
        cost_usd = self.cost_usd(may_have_cost=may_have_cost)
        if self._reservation is not None:
            means.ledger.settle(self._reservation, usd=cost_usd or 0.0)
        self.outcome = AttemptOutcome(
            index=self.index,
            target=self.target.name,
            location=self.target.location,
            reason=self.reason,
            result=result,
            detail=detail,
            started_at=self._started_at,
            first_byte_seconds=self.first_byte_seconds,
            total_seconds=means.clock() - self._started,
            usage=self.usage,
            cost_usd=cost_usd,
            reservation=self._reservation,
        )
        return self.outcome

    def fail_late(self) -> None:
        """The stream broke after it had begun: the next request should know."""
        if self.target.provider is None:
            self._means.admission.doubt(self.target.name)
        else:
            self._means.breakers.fail(self.target.name, self._means.clock(), None)

    def cost_usd(self, *, may_have_cost: bool) -> float | None:
        """By what is known of the usage so far. `may_have_cost`: whether a call without a report counts as reserved."""
        if self.target.location == "hosted" and self.target.price is not None:
            if self.usage == Usage() and not (self._sent and may_have_cost):
                return 0.0
            return hosted_usd(self.target.price, self.usage, self._reserved_usd)
        view = self._means.state.snapshot.engines.get(self.target.name)
        return onsite_usd(self.target, view, self.usage, self._means.cost, self._means.cores)

    def expected_cost_usd(self, call: Call) -> float | None:
        """Before the usage is known: what was reserved, or the engine time that the call is expected to take."""
        if self._reservation is not None:
            return self._reserved_usd
        expected = Usage(self._tokens(call), call.output_tokens)
        view = self._means.state.snapshot.engines.get(self.target.name)
        return onsite_usd(self.target, view, expected, self._means.cost, self._means.cores)

    async def _enter(self, call: Call, patience: Patience) -> None:
        self._slot = await self._means.admission.enter(
            self.target,
            Load(self._tokens(call), call.output_tokens),
            first=patience.first,
            wait_seconds=patience.wait_seconds,
            budget_seconds=patience.budget_seconds,
        )

    def _check_breaker(self) -> None:
        """Many may have been sent here while it was thought well, or half open: only one of them is the probe."""
        now = self._means.clock()
        until = self._means.breakers.blocked_until(self.target.name, now)
        if until is not None:
            raise Unavailable(
                f"{self.target.name} keeps failing; tried again in {until - now:.0f} s",
                retry_after_seconds=max(1.0, until - now),
            )
        self._means.breakers.start(self.target.name, now)
        self._is_counted = True

    def _tokens(self, call: Call) -> int:
        return self._means.ratios.correct(self.target.name, call.prompt_tokens)

    def _permit(self) -> EgressPermit | None:
        """On every hop anew, for the concrete endpoint."""
        if self.target.location == "onsite":
            return None
        return self._means.permits.permit(self._request, self.target, self.decision.route.residency)

    async def _reserve(self, call: Call, calls: int) -> None:
        price = self.target.price
        if self.target.location == "onsite" or price is None:
            return
        self._reserved_usd = reserve_usd(
            price, prompt_tokens=self._tokens(call) * calls, output_tokens=call.output_tokens * calls
        )
        self._reservation = await self._means.ledger.reserve(
            decision_id=self.decision.id, target=self.target, usd=self._reserved_usd
        )

    async def _open(self, outgoing: Outgoing, permit: EgressPermit | None, seconds: float) -> None:
        """Up to the first event: the commit point lies behind it."""
        target = self.target
        self.stream = await openai.open_stream(
            self._means.doors.to(target),
            target,
            outgoing,
            permit=permit,
            seconds=seconds,
            salt=openai.salt_of(self._request.caller.key_id),
        )
        self._first_byte()
        self._means.breakers.succeed(target.name)

    async def _whole(
        self, call: Call, outgoing: Sequence[Outgoing], permit: EgressPermit | None, seconds: float
    ) -> Any:
        replies = await self._send_all(call, outgoing, permit, seconds)
        self._first_byte()
        for reply in replies:
            self.usage += reply.usage
        if any(reply.usage == Usage() for reply in replies):
            self.usage = Usage()  # a part that is not known leaves the sum unknown
        return read_verified(call, self.target, outgoing, replies)

    async def _send_all(
        self, call: Call, outgoing: Sequence[Outgoing], permit: EgressPermit | None, seconds: float
    ) -> Sequence[Reply]:
        door = self._means.doors.to(self.target)
        salt = openai.salt_of(self._request.caller.key_id)
        patience = min(seconds, openai.whole_reply_seconds(self.target, call.output_tokens))
        if len(outgoing) == 1:
            return [await openai.send(door, self.target, outgoing[0], permit=permit, seconds=patience, salt=salt)]
        gate = asyncio.Semaphore(_CALLS_AT_ONCE)

        async def send_one(one: Outgoing) -> Reply:
            async with gate:
                return await openai.send(door, self.target, one, permit=permit, seconds=patience, salt=salt)

        try:
            async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
                tasks = [group.create_task(send_one(one)) for one in outgoing]
        except TimeoutError as error:
            raise BackendTimeout(f"{self.target.name} did not answer {len(outgoing)} calls in time") from error
        except ExceptionGroup as errors:
            raise _first_of(errors) from None
        return [task.result() for task in tasks]

    def _first_byte(self) -> None:
        self.first_byte_seconds = self._means.clock() - self._started
        if self._slot is not None:
            self._slot.first_token()

    def _tell(self, error: ApplianceError) -> None:
        """What an error says of the target, for those who come next."""
        if not self._sent:
            return
        if self.target.provider is None:
            if isinstance(error, BackendUnreachable):
                self._means.admission.doubt(self.target.name)
        elif isinstance(error, BackendRefused | RejectedReply):
            self._means.breakers.succeed(self.target.name)  # it answers; this request was the matter
        elif isinstance(error, BackendError):
            self._means.breakers.fail(self.target.name, self._means.clock(), error.retry_after_seconds)


def result_of(error: ApplianceError) -> AttemptResult:
    match error:
        case EngineBusy() | Busy():
            return "overflowed"
        case RejectedReply():
            return "rejected"
        case RequestError() | BackendRefused() | ResidencyRefused():
            return "refused"
        case LedgerUnavailable():
            return "failed"
        case Unavailable():
            return "overflowed"
        case _:
            return "failed"


def detail_of(error: ApplianceError) -> str:
    """For headers and the ledger: our own words only. What a target says may quote the prompt or the answer."""
    if isinstance(error, Busy | Unavailable) and not isinstance(error, EngineBusy):
        return error.message
    return f"{error.code} ({error.status})" if isinstance(error, BackendRefused) else error.code


def _first_of(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first


def _may_have_cost(error: ApplianceError) -> bool:
    return isinstance(error, BackendError) and error.may_have_cost
