"""The table of contents of the data plane: read this first.

A request becomes a decision (pure), a decision becomes a walk over its attempts. Overflow (the target is full),
fallback (it failed), rejection (its answer did not pass), escalation (its answer is unsure) and retry are the same loop
with another reason. Until the first byte of a stream has been handed out anything may be tried again; after it nothing.
"""

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson

from appliance.config import NodeConfig, Policy
from appliance.core import (
    Caller,
    Decision,
    HealthAlerts,
    NoAlerts,
    Request,
    ResponseMetadata,
    Route,
    Target,
    TaskCall,
)
from appliance.errors import ApplianceError, ClientGone, RejectedReply, StreamBroken, UnknownModel
from appliance.router.attempts.loop import AttemptLoop
from appliance.router.attempts.runner import AttemptRunner
from appliance.router.capacity.admission import Admission
from appliance.router.capacity.breaker import Breakers
from appliance.router.deps import (
    FeedbackSink,
    NoFeedback,
    RouterDeps,
    RuntimeStats,
    SpendLedger,
)
from appliance.router.pii.scanner import PiiDetector, PiiScanner
from appliance.router.profile import LlmProfile, check_profiler
from appliance.router.profile.llm_profiler import LlmProfiler
from appliance.router.provider_batches import PreparedLine, ProviderBatchSubmitter
from appliance.router.residency import EgressPermitIssuer
from appliance.router.routing.match import visible_targets
from appliance.router.routing.router import Router, RoutingResult
from appliance.router.token_count import TokenCount, count_with
from appliance.state import State
from appliance.telemetry import traces
from appliance.upstream.base import Transports
from appliance.wire.sse import without_end


