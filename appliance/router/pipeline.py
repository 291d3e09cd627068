"""The table of contents of the data plane: read this first.

A request becomes a decision (pure), and one loop runs the decision's attempts. Overflow (the target is full), fallback
(it failed), rejection (its answer did not pass), escalation (its answer is unsure) and retry are the same loop with
another cause. Until the first event of a stream anything may be tried again; after it nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson

from appliance.config import Policy
from appliance.core import (
    Caller,
    Decision,
    Request,
    ResponseMetadata,
    Route,
    Target,
    TaskCall,
    TaskResult,
)
from appliance.errors import ApplianceError, ClientGone, RejectedReply, StreamBroken, UnknownModel
from appliance.router.attempts.loop import AttemptLoop
from appliance.router.attempts.runner import AttemptRunner
from appliance.router.deps import (
    RouterDeps,
)
from appliance.router.pii.scanner import PiiDetector, PiiScanner
from appliance.router.profile import LlmProfile, check_profiler
from appliance.router.profile.llm_profiler import LlmProfiler
from appliance.router.provider_batches import PreparedLine, ProviderBatchSubmitter
from appliance.router.routing.match import list_visible_targets
from appliance.router.routing.router import Router, RoutingResult
from appliance.router.token_count import TokenCount, count_prompt_tokens
from appliance.telemetry import traces

Results = list[TaskResult | ApplianceError | None]


class Pipeline:
    """One policy over the parts that outlive a reload (`deps`).

    It holds no state of its own but cached profiles, so a reload builds a new one and swaps the reference. Raises
    ConfigError where the policy's profiler cannot be used.
    """

    def __init__(self, policy: Policy, deps: RouterDeps, detector: PiiDetector | None = None) -> None:
        self.policy = policy
        self._deps = deps
        check_profiler(policy.defaults.profiler)
        self._router = Router(policy, self._deps)
        self._pii_scanner = PiiScanner(policy.residency, detector, deps.alerts) if policy.searches_content else None
        self._profiler = LlmProfiler(policy.defaults.profiler, self._deps)
        self.provider_batches = ProviderBatchSubmitter(self._deps)

    async def with_pii_scan(self, request: Request) -> Request:
        """The request, its content searched for personal data where the policy wants that. `decide` wants it so."""
        return request if self._pii_scanner is None else await self._pii_scanner.search(request)

    def decide(self, request: Request, *, prompt_tokens: int, output_tokens: int | None) -> Decision:
        """Everything before the first call: what explain shows. No attempts means that it would be refused.

        Raises UnknownModel, Forbidden where the key may use no route for this request, BudgetExceeded where its route
        has no quota left.
        """
        routing = self._router.decide(request, prompt_tokens, output_tokens, self._profiler.known(request))
        if routing.refusal is not None and (routing.rule is None or isinstance(routing.refusal, UnknownModel)):
            raise routing.refusal
        return routing.decision

    async def answer(self, request: Request, call: TaskCall) -> "Answer":
        """Answer `request`. The caller must `aclose` what it gets. Raises ApplianceError, its `headers` set."""
        request = await self.with_pii_scan(request)
        llm_profile = await self._profiler.llm_profile(request)
        loop, close = self._start(request, call.prompt_tokens, call.output_tokens, llm_profile)
        try:
            with traces.use_request_span(loop.span):
                runner, result = await loop.run(call)
        except ApplianceError as error:
            close(error)
            raise
        except BaseException as error:
            close(_as_internal_error(error))
            raise
        if runner is None or runner.stream is None:
            return Answer(close(None), result, raw=None if runner is None else runner.raw)
        return Answer(loop.interim_metadata(runner), streaming=_Streaming(runner, loop, close))

    async def answer_many(self, request: Request, calls: Sequence[TaskCall], *, concurrency: int) -> "BatchAnswer":
        """Answer every call under one decision, at most `concurrency` at once. A call that fails fails alone.

        The strictest bound that any part of the request needs holds for all of it.

        Raises ApplianceError where the decision itself is a refusal.
        """
        prompt_tokens = max(call.prompt_tokens for call in calls)
        request = await self.with_pii_scan(request)
        llm_profile = await self._profiler.llm_profile(request)
        loop, close = self._start(request, prompt_tokens, max(call.output_tokens for call in calls), llm_profile)
        results: Results = [None] * len(calls)
        try:
            if loop.refusal is not None:
                raise loop.refusal
            with traces.use_request_span(loop.span):
                if loop.uses_cascade(calls[0]):
                    results = list(await loop.run_cascade(calls, at_once=concurrency))
                else:
                    await _run_all(loop, calls, concurrency, results)
        except ApplianceError as error:
            close(error)
            raise
        except BaseException as error:
            close(_as_internal_error(error))
            raise
        errors = [result for result in results if isinstance(result, ApplianceError)]
        metadata = close(errors[0] if len(errors) == len(results) else None)
        return BatchAnswer(metadata, results)

    async def prepare_batch_line(self, request: Request, call: TaskCall) -> PreparedLine | None:
        """The request, decided and ready to leave in a provider's batch; None where it is better asked alone.

        Raises what `decide` does.
        """
        request = await self.with_pii_scan(request)
        llm_profile = await self._profiler.llm_profile(request)
        routing = self._router.decide(request, call.prompt_tokens, call.output_tokens, llm_profile)
        return self.provider_batches.prepare(request, call, routing)

    async def count_tokens(self, request: Request, call: TaskCall) -> TokenCount:
        """The tokens of the request's prompt, for the target that would be asked first. Raises what `decide` does."""
        request = await self.with_pii_scan(request)
        decision = self.decide(request, prompt_tokens=call.prompt_tokens, output_tokens=1)
        targets = [attempt.target for attempt in decision.route.attempts[:1]]
        # A prompt that fits nowhere is counted all the same: that is what a caller wants to know then.
        own = [one for one in self._deps.state.snapshot.targets if one.provider is None and "chat" in one.abilities]
        target = next(iter(targets or own), None)
        if target is None:
            return TokenCount(call.prompt_tokens, decision, None, "estimate")
        tokens = await count_prompt_tokens(self._deps.transports.local, target, request.body)
        if tokens is not None:
            return TokenCount(tokens, decision, target.name, "tokenizer")
        estimate = self._deps.stats.estimators.tokens.correct(target.name, call.prompt_tokens)
        return TokenCount(estimate, decision, target.name, "estimate")

    def resolve_alias(self, model: str) -> str:
        """What a caller that asks for `model` is given: the policy may know it by another name."""
        return self.policy.resolve_alias(model)

    def list_models(self, caller: Caller) -> tuple[Target, ...]:
        """The targets that `caller` could be answered by."""
        return list_visible_targets(caller, self._deps.state.snapshot.targets)

    def _start(
        self, request: Request, prompt_tokens: int, output_tokens: int | None, llm_profile: LlmProfile | str
    ) -> tuple[AttemptLoop, "Callable[[ApplianceError | None], ResponseMetadata]"]:
        """Decide, and what is to be called once when the request has ended, however it did."""
        span = traces.begin_request(request.endpoint, request.headers)
        routing = self._router.decide(request, prompt_tokens, output_tokens, llm_profile)
        self._deps.stats.windows.record_request(routing.decision.route.name, self._deps.clock())
        self._want_engine(routing.decision.route)
        loop = AttemptLoop(self._deps, request, routing, partial(self._redecide, request), span)
        return loop, partial(self._close, loop)

    def _want_engine(self, route: Route) -> None:
        """What would be answered here, were its engine up, is to be answered here from then on."""
        if route.cold_targets and route.attempts and route.attempts[0].target.location == "hosted":
            self._deps.state.want(route.cold_targets[0].target.name)

    def _redecide(
        self, request: Request, routing: RoutingResult, prompt_tokens: int, output_tokens: int
    ) -> RoutingResult:
        """The same decision for a request that has been cut down."""
        return self._router.redecide(request, routing, prompt_tokens, output_tokens)

    def _close(self, loop: AttemptLoop, error: ApplianceError | None) -> ResponseMetadata:
        """Write the request down and give an error its facts."""
        metadata = loop.response_metadata()
        if error is not None:
            error.headers = metadata.headers()
        outcome = loop.outcome(error)
        loop.record_costs()
        traces.end_request(loop.span, loop.decision, outcome)
        self._deps.ledger.record(outcome)
        return metadata


