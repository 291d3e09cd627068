"""The loop over a route's attempts: one deadline, one number of attempts and one budget for the whole request."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from opentelemetry.trace import Span

from appliance.config import DegradeRule
from appliance.core import (
    Attempt,
    AttemptOutcome,
    AttemptResult,
    Decision,
    Outcome,
    Request,
    ResponseMetadata,
    Route,
    Target,
    TaskCall,
    TaskResult,
    Usage,
)
from appliance.errors import ApplianceError, DeadlineExceeded
from appliance.router.attempts.cascade import CascadeRunner
from appliance.router.attempts.outcome import build_outcome, make_response_metadata, sum_cost_usd
from appliance.router.attempts.retry_policy import (
    FailedAttempt,
    NextAttempt,
    RetryConditions,
    choose_cold_target,
    choose_retry,
    final_error,
    may_degrade,
    may_fall_back,
    take_next_in_order,
)
from appliance.router.attempts.runner import AttemptContext, AttemptRunner
from appliance.router.attempts.verify import find_doubt
from appliance.router.deps import RouterDeps
from appliance.router.limits import AttemptTimeouts, RequestBudget
from appliance.router.routing.router import RoutingResult
from appliance.router.routing.truncation import make_static_answer, tighten_trim, trim_call
from appliance.tasks.chat import CHAT_ENDPOINTS
from appliance.tasks.classify.cascade import split_result
from appliance.tasks.decisions.decision_results import DecisionResult
from appliance.tasks.decisions.openai_shape import DecisionsCall
from appliance.tasks.reply_result import ReplyResult

_UNKNOWN_FALLBACK_SHARE: Final = 0.25
"""Share of a budget that is kept for the next target while nothing is known of how long it takes."""

_DEGRADABLE: Final = CHAT_ENDPOINTS | {"completions"}
"""Endpoints whose requests can be made smaller."""

Redecide = Callable[[RoutingResult, int, int], RoutingResult]


class AttemptLoop:
    """One request's attempts, over all of its calls."""

    def __init__(
        self, deps: RouterDeps, request: Request, routing: RoutingResult, redecide: Redecide, span: Span
    ) -> None:
        self._deps = deps
        self._request = request
        self._routing = routing
        self._redecide = redecide
        self._ends = request.received + routing.decision.route.total_seconds
        self._budget = RequestBudget(routing.decision.route.max_cost_usd)
        self._cascade: CascadeRunner | None = None
        self.span = span
        self.first_byte_seconds: float | None = None
        self.attempts: list[AttemptOutcome] = []
        """All that have ended, over all calls of the request."""

    @property
    def decision(self) -> Decision:
        return self._routing.decision

    @property
    def refusal(self) -> ApplianceError | None:
        return self._routing.refusal

    async def run(self, call: TaskCall) -> tuple[AttemptRunner | None, TaskResult | None]:
        """The attempt that answered (None: no model did), and its result; None for an open stream.

        Raises the last error, which names what was tried.
        """
        routing = self._routing
        steps = self._degrade_steps()
        try:
            if routing.refusal is not None:
                raise routing.refusal
            if isinstance(call, DecisionsCall) and self.uses_cascade(call):
                result = await self._start_cascade(1).run((call,))
                return None, call.rendered(result)
            trimmed = trim_call(call, self._request.body, routing.trim)
            retries = all(step.step == "static" for step in steps)
            return await self._run_attempts(trimmed, routing, 0, retries=retries)
        except ApplianceError as error:
            if not steps or not may_degrade(error):
                raise
            return await self._degrade(call, steps, error)

    def uses_cascade(self, call: TaskCall) -> bool:
        """Whether the call's texts go from step to step, each as far as it needs."""
        rule = self._routing.rule
        has_steps = rule is not None and rule.cascade is not None and not self.decision.route.pinned
        return has_steps and isinstance(call, DecisionsCall)

    async def run_cascade(
        self, calls: Sequence[TaskCall], *, at_once: int
    ) -> Sequence[DecisionResult | ApplianceError]:
        """The results of calls that one was split into. All their texts go through the cascade together."""
        decisions = [call for call in calls if isinstance(call, DecisionsCall)]
        return split_result(await self._start_cascade(at_once).run(decisions), decisions)

    def _start_cascade(self, at_once: int) -> CascadeRunner:
        self._cascade = CascadeRunner(self, self._deps, self._request, self._routing, at_once)
        return self._cascade

    async def run_step(
        self, call: DecisionsCall, route: Route, attempts_used: int, *, retries: bool
    ) -> tuple[AttemptRunner, DecisionResult]:
        """Send some of a cascade's texts to the attempts that `route` has."""
        routing = replace(self._routing, decision=replace(self.decision, route=route))
        runner, result = await self._run_attempts(call, routing, attempts_used, retries=retries)
        assert isinstance(result, DecisionResult)
        return runner, result

    def response_metadata(self) -> ResponseMetadata:
        metadata = make_response_metadata(self._request, self.decision, self.attempts)
        return metadata if self._cascade is None else self._cascade.combine_metadata(metadata)

    def interim_metadata(self, runner: AttemptRunner) -> ResponseMetadata:
        """For the headers of a stream, which leave before its cost is known: an estimate, and marked as one."""
        before, expected = sum_cost_usd(self.attempts), runner.expected_cost_usd()
        return replace(
            make_response_metadata(self._request, self.decision, (), reason=runner.reason),
            target=runner.target.name,
            location=runner.target.location,
            cost_usd=None if before is None or expected is None else before + expected,
            cost_is_final=False,
        )

    def outcome(self, error: ApplianceError | None) -> Outcome:
        return build_outcome(
            self._request,
            self.decision,
            self.attempts,
            error=error,
            first_byte_seconds=self.first_byte_seconds,
            total_seconds=self._deps.clock() - self._request.received,
        )

    def record_costs(self) -> None:
        """Keep what the attempts cost, where the route limits the cost of an answer."""
        rule, now = self._routing.rule, self._deps.clock()
        if rule is None or rule.max_cost_per_success_usd is None:
            return
        for attempt in self.attempts:
            answered = attempt.result == "answered"
            windows = self._deps.stats.windows
            windows.record_cost(rule.name, attempt.target, attempt.cost_usd, answered=answered, now=now)

    async def _run_attempts(
        self, call: TaskCall, routing: RoutingResult, attempts_used: int, *, retries: bool
    ) -> tuple[AttemptRunner, TaskResult | None]:
        """Attempt after attempt. `attempts_used`: how many this call has had before."""
        route = routing.decision.route
        failures: list[FailedAttempt] = []
        while (upcoming := self._next_attempt(route, failures, attempts_used, retries=retries)) is not None:
            if upcoming.delay_seconds:
                await self._deps.sleep(upcoming.delay_seconds)
            runner = self._make_runner(routing, attempts_used + len(failures), upcoming.attempt)
            try:
                is_held = self._holds_back(route, upcoming, attempts_used + len(failures) + 1)
                sent = _streamed_or_whole(call, runner, is_held=is_held)
                timeouts = self._timeouts(route, upcoming.following, stream=sent.streams(runner.target))
                result = await runner.run(sent, timeouts)
            except ApplianceError as error:
                failures.append(FailedAttempt(runner.target, runner.outcome, error))
                if not may_fall_back(error):
                    break
                continue
            finally:
                if runner.outcome is not None:
                    self.attempts.append(runner.outcome)
            self._record_first_byte()
            return await self._escalate_if_unsure(call, routing, runner, result, attempts_used + len(failures) + 1)
        raise final_error(failures)

    def _holds_back(self, route: Route, upcoming: NextAttempt, attempts_used: int) -> bool:
        """Whether an answer is verified before its first byte leaves: where another target can still be asked, unless
        the route says otherwise."""
        if route.verify is not None:
            return route.verify == "whole"
        has_others = upcoming.following is not None or route.cold_targets or route.escalations
        return bool(self._degrade_steps()) or (bool(has_others) and attempts_used < route.max_attempts)

    def _make_runner(self, routing: RoutingResult, index: int, attempt: Attempt) -> AttemptRunner:
        context = AttemptContext(self._request, routing.decision, self._budget, routing.prefix, routing.reserved_share)
        return AttemptRunner(self._deps, context, index, attempt)

    def _next_attempt(
        self, route: Route, failures: Sequence[FailedAttempt], attempts_used: int, *, retries: bool
    ) -> NextAttempt | None:
        """The route's next attempt; after the last one a retry where that can help; then a cold target."""
        left = route.max_attempts - attempts_used
        if len(failures) >= left:
            return None
        if len(failures) < len(route.attempts):
            return take_next_in_order(route, failures, left)
        if not failures:
            return None
        retry = choose_retry(route, failures, self._retry_conditions()) if retries else None
        return retry or choose_cold_target(route, failures)

    def _retry_conditions(self) -> RetryConditions:
        deps = self._deps
        return RetryConditions(deps.clock(), self._ends, deps.draw, deps.breakers.blocked_until)

    def _timeouts(self, route: Route, following: Target | None, *, stream: bool) -> AttemptTimeouts:
        """Raises DeadlineExceeded where no time is left."""
        now = self._deps.clock()
        left = self._ends - now
        if left <= 0:
            raise DeadlineExceeded(f"no answer within the {route.total_seconds:.0f} s that route {route.name!r} allows")
        is_bound = route.residency.kind != "any" or route.pinned
        if following is None:
            return AttemptTimeouts(left, min(route.max_wait_seconds, left), None, is_bound)
        budget = max(0.0, self._request.received + route.latency_budget_seconds - now)
        answer = route.answer_budget_seconds
        known = self._deps.stats.estimators.first_byte_seconds(following.name, stream)
        fallback_seconds = budget * _UNKNOWN_FALLBACK_SHARE if known is None else min(known, budget * 0.5)
        return AttemptTimeouts(
            left,
            min(max(0.0, budget - fallback_seconds), left),
            budget,
            is_bound,
            None if answer is None else max(0.0, self._request.received + answer - now),
            fallback_seconds,
        )

    async def _escalate_if_unsure(
        self,
        call: TaskCall,
        routing: RoutingResult,
        runner: AttemptRunner,
        result: TaskResult | None,
        attempts_used: int,
    ) -> tuple[AttemptRunner, TaskResult | None]:
        """The answer, or a better target's where it is unsure, the route escalates, and the rate allows it."""
        rule, route = routing.rule.escalation if routing.rule else None, routing.decision.route
        better = [one for one in route.escalations if one.target.name != runner.target.name]
        if rule is None or result is None or not better or result.confidence is None:
            return runner, result
        if len(better) < len(route.escalations):
            return runner, result  # one of the better targets gave this answer
        windows, now = self._deps.stats.windows, self._deps.clock()
        windows.record_answers(route.name, rule, now)
        doubt = find_doubt(result, rule)
        if doubt is None:
            return runner, result
        if not windows.may_escalate(route.name, rule, now):
            text = (
                f"route {route.name!r} would escalate more than {rule.max_rate:.0%} of its answers; unsure ones stand"
            )
            self._deps.alerts.warn("escalation_capped", text, route.name)
            self.amend_outcome(
                runner, "answered", f"unsure: {doubt}; not escalated, the rate is used up", is_unsure=True
            )
            return runner, result
        windows.record_escalations(route.name, rule, now)
        if windows.is_under_rate(route.name, rule, now):
            self._deps.alerts.clear("escalation_capped", route.name)
        return await self._escalate(call, routing, runner, result, better[: route.max_attempts - attempts_used], doubt)

    async def _escalate(
        self,
        call: TaskCall,
        routing: RoutingResult,
        unsure: AttemptRunner,
        result: TaskResult,
        better: Sequence[Attempt],
        doubt: str,
    ) -> tuple[AttemptRunner, TaskResult | None]:
        """Ask the better targets in order. Where none of them answers, the unsure answer stands."""
        reason = f"escalation: {unsure.target.name} {doubt}"
        for number, attempt in enumerate(better, unsure.index + 1):
            runner = self._make_runner(routing, number, replace(attempt, reason=reason, cause="escalation"))
            try:
                timeouts = self._timeouts(routing.decision.route, None, stream=call.streams(runner.target))
                answer = await runner.run(call, timeouts)
            except ApplianceError:
                continue
            else:
                self.amend_outcome(unsure, "rejected", f"unsure: {doubt}", is_unsure=True)
                return runner, answer
            finally:
                if runner.outcome is not None:
                    self.attempts.append(runner.outcome)
        self.amend_outcome(unsure, "answered", f"unsure: {doubt}; nobody better answered", is_unsure=True)
        return unsure, result

    def amend_outcome(self, runner: AttemptRunner, result: AttemptResult, detail: str, *, is_unsure: bool) -> None:
        """Correct how an attempt ended, now that more is known of it."""
        before = runner.outcome
        assert before is not None
        runner.outcome = replace(before, result=result, detail=detail, is_unsure=is_unsure)
        self.attempts = [runner.outcome if one is before else one for one in self.attempts]

    def _degrade_steps(self) -> Sequence[DegradeRule]:
        """The degrade steps that this request's route declares and its endpoint can take."""
        rule, request = self._routing.rule, self._request
        if rule is None or request.endpoint not in _DEGRADABLE:
            return ()
        return [step for step in rule.degrade if step.step != "static" or request.format == "text"]

    async def _degrade(
        self, call: TaskCall, steps: Sequence[DegradeRule], cause: ApplianceError
    ) -> tuple[AttemptRunner | None, TaskResult | None]:
        """The declared steps in their order, until one answers. Raises `cause` where none does."""
        for step in steps:
            if step.step == "static":
                return None, self._answer_statically(step, cause)
            trim = tighten_trim(self._routing.trim, step)
            trimmed = trim_call(call, self._request.body, trim)
            routing = self._redecide(replace(self._routing, trim=trim), trimmed.prompt_tokens, trimmed.output_tokens)
            attempts_used = len(self.attempts)
            if routing.refusal is not None or attempts_used >= routing.decision.route.max_attempts:
                continue
            try:
                marked = _mark_degraded(routing, step, cause)
                return await self._run_attempts(trimmed, marked, attempts_used, retries=False)
            except ApplianceError as error:
                if not may_degrade(error):
                    raise
        raise cause

    def _answer_statically(self, step: DegradeRule, cause: ApplianceError) -> TaskResult:
        """An answer without a model, written down as an on-site attempt that cost nothing."""
        request = self._request
        self.attempts.append(
            AttemptOutcome(
                index=len(self.attempts),
                target="static",
                location="onsite",
                reason=f"degraded (static): {cause.code}",
                result="answered",
                detail="",
                started_at=self._deps.wall(),
                first_byte_seconds=0.0,
                total_seconds=0.0,
                usage=Usage(),
                cost_usd=0.0,
                cause="degraded",
            )
        )
        self._record_first_byte()
        return ReplyResult(make_static_answer(step, request.id, request.endpoint, int(request.received_at)))

    def _record_first_byte(self) -> None:
        if self.first_byte_seconds is None:
            self.first_byte_seconds = self._deps.clock() - self._request.received


def _streamed_or_whole(call: TaskCall, runner: AttemptRunner, *, is_held: bool) -> TaskCall:
    late = None if is_held or call.streams(runner.target) else call.verified_late()
    if late is None:
        return call
    runner.stream_check = late.check
    return late.call


def _mark_degraded(routing: RoutingResult, step: DegradeRule, cause: ApplianceError) -> RoutingResult:
    """Every attempt says that its request was made smaller, and why."""
    route = routing.decision.route
    attempts = tuple(
        replace(attempt, reason=f"degraded ({step.step}): {cause.code}; {attempt.reason}", cause="degraded")
        for attempt in route.attempts
    )
    return replace(routing, decision=replace(routing.decision, route=replace(route, attempts=attempts)))