class Pipeline:
    """One policy and configuration over the parts that outlive a reload (admission, breakers, memory, doors).

    It holds nothing that changes itself but opinions that can be asked for again, so a reload builds a new one and
    swaps the reference. Raises ConfigError where the policy's profiler cannot be used.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        config: NodeConfig,
        state: State,
        ledger: SpendLedger,
        admission: Admission,
        breakers: Breakers,
        memory: RuntimeStats,
        doors: Transports,
        permits: EgressPermitIssuer,
        detector: PiiDetector | None = None,
        alerts: HealthAlerts | None = None,
        learning: FeedbackSink | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        pause: Callable[[float], Awaitable[object]] = asyncio.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.policy = policy
        self._means = RouterDeps(
            state=state,
            ledger=ledger,
            admission=admission,
            breakers=breakers,
            memory=memory,
            doors=doors,
            permits=permits,
            alerts=alerts or NoAlerts(),
            learning=learning or NoFeedback(),
            cost=config.cost,
            cores=config.engine.threads or len(os.sched_getaffinity(0)),
            clock=clock,
            wall=wall,
            pause=pause,
            chance=chance,
        )
        check_profiler(policy.defaults.profiler)
        self._decider = Router(policy, self._means)
        self._inspector = PiiScanner(policy.residency, detector, alerts) if policy.searches_content else None
        self._asking = LlmProfiler(policy.defaults.profiler, self._means)
        self.bulk = ProviderBatchSubmitter(self._means)

    async def searched(self, request: Request) -> Request:
        """The request, its content searched for personal data where the policy wants that. `decide` wants it so."""
        return request if self._inspector is None else await self._inspector.search(request)

    def decide(self, request: Request, *, prompt_tokens: int, output_tokens: int | None) -> Decision:
        """Everything before the first call: what explain shows. No attempts means that it would be refused.

        Raises UnknownModel, Forbidden where the key may use no route for this request, BudgetExceeded where its route
        has no quota left.
        """
        decided = self._decider.decide(request, prompt_tokens, output_tokens, self._asking.known(request))
        if decided.refusal is not None and (decided.rule is None or isinstance(decided.refusal, UnknownModel)):
            raise decided.refusal
        return decided.decision

    async def answer(self, request: Request, call: TaskCall) -> "Answer":
        """Answer `request`. The caller must `aclose` what it gets. Raises ApplianceError, its `headers` set."""
        request = await self.searched(request)
        opinion = await self._asking.opinion(request)
        walk, close = self._begin(request, call.prompt_tokens, call.output_tokens, opinion)
        try:
            with traces.within(walk.span):
                trial, payload = await walk.run(call)
        except ApplianceError as error:
            close(error)
            raise
        except BaseException as error:
            close(_cut_short(error))
            raise
        if trial is None or trial.stream is None:
            return Answer(close(None), payload=payload)
        return Answer(walk.facts_so_far(trial), streaming=_Streaming(trial, walk, close))

    async def answer_many(self, request: Request, calls: Sequence[TaskCall], *, concurrency: int) -> "BatchAnswer":
        """Answer every call under one decision, at most `concurrency` at once. A call that fails fails alone.

        The strictest bound that any part of the request needs holds for all of it.

        Raises ApplianceError where the decision itself is a refusal.
        """
        prompt_tokens = max(call.prompt_tokens for call in calls)
        request = await self.searched(request)
        opinion = await self._asking.opinion(request)
        walk, close = self._begin(request, prompt_tokens, max(call.output_tokens for call in calls), opinion)
        results: list[Any] = [None] * len(calls)
        try:
            if walk.refusal is not None:
                raise walk.refusal
            with traces.within(walk.span):
                if walk.cascades(calls[0]):
                    results = await walk.cascade(calls, at_once=concurrency)
                else:
                    await _work_all(walk, calls, concurrency, results)
        except ApplianceError as error:
            close(error)
            raise
        except BaseException as error:
            close(_cut_short(error))
            raise
        errors = [result for result in results if isinstance(result, ApplianceError)]
        facts = close(errors[0] if len(errors) == len(results) else None)
        return BatchAnswer(facts, results)

    async def sealed(self, request: Request, call: TaskCall) -> PreparedLine | None:
        """The request, decided and ready to leave in a provider's batch; None where it is better asked alone.

        Raises what `decide` does.
        """
        request = await self.searched(request)
        opinion = await self._asking.opinion(request)
        decided = self._decider.decide(request, call.prompt_tokens, call.output_tokens, opinion)
        return self.bulk.prepare(request, call, decided)

    async def count(self, request: Request, call: TaskCall) -> TokenCount:
        """The tokens of the request's prompt, for the target that would be asked first. Raises what `decide` does."""
        request = await self.searched(request)
        decision = self.decide(request, prompt_tokens=call.prompt_tokens, output_tokens=1)
        targets = [attempt.target for attempt in decision.route.attempts[:1]]
        # A prompt that fits nowhere is counted all the same: that is what a caller wants to know then.
        own = [one for one in self._means.state.snapshot.targets if one.provider is None and "chat" in one.abilities]
        target = next(iter(targets or own), None)
        if target is None:
            return TokenCount(call.prompt_tokens, decision, None, "estimate")
        tokens = await count_with(self._means.doors.local, target, request.body)
        if tokens is not None:
            return TokenCount(tokens, decision, target.name, "tokenizer")
        estimate = self._means.memory.experience.tokens.correct(target.name, call.prompt_tokens)
        return TokenCount(estimate, decision, target.name, "estimate")

    def meant(self, model: str) -> str:
        """What a caller that asks for `model` is given: the policy may know it by another name."""
        return self.policy.meant(model)

    def models(self, caller: Caller) -> tuple[Target, ...]:
        """The targets that `caller` could be answered by."""
        return visible_targets(caller, self._means.state.snapshot.targets)

    def _begin(
        self, request: Request, prompt_tokens: int, output_tokens: int | None, opinion: LlmProfile | str
    ) -> tuple[AttemptLoop, "Callable[[ApplianceError | None], ResponseMetadata]"]:
        """Decide, and what is to be called once when the request has ended, however it did."""
        span = traces.begin_request(request.endpoint, request.headers)
        decided = self._decider.decide(request, prompt_tokens, output_tokens, opinion)
        self._means.memory.of_late.took(decided.decision.route.name, self._means.clock())
        self._want(decided.decision.route)
        walk = AttemptLoop(self._means, request, decided, partial(self._again, request), span)
        return walk, partial(self._close, walk)

    def _want(self, route: Route) -> None:
        """What would be answered here, were its engine up, is to be answered here from then on."""
        if route.standby and route.attempts and route.attempts[0].target.location == "hosted":
            self._means.state.want(route.standby[0].target.name)

    def _again(self, request: Request, decided: RoutingResult, prompt_tokens: int, output_tokens: int) -> RoutingResult:
        """The same decision for a request that has been cut down."""
        return self._decider.again(request, decided, prompt_tokens, output_tokens)

    def _close(self, walk: AttemptLoop, error: ApplianceError | None) -> ResponseMetadata:
        """Write the request down and give an error its facts."""
        facts = walk.facts()
        if error is not None:
            error.headers = facts.headers()
        outcome = walk.outcome(error)
        walk.remember()
        traces.end_request(walk.span, walk.decision, outcome)
        self._means.ledger.record(outcome)
        return facts