class Answer:
    """A response in the making, owned by whoever sends it, who must `aclose` it, sent or not, begun or not.

    Either `result` or `stream` (bytes of server-sent events, ending with `[DONE]`, or with an error
    event and then without it) is set.
    """

    def __init__(
        self,
        metadata: ResponseMetadata,
        result: TaskResult | None = None,
        *,
        raw: bytes | None = None,
        streaming: "_Streaming | None" = None,
    ) -> None:
        self.status = 200
        self.metadata = metadata
        self.result = result
        self.raw = raw
        """The whole reply as the target sent it, where that is in the caller's own dialect."""
        self._streaming = streaming

    @property
    def payload(self) -> Any:
        """The response's JSON; None for a stream."""
        return None if self.result is None else self.result.payload

    @property
    def stream(self) -> AsyncIterator[bytes] | None:
        return self._streaming

    @property
    def is_forwarded(self) -> bool:
        """Whether the stream is in the caller's own dialect, as it comes. What goes wrong in it is raised then."""
        return self._streaming is not None and self._streaming.is_forwarded

    async def aclose(self) -> None:
        """Give back what is still held: slot, reservation, connection. The upstream call is cancelled at once."""
        if self._streaming is not None:
            await self._streaming.aclose()


@dataclass(frozen=True, slots=True)
class BatchAnswer:
    """What came of many calls under one decision: in the calls' order, a result or the error in its place."""

    metadata: ResponseMetadata
    results: Sequence[Any]


