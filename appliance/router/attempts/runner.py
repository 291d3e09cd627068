"""One attempt of one call at one target: admitted, permitted, paid for, sent, read, and ended once, however it went."""

import asyncio
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from appliance.core import (
    Attempt,
    AttemptOutcome,
    AttemptResult,
    Decision,
    EgressPermit,
    Request,
    StreamCheck,
    TaskCall,
    UpstreamReply,
    Usage,
)
from appliance.errors import (
    ApplianceError,
    BackendError,
    BackendIncapable,
    BackendRefused,
    BackendTimeout,
    BackendUnreachable,
    Busy,
    ContextTooLong,
    RejectedReply,
    Unavailable,
)
from appliance.router.attempts.outcome import detail_of, may_have_cost, result_of
from appliance.router.attempts.verify import read_verified
from appliance.router.attempts.wire_requests import in_turn, sealed_once
from appliance.router.capacity.admission import Slot
from appliance.router.capacity.request_load import load_of
from appliance.router.cost import CostEstimate, hosted_usd, onsite_bill, onsite_usd, reserve_usd
from appliance.router.deps import AttemptTimeouts, RequestBudget, RouterDeps
from appliance.telemetry import traces
from appliance.telemetry.redaction import scrub_text
from appliance.upstream import client
from appliance.wire.dialect import WireRequest

_CALLS_AT_ONCE: Final = 8
"""One piece of work may become many calls to a hosted target; more at once only meets its rate limit sooner."""


@dataclass(frozen=True, slots=True)
class AttemptContext:
    """What all attempts of one request have in common."""

    request: Request
    decision: Decision
    purse: RequestBudget
    prefix: Hashable
    """What tells prompts that begin alike."""
    leaves_free: float = 0.0
    """Share of an engine that is kept for those who are bound."""


