"""One attempt of one call at one target: admitted, permitted, paid for, sent, read, and ended once, however it went."""

import asyncio
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

from appliance.core import (
    Attempt,
    AttemptOutcome,
    AttemptResult,
    Decision,
    EgressPermit,
    Request,
    StreamCheck,
    TaskCall,
    TaskResult,
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
from appliance.router.attempts.outcome import classify_error, describe_error, may_have_cost
from appliance.router.attempts.verify import TranslatedCheck, read_verified_reply
from appliance.router.attempts.wire_requests import add_idempotency_key, set_priority
from appliance.router.capacity.request_load import make_request_load
from appliance.router.capacity.target_queue import Slot
from appliance.router.cost import (
    CostEstimate,
    estimate_onsite_cost,
    estimate_onsite_usd,
    hosted_cost_usd,
    worst_case_usd,
)
from appliance.router.deps import RouterDeps
from appliance.router.limits import AttemptTimeouts, RequestBudget
from appliance.telemetry import traces
from appliance.telemetry.redaction import scrub_text
from appliance.upstream import client, reply_times
from appliance.wire.dialect import WireRequest

_CALLS_AT_ONCE: Final = 8
"""One call may become many requests to a hosted target; more at once only meets its rate limit sooner."""


@dataclass(frozen=True, slots=True)
class AttemptContext:
    """What all attempts of one request have in common."""

    request: Request
    decision: Decision
    budget: RequestBudget
    prefix: Hashable
    """Equal for prompts that begin alike."""
    reserved_share: float = 0.0
    """Share of an engine that is kept for residency-bound requests."""


class AttemptRunner:
    """One attempt while it runs. `run` it once; it ends itself unless it returns an open stream: then `end` it."""

    __slots__ = (
        "_attempt",
        "_breaker_started",
        "_call",
        "_context",
        "_deps",
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
        "raw",
        "reason",
        "stream",
        "stream_check",
        "target",
        "usage",
    )

    def __init__(self, deps: RouterDeps, context: AttemptContext, index: int, attempt: Attempt) -> None:
        self._deps = deps
        self._context = context
        self._attempt = attempt
        self._call: TaskCall | None = None
        self._slot: Slot | None = None
        self._reservation: str | None = None
        self._reserved_usd = 0.0
        self._breaker_started = False
        self._sent = False
        self._started = deps.clock()
        self._started_at = deps.wall()
        self._span = traces.begin_attempt(attempt, index)
        self.index = index
        self.target = attempt.target
        self.reason = attempt.reason
        self.stream: client.ReplyStream | None = None
        self.stream_check: StreamCheck | None = None
        """What verifies its stream at the end, where that was not asked for whole."""
        self.raw: bytes | None = None
        """The whole reply as it came, where it is in the caller's own dialect."""
        self.usage = Usage()
        self.first_byte_seconds: float | None = None
        self.outcome: AttemptOutcome | None = None

    async def run(self, call: TaskCall, timeouts: AttemptTimeouts) -> TaskResult | None:
        """The verified result, or None with `stream` open. Raises ApplianceError, having ended itself."""
        target, request = self.target, self._context.request
        wire_requests: Sequence[WireRequest] = ()
        self._call = call
        try:
            salt = client.derive_cache_salt(request.caller.key_id)
            # before anything is waited for, reserved or sent: what cannot be carried over goes elsewhere at once
            wire_requests = [
                add_idempotency_key(
                    request, client.write_request(target, one, stream=call.streams(target), salt=salt, may_forward=True)
                )
                for one in set_priority(request, target, call.outgoing(target))
            ]
            await self._acquire_slot(call, timeouts)
            self._check_breaker()
            permit = self._permit()
            await self._reserve(call, wire_requests)
            self._sent = True
            if call.streams(target):
                await self._open_stream(wire_requests[0], permit, timeouts)
                return None
            result = await self._request_whole(call, wire_requests, permit, timeouts)
        except ApplianceError as error:
            self._update_health(error)
            several = self._sent and len(wire_requests) > 1  # the others may have been answered
            self.end(classify_error(error), describe_error(error), may_have_cost=several or may_have_cost(error))
            raise
        except BaseException:
            self.end("cancelled", "the caller left")
            raise
        self._deps.breakers.succeed(target.name)
        if len(wire_requests) == 1:
            self.record_usage()
        self.end("answered", "")
        return result

    def end(self, result: AttemptResult, detail: str, *, may_have_cost: bool = True) -> AttemptOutcome:
        """Give back slot, probe and reservation, and set `outcome`. Only the first call counts."""
        if self.outcome is not None:
            return self.outcome
        deps = self._deps
        if self._slot is not None:
            self._slot.release()
        if self._breaker_started:
            deps.breakers.release(self.target.name)
        cost = self.estimate_cost(may_have_cost=may_have_cost)
        cost_usd = None if cost is None else cost.usd
        if self._reservation is not None:
            deps.ledger.settle(self._reservation, usd=cost_usd or 0.0)
        self._context.budget.settle(self._reserved_usd, cost_usd)
        self.outcome = AttemptOutcome(
            index=self.index,
            target=self.target.name,
            location=self.target.location,
            reason=self.reason,
            result=result,
            detail=scrub_text(detail) if detail else "",
            started_at=self._started_at,
            first_byte_seconds=self.first_byte_seconds,
            total_seconds=deps.clock() - self._started,
            usage=self.usage,
            cost_usd=cost_usd,
            reservation=self._reservation,
            cost_basis=cost.basis if cost is not None and cost.usd > 0 else None,
            energy_joules=None if cost is None else cost.joules,
            energy_basis=None if cost is None else cost.energy_basis,
            cause=self._attempt.cause,
        )
        traces.end_attempt(self._span, self.outcome)
        return self.outcome

    def count_events(self, events: int) -> None:
        """Count events of its stream that have come; an event is a token, or a few."""
        if self._slot is not None:
            self._slot.count_tokens(events)

    def record_usage(self) -> None:
        """Compare a whole answer with what was expected of it, for the estimates of later requests."""
        call, slot, usage, estimators = self._call, self._slot, self.usage, self._deps.stats.estimators
        if call is None or slot is None or usage == Usage():
            return
        name, kind = self.target.name, slot.load.kind
        estimators.tokens.learn(name, call.prompt_tokens, usage.prompt_tokens)
        estimators.learn_cached(name, self._context.prefix, usage.prompt_tokens, usage.cached_tokens)
        estimators.learn_output(name, kind, call.output_tokens, usage.completion_tokens)
        if self.target.provider is None:
            begun, ended = slot.predicted.first_byte_seconds, slot.predicted.finish_seconds
            # by the tokens it came to, so that a wrong guess at its length is not taken for a slow engine
            ended = begun + (ended - begun) * usage.completion_tokens / max(1, slot.load.output_tokens)
            elapsed = self._deps.clock() - slot.entered
            estimators.finish_correction.learn((name, kind), ended, elapsed)
            if self.stream is None:
                estimators.first_byte_correction.learn((name, kind), ended, elapsed)

    def check_block(self, block: bytes, *, is_last: bool) -> None:
        """Verify a stream that is verified late. Raises RejectedReply with its last block, where it does not pass."""
        if self.stream_check is None:
            return
        self.stream_check.feed(block)
        if is_last:
            check, self.stream_check = self.stream_check, None
            check.finish()

    def record_broken_stream(self) -> None:
        """The stream broke after it had begun: its target counts as failing."""
        if self.target.provider is None:
            self._deps.admission.mark_suspect(self.target.name)
        else:
            self._deps.breakers.fail(self.target.name, self._deps.clock(), None)

    def estimate_cost(self, *, may_have_cost: bool) -> CostEstimate | None:
        """By the usage known so far. `may_have_cost`: whether a call that reported no usage counts as reserved."""
        if self.target.location == "hosted" and self.target.price is not None:
            if self.usage == Usage() and not (self._sent and may_have_cost):
                return CostEstimate(0.0, "price")
            return CostEstimate(
                max(hosted_cost_usd(self.target.price, self.usage, self._reserved_usd), self._uncounted_usd()), "price"
            )
        view = self._deps.state.snapshot.engines.get(self.target.name)
        return estimate_onsite_cost(self.target, view, self.usage, self._deps.cost, self._deps.cores)

    def _uncounted_usd(self) -> float:
        """The least that a stream costs whose end was not seen. Usage reported on the way is not the bill: Anthropic
        begins with one token of output, and a client that leaves early would get the rest for nothing."""
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
        view = self._deps.state.snapshot.engines.get(self.target.name)
        return estimate_onsite_usd(self.target, view, expected, self._deps.cost, self._deps.cores)

    async def _acquire_slot(self, call: TaskCall, timeouts: AttemptTimeouts) -> None:
        self._slot = await self._deps.admission.enter(
            self.target,
            make_request_load(
                self._deps.stats.estimators,
                self._context.request,
                self.target.name,
                prefix=self._context.prefix,
                prompt_tokens=call.prompt_tokens,
                output_tokens=call.output_tokens,
                reserved_share=self._context.reserved_share,
            ),
            is_residency_bound=timeouts.is_residency_bound,
            wait_seconds=timeouts.wait_seconds,
            budget_seconds=timeouts.budget_seconds,
        )

    def _check_breaker(self) -> None:
        """Other requests may have come here since the decision; of a half-open breaker only one is the probe."""
        now = self._deps.clock()
        until = self._deps.breakers.blocked_until(self.target.name, now)
        if until is not None:
            raise Unavailable(
                f"{self.target.name} keeps failing; tried again in {until - now:.0f} s",
                retry_after_seconds=max(1.0, until - now),
            )
        self._deps.breakers.start(self.target.name, now)
        self._breaker_started = True

    def _tokens(self, call: TaskCall) -> int:
        return self._deps.stats.estimators.tokens.correct(self.target.name, call.prompt_tokens)

    def _permit(self) -> EgressPermit | None:
        """Issued anew for every attempt."""
        if self.target.location == "onsite":
            return None
        context = self._context
        return self._deps.permits.permit(context.request, self.target, context.decision.route.residency)

    async def _reserve(self, call: TaskCall, wire_requests: Sequence[WireRequest]) -> None:
        """One reservation for all requests that the call becomes. Where their own limits allow more output than is
        expected, the limits count."""
        price = self.target.price
        if self.target.location == "onsite" or price is None:
            return
        most = sum(wire_request.most_output_tokens or 0 for wire_request in wire_requests)
        usd = worst_case_usd(price, prompt_tokens=self._tokens(call), output_tokens=max(call.output_tokens, most))
        self._context.budget.reserve(usd, self.target.name)
        self._reserved_usd = usd
        self._reservation = await self._deps.ledger.reserve(
            decision_id=self._context.decision.id,
            target=self.target,
            usd=usd,
            route=self._context.decision.route.name,
            key_id=self._context.request.caller.key_id,
        )

    async def _open_stream(
        self, wire_request: WireRequest, permit: EgressPermit | None, timeouts: AttemptTimeouts
    ) -> None:
        """Up to the first event, which is the commit point."""
        target = self.target
        assert self._slot is not None
        until = self._seconds_before_giving_up(
            timeouts.budget_seconds, self._slot.predicted.first_byte_seconds, timeouts
        )
        try:
            self.stream = await client.open_stream(
                self._deps.transports.to(target),
                wire_request,
                permit=permit,
                seconds=self._seconds_left(timeouts),
                first_event_within=math.inf if until is None else max(0.0, until),
            )
        except BackendTimeout as error:
            raise self._timeout_error(error, until, "begun to answer") from error
        if self.stream_check is not None and wire_request.is_forwarded:
            self.stream_check = TranslatedCheck(client.translate_stream(wire_request), self.stream_check)
        self._record_first_byte()
        self._deps.breakers.succeed(target.name)
        self._record_cooldown(self.stream.rest_seconds)

    def _record_cooldown(self, seconds: float | None) -> None:
        """The target answered and reported that its rate limit is used up: it rests until that has passed."""
        if seconds:
            self._deps.breakers.rest(self.target.name, self._deps.clock() + seconds)

    def _seconds_left(self, timeouts: AttemptTimeouts) -> float:
        return timeouts.total_seconds - (self._deps.clock() - self._started)

    def _seconds_before_giving_up(
        self, budget: float | None, predicted: float, timeouts: AttemptTimeouts
    ) -> float | None:
        """How long from now an engine of this node gets before another target is asked; None: no limit.

        Early enough that the next target is still in time, but not before the predicted time, up to the budget's end:
        an answer under way is not dropped for a slower one.
        """
        if budget is None or self.target.provider is not None:
            return None
        waited = self._deps.clock() - self._started
        return max(budget - timeouts.fallback_seconds, min(budget, waited + predicted)) - waited

    def _timeout_error(self, error: BackendTimeout, until: float | None, done: str) -> ApplianceError:
        """Given up for another target, which is overflow; or really timed out."""
        waited = self._deps.clock() - self._started
        if until is None or waited < until:
            return error
        return Busy(f"{self.target.name} had not {done} after {waited:.1f} s", retry_after_seconds=1.0)

    async def _request_whole(
        self,
        call: TaskCall,
        wire_requests: Sequence[WireRequest],
        permit: EgressPermit | None,
        timeouts: AttemptTimeouts,
    ) -> TaskResult:
        assert self._slot is not None
        until = self._seconds_before_giving_up(timeouts.answer_seconds, self._slot.predicted.finish_seconds, timeouts)
        left = self._seconds_left(timeouts)
        try:
            replies = await self._send_all(call, wire_requests, permit, left if until is None else min(left, until))
        except BackendTimeout as error:
            raise self._timeout_error(error, until, "answered") from error
        self._record_first_byte()
        for reply in replies:
            self.usage += reply.usage
        self.raw = replies[0].raw if len(replies) == 1 else None
        self._record_cooldown(max((reply.rest_seconds or 0.0 for reply in replies), default=None))
        if any(reply.usage == Usage() for reply in replies):
            self.usage = Usage()  # a part that is not known leaves the sum unknown
        return read_verified_reply(
            call, self.target, [wire_request.outgoing for wire_request in wire_requests], replies
        )

    async def _send_all(
        self, call: TaskCall, wire_requests: Sequence[WireRequest], permit: EgressPermit | None, seconds: float
    ) -> Sequence[UpstreamReply]:
        transport = self._deps.transports.to(self.target)

        async def send_one(one: WireRequest) -> UpstreamReply:
            limit = min(seconds, reply_times.whole_reply_seconds(one, call.output_tokens))
            return await client.send_request(transport, one, permit=permit, seconds=limit)

        if len(wire_requests) == 1:
            return [await send_one(wire_requests[0])]
        gate = asyncio.Semaphore(_CALLS_AT_ONCE)

        async def send_gated(one: WireRequest) -> UpstreamReply:
            async with gate:
                return await send_one(one)

        try:
            async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
                tasks = [group.create_task(send_gated(one)) for one in wire_requests]
        except TimeoutError as error:
            raise BackendTimeout(f"{self.target.name} did not answer {len(wire_requests)} calls in time") from error
        except ExceptionGroup as errors:
            raise _first_of(errors) from None
        return [task.result() for task in tasks]

    def _record_first_byte(self) -> None:
        self.first_byte_seconds = self._deps.clock() - self._started
        slot, estimators = self._slot, self._deps.stats.estimators
        if slot is None:
            return
        slot.mark_first_token()
        elapsed = self._deps.clock() - slot.entered
        if self.target.provider is not None:
            estimators.learn_first_byte(self.target.name, self.stream is not None, elapsed)
        elif self.stream is not None:
            key = (self.target.name, slot.load.kind)
            estimators.first_byte_correction.learn(key, slot.predicted.first_byte_seconds, elapsed)

    def _update_health(self, error: ApplianceError) -> None:
        """Let breaker and admission know what the error says of the target."""
        if not self._sent:
            return
        if self.target.provider is None:
            if isinstance(error, BackendUnreachable):
                self._deps.admission.mark_suspect(self.target.name)
        elif isinstance(error, BackendIncapable) and not error.refuses_all:
            return  # too much for it: neither a failure nor a sign that it answers
        elif isinstance(error, BackendIncapable):
            self._deps.breakers.fail(self.target.name, self._deps.clock(), None)
        elif isinstance(error, BackendRefused | RejectedReply | ContextTooLong):
            self._deps.breakers.succeed(self.target.name)  # it answers; this request was the cause
        elif isinstance(error, BackendError):
            self._deps.breakers.fail(self.target.name, self._deps.clock(), error.retry_after_seconds)


def _first_of(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first