class _Streaming:
    """A committed stream. Not a generator: one that never starts would never give anything back."""

    def __init__(
        self, runner: AttemptRunner, loop: AttemptLoop, close: Callable[[ApplianceError | None], ResponseMetadata]
    ) -> None:
        assert runner.stream is not None
        self._runner = runner
        self._loop = loop
        self._close = close
        self._stream = runner.stream
        self.is_forwarded = runner.stream.is_forwarded
        self._is_over = False
        self._late_error: ApplianceError | None = None
        """Raised after the last block that could still be passed on."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._is_over:
            self._raise_late_error()
            raise StopAsyncIteration
        try:
            block = await self._stream.next_block()
        except StreamBroken as error:
            return self._fail(error, b"")
        try:
            self._runner.check_block(block, is_last=not block or self._stream.is_whole)
        except RejectedReply as error:
            return self._fail(error, self._stream.without_ending(block))
        if not block:
            self._finish(None)
            raise StopAsyncIteration
        self._runner.count_events(block.count(b"data:"))
        return block

    def _fail(self, error: ApplianceError, last: bytes) -> bytes:
        """What is still passed on, and how it ends. A dialect's own error event is written by who knows the dialect."""
        self._finish(error)
        if not self.is_forwarded:
            return last + _error_event(error)
        self._late_error = error
        if not last:
            self._raise_late_error()
        return last

    def _raise_late_error(self) -> None:
        error, self._late_error = self._late_error, None
        if error is not None:
            raise error

    async def aclose(self) -> None:
        self._finish(None if self._stream.is_whole else ClientGone("the caller left before the stream had ended"))
        await self._stream.aclose()

    def _finish(self, error: ApplianceError | None) -> None:
        """Settle and write down, once. No await in here: it must not be cut short."""
        if self._is_over:
            return
        self._is_over = True
        runner = self._runner
        if self._stream.usage is not None:
            runner.usage = self._stream.usage
        match error:
            case None:
                runner.record_usage()
                ended = runner.end("answered", "")
            case ClientGone():
                ended = runner.end("cancelled", error.message)
            case RejectedReply():
                ended = runner.end("rejected", error.code)
            case _:
                runner.record_broken_stream()
                ended = runner.end("failed", error.code)
        self._loop.attempts.append(ended)
        self._close(error)


async def _run_all(loop: AttemptLoop, calls: Sequence[TaskCall], concurrency: int, results: Results) -> None:
    async with asyncio.TaskGroup() as group:
        waiting = iter(enumerate(calls))
        for _ in range(max(1, min(concurrency, len(calls)))):
            group.create_task(_run_calls(loop, waiting, results))


async def _run_calls(loop: AttemptLoop, waiting: Iterator[tuple[int, TaskCall]], results: Results) -> None:
    for index, call in waiting:
        try:
            _, results[index] = await loop.run(call)
        except ApplianceError as error:
            results[index] = error


def _error_event(error: ApplianceError) -> bytes:
    return b"data: " + orjson.dumps(error.to_openai()) + b"\n\n"


def _as_internal_error(error: BaseException) -> ApplianceError:
    """For the ledger: a cancelled request is one whose caller left; anything else is a mistake of ours."""
    if isinstance(error, asyncio.CancelledError):
        return ClientGone("the caller left")
    return ApplianceError(f"internal error: {type(error).__name__}")