class AttemptRunner:
    """One attempt while it runs. `run` it once; it ends itself unless it returns an open stream: then `end` it."""

    __slots__ = (
        "_attempt",
        "_call",
        "_errand",
        "_is_counted",
        "_means",
        "_reservation",
        "_reserved_usd",
        "_sent",
        "_slot",
        "_span",
        "_started",
        "_started_at",
        "first_byte_seconds",
        "index",
        "outcome",
        "reason",
        "stream",
        "stream_check",
        "target",
        "usage",
    )

    def __init__(self, means: RouterDeps, errand: AttemptContext, index: int, attempt: Attempt) -> None:
        self._means = means
        self._errand = errand
        self._attempt = attempt
        self._call: TaskCall | None = None
        self._slot: Slot | None = None
        self._reservation: str | None = None
        self._reserved_usd = 0.0
        self._is_counted = False
        self._sent = False
        self._started = means.clock()
        self._started_at = means.wall()
        self._span = traces.begin_attempt(attempt, index)
        self.index = index
        self.target = attempt.target
        self.reason = attempt.reason
        self.stream: client.ReplyStream | None = None
        self.stream_check: StreamCheck | None = None
        """What verifies its stream at the end, where that was not asked for whole."""
        self.usage = Usage()
        self.first_byte_seconds: float | None = None
        self.outcome: AttemptOutcome | None = None

    async def run(self, call: TaskCall, patience: AttemptTimeouts) -> Any:
        """The verified payload, or None with `stream` open. Raises ApplianceError, having ended itself."""
        target, request = self.target, self._errand.request
        letters: Sequence[WireRequest] = ()
        self._call = call
        try:
            salt = client.salt_of(request.caller.key_id)
            # before anything is waited for, reserved or sent: what cannot be carried over goes elsewhere at once
            letters = [
                sealed_once(request, client.write(target, one, stream=call.streams(target), salt=salt))
                for one in in_turn(request, target, call.outgoing(target))
            ]
            await self._enter(call, patience)
            self._check_breaker()
            permit = self._permit()
            await self._reserve(call, letters)
            self._sent = True
            if call.streams(target):
                await self._open(letters[0], permit, patience)
                return None
            payload = await self._whole(call, letters, permit, patience)
        except ApplianceError as error:
            self._tell(error)
            several = self._sent and len(letters) > 1  # the others may have been answered
            self.end(result_of(error), detail_of(error), may_have_cost=several or may_have_cost(error))
            raise
        except BaseException:
            self.end("cancelled", "the caller left")
            raise
        self._means.breakers.succeed(target.name)
        if len(letters) == 1:
            self.learn()
        self.end("answered", "")
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
        bill = self.bill(may_have_cost=may_have_cost)
        cost_usd = None if bill is None else bill.usd
        if self._reservation is not None:
            means.ledger.settle(self._reservation, usd=cost_usd or 0.0)
        self._errand.purse.settle(self._reserved_usd, cost_usd)
        self.outcome = AttemptOutcome(
            index=self.index,
            target=self.target.name,
            location=self.target.location,
            reason=self.reason,
            result=result,
            detail=scrub_text(detail) if detail else "",
            started_at=self._started_at,
            first_byte_seconds=self.first_byte_seconds,
            total_seconds=means.clock() - self._started,
            usage=self.usage,
            cost_usd=cost_usd,
            reservation=self._reservation,
            cost_basis=bill.basis if bill is not None and bill.usd > 0 else None,
            energy_joules=None if bill is None else bill.joules,
            energy_basis=None if bill is None else bill.energy_basis,
            cause=self._attempt.cause,
        )
        traces.end_attempt(self._span, self.outcome)
        return self.outcome

    def wrote(self, events: int) -> None:
        """So many events of its stream have come; an event is a token, or a few."""
        if self._slot is not None:
            self._slot.wrote(events)

    def learn(self) -> None:
        """From an answer that came whole: what was expected of it, and what it was."""
        call, slot, usage, experience = self._call, self._slot, self.usage, self._means.memory.experience
        if call is None or slot is None or usage == Usage():
            return
        name, kind = self.target.name, slot.load.kind
        experience.tokens.learn(name, call.prompt_tokens, usage.prompt_tokens)
        experience.learn_cached(name, self._errand.prefix, usage.prompt_tokens, usage.cached_tokens)
        experience.learn_output(name, kind, call.output_tokens, usage.completion_tokens)
        if self.target.provider is None:
            begun, ended = slot.predicted.first_byte_seconds, slot.predicted.finish_seconds
            # by the tokens it came to, so that a wrong guess at its length is not taken for a slow engine
            ended = begun + (ended - begun) * usage.completion_tokens / max(1, slot.load.output_tokens)
            taken = self._means.clock() - slot.entered
            experience.finish_pace.learn((name, kind), ended, taken)
            if self.stream is None:
                experience.first_byte_pace.learn((name, kind), ended, taken)

    def check_block(self, block: bytes, *, is_last: bool) -> None:
        """Verify a stream that is verified late. Raises RejectedReply with its last block, where it does not pass."""
        if self.stream_check is not None:
            self.stream_check.feed(block)
            if is_last:
                self.stream_check.finish()

    def fail_late(self) -> None:
        """The stream broke after it had begun: the next request should know."""
        if self.target.provider is None:
            self._means.admission.doubt(self.target.name)
        else:
            self._means.breakers.fail(self.target.name, self._means.clock(), None)

    def bill(self, *, may_have_cost: bool) -> CostEstimate | None:
        """By what is known of the usage so far. `may_have_cost`: whether a call without a report counts as reserved."""
        if self.target.location == "hosted" and self.target.price is not None:
            if self.usage == Usage() and not (self._sent and may_have_cost):
                return CostEstimate(0.0, "price")
            return CostEstimate(
                max(hosted_usd(self.target.price, self.usage, self._reserved_usd), self._uncounted_usd()), "price"
            )
        view = self._means.state.snapshot.engines.get(self.target.name)
        return onsite_bill(self.target, view, self.usage, self._means.cost, self._means.cores)

    def _uncounted_usd(self) -> float:
        """The least that a stream counts with whose end nobody saw. What a target tells on the way is no bill:
        Anthropic begins with one token of output, and whoever leaves before the end would have the rest for nothing."""
        stream, price, call = self.stream, self.target.price, self._call
        if stream is None or stream.is_counted or price is None or call is None:
            return 0.0
        return max(self._reserved_usd, price.cost_usd(Usage(self._tokens(call), stream.tokens_seen)))

    def expected_cost_usd(self) -> float | None:
        """Before the usage is known: what was reserved, or the engine time that the call is expected to take."""
        if self._reservation is not None:
            return self._reserved_usd
        assert self._call is not None
        expected = Usage(self._tokens(self._call), self._call.output_tokens)
        view = self._means.state.snapshot.engines.get(self.target.name)
        return onsite_usd(self.target, view, expected, self._means.cost, self._means.cores)

    async def _enter(self, call: TaskCall, patience: AttemptTimeouts) -> None:
        self._slot = await self._means.admission.enter(
            self.target,
            load_of(
                self._means.memory.experience,
                self._errand.request,
                self.target.name,
                prefix=self._errand.prefix,
                prompt_tokens=call.prompt_tokens,
                output_tokens=call.output_tokens,
                leaves_free=self._errand.leaves_free,
            ),
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

    def _tokens(self, call: TaskCall) -> int:
        return self._means.memory.experience.tokens.correct(self.target.name, call.prompt_tokens)

    def _permit(self) -> EgressPermit | None:
        """On every hop anew, for the concrete endpoint."""
        if self.target.location == "onsite":
            return None
        errand = self._errand
        return self._means.permits.permit(errand.request, self.target, errand.decision.route.residency)

    async def _reserve(self, call: TaskCall, letters: Sequence[WireRequest]) -> None:
        """A call's tokens are those of all that it becomes, so one reservation holds for all of them; what the target
        may write by its letters counts where it is more than is to be expected."""
        price = self.target.price
        if self.target.location == "onsite" or price is None:
            return
        most = sum(letter.most_output_tokens or 0 for letter in letters)
        usd = reserve_usd(price, prompt_tokens=self._tokens(call), output_tokens=max(call.output_tokens, most))
        self._errand.purse.take(usd, self.target.name)
        self._reserved_usd = usd
        self._reservation = await self._means.ledger.reserve(
            decision_id=self._errand.decision.id,
            target=self.target,
            usd=usd,
            route=self._errand.decision.route.name,
            key_id=self._errand.request.caller.key_id,
        )

    async def _open(self, letter: WireRequest, permit: EgressPermit | None, patience: AttemptTimeouts) -> None:
        """Up to the first event: the commit point lies behind it."""
        target = self.target
        assert self._slot is not None
        until = self._given_up(patience.budget_seconds, self._slot.predicted.first_byte_seconds, patience)
        try:
            self.stream = await client.open_stream(
                self._means.doors.to(target),
                letter,
                permit=permit,
                seconds=self._left(patience),
                first_event_within=math.inf if until is None else max(0.0, until),
            )
        except BackendTimeout as error:
            raise self._too_slow(error, until, "begun to answer") from error
        self._first_byte()
        self._means.breakers.succeed(target.name)
        self._rest(self.stream.rest_seconds)

    def _rest(self, seconds: float | None) -> None:
        """It answered, and said that there is nothing left of what it allows: it is spared until there is."""
        if seconds:
            self._means.breakers.rest(self.target.name, self._means.clock() + seconds)

    def _left(self, patience: AttemptTimeouts) -> float:
        return patience.total_seconds - (self._means.clock() - self._started)

    def _given_up(self, budget: float | None, predicted: float, patience: AttemptTimeouts) -> float | None:
        """How long from now an engine of this node gets before another target is asked; None: as long as it takes.

        So early that whoever comes next is still in time, but never before what was predicted, and then at the end of
        the budget: what is on its way is not thrown away for something slower.
        """
        if budget is None or self.target.provider is not None:
            return None
        waited = self._means.clock() - self._started
        return max(budget - patience.elsewhere_seconds, min(budget, waited + predicted)) - waited

    def _too_slow(self, error: BackendTimeout, until: float | None, done: str) -> ApplianceError:
        """Given up for another target, which is overflow; or really timed out."""
        waited = self._means.clock() - self._started
        if until is None or waited < until:
            return error
        return Busy(f"{self.target.name} had not {done} after {waited:.1f} s", retry_after_seconds=1.0)

    async def _whole(
        self, call: TaskCall, letters: Sequence[WireRequest], permit: EgressPermit | None, patience: AttemptTimeouts
    ) -> Any:
        assert self._slot is not None
        until = self._given_up(patience.answer_seconds, self._slot.predicted.finish_seconds, patience)
        left = self._left(patience)
        try:
            replies = await self._send_all(call, letters, permit, left if until is None else min(left, until))
        except BackendTimeout as error:
            raise self._too_slow(error, until, "answered") from error
        self._first_byte()
        for reply in replies:
            self.usage += reply.usage
        self._rest(max((reply.rest_seconds or 0.0 for reply in replies), default=None))
        if any(reply.usage == Usage() for reply in replies):
            self.usage = Usage()  # a part that is not known leaves the sum unknown
        return read_verified(call, self.target, [letter.outgoing for letter in letters], replies)

    async def _send_all(
        self, call: TaskCall, letters: Sequence[WireRequest], permit: EgressPermit | None, seconds: float
    ) -> Sequence[UpstreamReply]:
        door = self._means.doors.to(self.target)

        async def send_one(one: WireRequest) -> UpstreamReply:
            patience = min(seconds, client.whole_reply_seconds(one, call.output_tokens))
            return await client.send(door, one, permit=permit, seconds=patience)

        if len(letters) == 1:
            return [await send_one(letters[0])]
        gate = asyncio.Semaphore(_CALLS_AT_ONCE)

        async def send_in_turn(one: WireRequest) -> UpstreamReply:
            async with gate:
                return await send_one(one)

        try:
            async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
                tasks = [group.create_task(send_in_turn(one)) for one in letters]
        except TimeoutError as error:
            raise BackendTimeout(f"{self.target.name} did not answer {len(letters)} calls in time") from error
        except ExceptionGroup as errors:
            raise _first_of(errors) from None
        return [task.result() for task in tasks]

    def _first_byte(self) -> None:
        self.first_byte_seconds = self._means.clock() - self._started
        slot, experience = self._slot, self._means.memory.experience
        if slot is None:
            return
        slot.first_token()
        taken = self._means.clock() - slot.entered
        if self.target.provider is not None:
            experience.learn_first_byte(self.target.name, self.stream is not None, taken)
        elif self.stream is not None:
            key = (self.target.name, slot.load.kind)
            experience.first_byte_pace.learn(key, slot.predicted.first_byte_seconds, taken)

    def _tell(self, error: ApplianceError) -> None:
        """What an error says of the target, for those who come next."""
        if not self._sent:
            return
        if self.target.provider is None:
            if isinstance(error, BackendUnreachable):
                self._means.admission.doubt(self.target.name)
        elif isinstance(error, BackendIncapable) and not error.refuses_all:
            return  # too much for it: neither a failure nor a sign that it answers
        elif isinstance(error, BackendIncapable):
            self._means.breakers.fail(self.target.name, self._means.clock(), None)
        elif isinstance(error, BackendRefused | RejectedReply | ContextTooLong):
            self._means.breakers.succeed(self.target.name)  # it answers; this request was the matter
        elif isinstance(error, BackendError):
            self._means.breakers.fail(self.target.name, self._means.clock(), error.retry_after_seconds)


def _first_of(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first
