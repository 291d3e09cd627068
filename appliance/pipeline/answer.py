"""The table of contents of the data plane: read this first.

A request becomes a decision (pure), a decision becomes a walk over its attempts. Overflow (the target is full),
fallback (it failed) and rejection (its answer did not pass) are the same loop with another reason. Until the first byte
of a stream has been handed out anything may be tried again; after it nothing may.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import orjson

from appliance.backends.base import Doors
from appliance.config import NodeConfig, Policy
from appliance.core import AttemptOutcome, Call, Caller, Decision, Facts, Outcome, Request, Snapshot, Target
from appliance.errors import (
    ApplianceError,
    Busy,
    ClientGone,
    DeadlineExceeded,
    StreamBroken,
    Unavailable,
    Unsupported,
)
from appliance.pipeline.admission import Admission, Load
from appliance.pipeline.attempt import Means, Patience, SpendLedger, Trial
from appliance.pipeline.breaker import Breakers
from appliance.pipeline.capacity import TokenRatios
from appliance.pipeline.outcome import facts_of, outcome_of, total_usd
from appliance.pipeline.policy import Outlook, rank, visible_targets
from appliance.pipeline.profile import profile
from appliance.pipeline.residency import PermitOffice
from appliance.state import State


class Pipeline:
    """One policy and configuration over the parts that outlive a reload (admission, breakers, ratios, doors).

    It holds nothing that changes itself, so a reload builds a new one and swaps the reference.
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
        ratios: TokenRatios,
        doors: Doors,
        permits: PermitOffice,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.policy = policy
        self._state = state
        self._means = Means(
            state=state,
            ledger=ledger,
            admission=admission,
            breakers=breakers,
            ratios=ratios,
            doors=doors,
            permits=permits,
            cost=config.cost,
            cores=config.engine.threads or len(os.sched_getaffinity(0)),
            clock=clock,
            wall=wall,
        )

    def decide(self, request: Request, *, prompt_tokens: int, output_tokens: int | None) -> Decision:
        """Everything before the first call: what explain shows. No attempts means that it would be refused.

        Raises UnknownModel, or Forbidden where the key may use no route for this request.
        """
        return self._decide(request, prompt_tokens, output_tokens)[0]

    async def answer(self, request: Request, call: Call) -> "Answer":
        """Answer `request`. The caller must `aclose` what it gets. Raises ApplianceError, its `headers` set."""
        decision, refusal = self._decide(request, call.prompt_tokens, call.output_tokens)
        walk = Walk(self._means, request, decision)
        try:
            if refusal is not None:
                raise refusal
            trial, payload = await walk.run(call)
        except ApplianceError as error:
            self._close(walk, error)
            raise
        except BaseException as error:
            self._close(walk, _cut_short(error))
            raise
        if trial.stream is None:
            self._close(walk, None)
            return Answer(walk.facts(), payload=payload)
        return Answer(walk.facts_so_far(trial, call), streaming=_Streaming(trial, walk, partial(self._close, walk)))

    async def answer_many(self, request: Request, calls: Sequence[Call], *, concurrency: int) -> "Many":
        """Answer every call under one decision, at most `concurrency` at once. A call that fails fails alone.

        Raises ApplianceError where the decision itself is a refusal.
        """
        prompt_tokens = max(call.prompt_tokens for call in calls)
        decision, refusal = self._decide(request, prompt_tokens, max(call.output_tokens for call in calls))
        walk = Walk(self._means, request, decision)
        results: list[Any] = [None] * len(calls)
        try:
            if refusal is not None:
                raise refusal
            async with asyncio.TaskGroup() as group:
                waiting = iter(enumerate(calls))
                for _ in range(max(1, min(concurrency, len(calls)))):
                    group.create_task(_work(walk, waiting, results))
        except ApplianceError as error:
            self._close(walk, error)
            raise
        except BaseException as error:
            self._close(walk, _cut_short(error))
            raise
        errors = [result for result in results if isinstance(result, ApplianceError)]
        facts = self._close(walk, errors[0] if len(errors) == len(results) else None)
        return Many(facts, results)

    def models(self, caller: Caller) -> tuple[Target, ...]:
        """The targets that `caller` could be answered by."""
        return visible_targets(caller, self._state.snapshot.targets)

    def _decide(
        self, request: Request, prompt_tokens: int, output_tokens: int | None
    ) -> tuple[Decision, ApplianceError | None]:
        snapshot = self._state.snapshot
        made = profile(request, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        outlooks = self._outlooks(snapshot, prompt_tokens, made.output_tokens)
        ranking = rank(request, made, self.policy, snapshot, outlooks)
        return Decision(request.decision_id, request.id, made, ranking.route), ranking.refusal

    def _outlooks(self, snapshot: Snapshot, prompt_tokens: int, output_tokens: int) -> dict[str, Outlook]:
        means, now = self._means, self._means.clock()
        outlooks = {}
        for target in snapshot.targets:
            tokens = means.ratios.correct(target.name, prompt_tokens)
            until = means.breakers.blocked_until(target.name, now)
            outlooks[target.name] = Outlook(
                means.admission.predict(target, Load(tokens, output_tokens)),
                tokens,
                means.ratios.at_least(target.name, prompt_tokens),
                None if until is None else until - now,
            )
        return outlooks

    def _close(self, walk: "Walk", error: ApplianceError | None) -> Facts:
        """Write the request down and give an error its facts. Called once for every request that got a decision."""
        facts = walk.facts()
        if error is not None:
            error.headers = facts.headers()
        self._means.ledger.record(walk.outcome(error))
        return facts


class Walk:
    """The loop over a route's attempts: one deadline and one number of attempts for the whole chain."""

    def __init__(self, means: Means, request: Request, decision: Decision) -> None:
        self._means = means
        self._request = request
        self._decision = decision
        self._ends = request.received + decision.route.total_seconds
        self.first_byte_seconds: float | None = None
        self.attempts: list[AttemptOutcome] = []
        """All that have ended, over all calls of the request."""

    async def run(self, call: Call) -> tuple[Trial, Any]:
        """The trial that answered, and its payload or open stream. Raises the last error, saying what was tried."""
        route = self._decision.route
        tried: list[tuple[Trial, ApplianceError]] = []
        attempts = route.attempts[: route.max_attempts]
        for index, attempt in enumerate(attempts):
            if tried:
                attempt = replace(attempt, reason=_next_reason(*tried[-1]))
            trial = Trial(self._means, self._request, self._decision, index, attempt)
            try:
                payload = await trial.run(call, self._patience(is_last=index == len(attempts) - 1))
            except ApplianceError as error:
                tried.append((trial, error))
                if not _goes_on(error):
                    break
            else:
                self._note_first_byte()
                return trial, payload
            finally:
                if trial.outcome is not None:
                    self.attempts.append(trial.outcome)
        raise _last_of(tried)

    def facts(self) -> Facts:
        return facts_of(self._request, self._decision, self.attempts)

    def facts_so_far(self, trial: Trial, call: Call) -> Facts:
        """For the headers of a stream, which leave before its cost is known: an estimate, and marked as one."""
        before, expected = total_usd(self.attempts), trial.expected_cost_usd(call)
        return replace(
            facts_of(self._request, self._decision, (), reason=trial.reason),
            target=trial.target.name,
            location=trial.target.location,
            cost_usd=None if before is None or expected is None else before + expected,
            cost_is_final=False,
        )

    def outcome(self, error: ApplianceError | None) -> Outcome:
        return outcome_of(
            self._request,
            self._decision,
            self.attempts,
            error=error,
            first_byte_seconds=self.first_byte_seconds,
            total_seconds=self._means.clock() - self._request.received,
        )

    def _patience(self, *, is_last: bool) -> Patience:
        """Raises DeadlineExceeded where no time is left."""
        route = self._decision.route
        now = self._means.clock()
        left = self._ends - now
        if left <= 0:
            raise DeadlineExceeded(f"no answer within the {route.total_seconds:.0f} s that route {route.name!r} allows")
        is_bound = route.residency.kind != "any"
        if is_last:
            return Patience(left, min(route.max_wait_seconds, left), None, first=is_bound or route.pinned)
        budget = max(0.0, self._request.received + route.latency_budget_seconds - now)
        return Patience(left, min(budget, left), budget, first=is_bound or route.pinned)

    def _note_first_byte(self) -> None:
        if self.first_byte_seconds is None:
            self.first_byte_seconds = self._means.clock() - self._request.received


class Answer:
    """A response in the making, owned by whoever sends it, who must `aclose` it, sent or not, begun or not.

    Either `payload` (parsed JSON) or `stream` (bytes of server-sent events, ending with `[DONE]`, or with an error
    event and then without it) is set.
    """

    def __init__(self, facts: Facts, *, payload: Any = None, streaming: "_Streaming | None" = None) -> None:
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
class Many:
    """What came of many calls under one decision: in the calls' order, a result or the error in its place."""

    facts: Facts
    results: list[Any]


class _Streaming:
    """A committed stream. Not a generator: one that never starts would never give anything back."""

    def __init__(self, trial: Trial, walk: Walk, close: Callable[[ApplianceError | None], Facts]) -> None:
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
            return b"data: " + orjson.dumps(error.to_openai()) + b"\n\n"
        if not block:
            self._finish(None)
            raise StopAsyncIteration
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
                ended = trial.end("answered", "")
            case ClientGone():
                ended = trial.end("cancelled", error.message)
            case _:
                trial.fail_late()
                ended = trial.end("failed", error.code)
        self._walk.attempts.append(ended)
        self._close(error)


async def _work(walk: Walk, waiting: Iterator[tuple[int, Call]], results: list[Any]) -> None:
    for index, call in waiting:
        try:
            _, results[index] = await walk.run(call)
        except ApplianceError as error:
            results[index] = error


def _cut_short(error: BaseException) -> ApplianceError:
    """For the ledger: a cancelled request is one whose caller left; anything else is a mistake of ours."""
    if isinstance(error, asyncio.CancelledError):
        return ClientGone("the caller left")
    return ApplianceError(f"internal error: {type(error).__name__}")


def _goes_on(error: ApplianceError) -> bool:
    """Whether another target may be asked: where this one was full, failed or cannot be asked this, never where the
    request itself is the mistake: that would fail anywhere, and sending it out would only leak it."""
    return error.fallback or isinstance(error, Busy | Unavailable | Unsupported)


def _next_reason(trial: Trial, error: ApplianceError) -> str:
    assert trial.outcome is not None
    word = {"overflowed": "overflow", "rejected": "rejected"}.get(trial.outcome.result, "fallback")
    detail = trial.outcome.detail
    return f"{word}: {detail if trial.target.name in detail else f'{trial.target.name} {detail}'}"


def _last_of(tried: Sequence[tuple[Trial, ApplianceError]]) -> ApplianceError:
    """The last error; where several targets were tried its message names them all."""
    if not tried:
        return Unavailable("no target is left for this request")
    error = tried[-1][1]
    if len(tried) > 1:
        names = "; ".join(f"{trial.target.name}: {one.code}" for trial, one in tried)
        error.message = f"{error.message} (tried {names})"
        error.args = (error.message,)
    return error