class Answer:
    """A response in the making, owned by whoever sends it, who must `aclose` it, sent or not, begun or not.

    Either `payload` (parsed JSON) or `stream` (bytes of server-sent events, ending with `[DONE]`, or with an error
    event and then without it) is set.
    """

    def __init__(self, facts: ResponseMetadata, *, payload: Any = None, streaming: "_Streaming | None" = None) -> None:
        self.status = 200
        self.facts = facts
        self.payload = payload
        self._streaming = streaming

    @property
    def stream(self) -> AsyncIterator[bytes] | None:
        return self._streaming

    async def aclose(self) -> None:
        """Give back what is still held: slot, reservation, connection. The upstream call is cancelled at once."""
        if self._streaming is not None:
            await self._streaming.aclose()


@dataclass(frozen=True, slots=True)
class BatchAnswer:
    """What came of many calls under one decision: in the calls' order, a result or the error in its place."""

    facts: ResponseMetadata
    results: list[Any]


class _Streaming:
    """A committed stream. Not a generator: one that never starts would never give anything back."""

    def __init__(
        self, trial: AttemptRunner, walk: AttemptLoop, close: Callable[[ApplianceError | None], ResponseMetadata]
    ) -> None:
        assert trial.stream is not None
        self._trial = trial
        self._walk = walk
        self._close = close
        self._stream = trial.stream
        self._is_over = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._is_over:
            raise StopAsyncIteration
        try:
            block = await self._stream.next_block()
        except StreamBroken as error:
            self._finish(error)
            return _error_event(error)
        if not block:
            self._finish(None)
            raise StopAsyncIteration
        self._trial.wrote(block.count(b"data:"))
        try:
            self._trial.check_block(block, is_last=self._stream.is_whole)
        except RejectedReply as error:
            self._finish(error)
            return without_end(block) + _error_event(error)
        return block

    async def aclose(self) -> None:
        self._finish(None if self._stream.is_whole else ClientGone("the caller left before the stream had ended"))
        await self._stream.aclose()

    def _finish(self, error: ApplianceError | None) -> None:
        """Settle and write down, once. No await in here: it must not be cut short."""
        if self._is_over:
            return
        self._is_over = True
        trial = self._trial
        if self._stream.usage is not None:
            trial.usage = self._stream.usage
        match error:
            case None:
                trial.learn()
                ended = trial.end("answered", "")
            case ClientGone():
                ended = trial.end("cancelled", error.message)
            case RejectedReply():
                ended = trial.end("rejected", error.code)
            case _:
                trial.fail_late()
                ended = trial.end("failed", error.code)
        self._walk.attempts.append(ended)
        self._close(error)


async def _work_all(walk: AttemptLoop, calls: Sequence[TaskCall], concurrency: int, results: list[Any]) -> None:
    async with asyncio.TaskGroup() as group:
        waiting = iter(enumerate(calls))
        for _ in range(max(1, min(concurrency, len(calls)))):
            group.create_task(_work(walk, waiting, results))


async def _work(walk: AttemptLoop, waiting: Iterator[tuple[int, TaskCall]], results: list[Any]) -> None:
    for index, call in waiting:
        try:
            _, results[index] = await walk.run(call)
        except ApplianceError as error:
            results[index] = error


def _error_event(error: ApplianceError) -> bytes:
    return b"data: " + orjson.dumps(error.to_openai()) + b"\n\n"


def _cut_short(error: BaseException) -> ApplianceError:
    """For the ledger: a cancelled request is one whose caller left; anything else is a mistake of ours."""
    if isinstance(error, asyncio.CancelledError):
        return ClientGone("the caller left")
    return ApplianceError(f"internal error: {type(error).__name__}")
