"""The loop over a route's attempts: one deadline, one number of attempts and one purse for the whole request."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

from opentelemetry.trace import Span

from appliance.config import DegradeRule
from appliance.core import (
    Attempt,
    AttemptCause,
    AttemptOutcome,
    AttemptResult,
    Decision,
    Outcome,
    Request,
    ResponseMetadata,
    Route,
    Target,
    TaskCall,
    Usage,
)
from appliance.errors import (
    ApplianceError,
    BackendAuth,
    BackendError,
    BackendIncapable,
    Busy,
    ContextTooLong,
    DeadlineExceeded,
    EngineBusy,
    RejectedReply,
    Unavailable,
    Unsupported,
)
from appliance.router.attempts.cascade import CascadeRunner
from appliance.router.attempts.escalation import confidence_of, doubt
from appliance.router.attempts.outcome import facts_of, outcome_of, total_usd
from appliance.router.attempts.runner import AttemptContext, AttemptRunner
from appliance.router.deps import AttemptTimeouts, RequestBudget, RouterDeps
from appliance.router.routing.router import RoutingResult
from appliance.router.routing.truncation import shape_of_step, shaped, static_answer
from appliance.tasks.chat import CHAT_ENDPOINTS
from appliance.tasks.classify.cascade import cut
from appliance.tasks.decisions.openai_shape import DecisionsCall

_FIRST_PAUSE_SECONDS: Final = 0.1
_LONGEST_PAUSE_SECONDS: Final = 2.0
"""Before the same target is asked again; doubled each time, and spread so that many do not come back together."""

_UNKNOWN_ELSEWHERE: Final = 0.25
"""Share of a budget that is kept for the next target while nobody knows how long it takes."""

_STEPPING: Final = CHAT_ENDPOINTS | {"completions"}
"""Endpoints whose requests can be made smaller."""

_CAUSES: Final[Mapping[AttemptResult, AttemptCause]] = {"overflowed": "overflow", "rejected": "rejected"}

Again = Callable[[RoutingResult, int, int], RoutingResult]


class NextAttempt(NamedTuple):
    attempt: Attempt
    pause_seconds: float
    following: Target | None
    """Who could be asked after it."""


class AttemptLoop:
    """One request's attempts, over all of its calls."""

    def __init__(self, means: RouterDeps, request: Request, decided: RoutingResult, again: Again, span: Span) -> None:
        self._means = means
        self._request = request
        self._decided = decided
        self._again = again
        self._ends = request.received + decided.decision.route.total_seconds
        self._purse = RequestBudget(decided.decision.route.max_cost_usd)
        self.span = span
        self.first_byte_seconds: float | None = None
        self._steps_taken: CascadeRunner | None = None
        self.attempts: list[AttemptOutcome] = []
        """All that have ended, over all calls of the request."""

    @property
    def decision(self) -> Decision:
        return self._decided.decision

    @property
    def refusal(self) -> ApplianceError | None:
        return self._decided.refusal

    async def run(self, call: TaskCall) -> tuple[AttemptRunner | None, Any]:
        """The trial that answered (None: no model did), and its payload or open stream.

        Raises the last error, saying what was tried.
        """
        decided = self._decided
        steps = self._steps()
        try:
            if decided.refusal is not None:
                raise decided.refusal
            if isinstance(call, DecisionsCall) and self.cascades(call):
                judgement = await self._steps_of(1).run((call,))
                return None, judgement if call.render is None else call.render(judgement, call.questions)
            whole = shaped(call, self._request.body, decided.shape)
            return await self._go(whole, decided, 0, retries=all(step.step == "static" for step in steps))
        except ApplianceError as error:
            if not steps or not _may_step_down(error):
                raise
            return await self._step_down(call, steps, error)

    def cascades(self, call: TaskCall) -> bool:
        """Whether its texts go from step to step, each as far as it needs."""
        rule = self._decided.rule
        has_steps = rule is not None and rule.cascade is not None and not self.decision.route.pinned
        return has_steps and isinstance(call, DecisionsCall)

    async def cascade(self, calls: Sequence[Any], *, at_once: int) -> list[Any]:
        """The results of calls that one was cut into. All their texts go through the cascade together."""
        return cut(await self._steps_of(at_once).run(calls), calls)

    def _steps_of(self, at_once: int) -> CascadeRunner:
        self._steps_taken = CascadeRunner(self, self._means, self._request, self._decided, at_once)
        return self._steps_taken

    async def ask(self, call: TaskCall, route: Route, made: int, *, retries: bool) -> tuple[AttemptRunner, Any]:
        """Some of a cascade's texts, put to the attempts that `route` has."""
        decided = replace(self._decided, decision=replace(self.decision, route=route))
        return await self._go(call, decided, made, retries=retries)

    def facts(self) -> ResponseMetadata:
        facts = facts_of(self._request, self.decision, self.attempts)
        return facts if self._steps_taken is None else self._steps_taken.told(facts)

    def facts_so_far(self, trial: AttemptRunner) -> ResponseMetadata:
        """For the headers of a stream, which leave before its cost is known: an estimate, and marked as one."""
        before, expected = total_usd(self.attempts), trial.expected_cost_usd()
        return replace(
            facts_of(self._request, self.decision, (), reason=trial.reason),
            target=trial.target.name,
            location=trial.target.location,
            cost_usd=None if before is None or expected is None else before + expected,
            cost_is_final=False,
        )

    def outcome(self, error: ApplianceError | None) -> Outcome:
        return outcome_of(
            self._request,
            self.decision,
            self.attempts,
            error=error,
            first_byte_seconds=self.first_byte_seconds,
            total_seconds=self._means.clock() - self._request.received,
        )

    def remember(self) -> None:
        """What its attempts cost, for the requests after it."""
        rule, now = self._decided.rule, self._means.clock()
        if rule is None or rule.max_cost_per_success_usd is None:
            return
        for attempt in self.attempts:
            answered = attempt.result == "answered"
            self._means.memory.of_late.spent(rule.name, attempt.target, attempt.cost_usd, answered=answered, now=now)

    async def _go(
        self, call: TaskCall, decided: RoutingResult, made: int, *, retries: bool
    ) -> tuple[AttemptRunner, Any]:
        """Attempt after attempt. `made`: how many this call has had before."""
        route = decided.decision.route
        tried: list[tuple[AttemptRunner, ApplianceError]] = []
        while (turn := self._turn(route, tried, made, retries=retries)) is not None:
            if turn.pause_seconds:
                await self._means.pause(turn.pause_seconds)
            trial = self._trial(decided, made + len(tried), turn.attempt)
            try:
                sent = self._streamed_or_whole(call, trial, self._holds_back(route, turn, made + len(tried) + 1))
                patience = self._patience(route, turn.following, stream=sent.streams(trial.target))
                payload = await trial.run(sent, patience)
            except ApplianceError as error:
                tried.append((trial, error))
                if not goes_on(error):
                    break
                continue
            finally:
                if trial.outcome is not None:
                    self.attempts.append(trial.outcome)
            self._note_first_byte()
            return await self._or_better(call, decided, trial, payload, made + len(tried) + 1)
        raise _last_of(tried)

    def _holds_back(self, route: Route, turn: NextAttempt, made: int) -> bool:
        """Whether what must be verified is verified before its first byte leaves: where another target can still be
        asked, unless the route says otherwise."""
        if route.verify is not None:
            return route.verify == "whole"
        has_others = turn.following is not None or route.standby or route.escalations
        return bool(self._steps()) or (bool(has_others) and made < route.max_attempts)

    @staticmethod
    def _streamed_or_whole(call: TaskCall, trial: AttemptRunner, holds_back: bool) -> TaskCall:
        late = None if holds_back or call.streams(trial.target) else call.verified_late()
        if late is None:
            return call
        trial.stream_check = late.check
        return late.call

    def _trial(self, decided: RoutingResult, index: int, attempt: Attempt) -> AttemptRunner:
        errand = AttemptContext(self._request, decided.decision, self._purse, decided.prefix, decided.leaves_free)
        return AttemptRunner(self._means, errand, index, attempt)

    def _turn(
        self, route: Route, tried: Sequence[tuple[AttemptRunner, ApplianceError]], made: int, *, retries: bool
    ) -> NextAttempt | None:
        """The route's next attempt; after the last one the same target again, where that can help; then who
        stands by."""
        left = route.max_attempts - made
        if len(tried) >= left:
            return None
        if len(tried) < len(route.attempts):
            attempt = route.attempts[len(tried)]
            if tried:
                attempt = _after_failure(attempt, *tried[-1])
            following = route.attempts[len(tried) + 1 : left]
            return NextAttempt(attempt, 0.0, following[0].target if following else None)
        if not tried:
            return None
        return (self._retry(route, tried) if retries else None) or _standby(route, tried)

    def _retry(self, route: Route, tried: Sequence[tuple[AttemptRunner, ApplianceError]]) -> NextAttempt | None:
        """The first of the route's targets that failed in a way that passes, while there is time for it."""
        now = self._means.clock()
        for attempt in route.attempts:
            failed = [error for trial, error in tried if trial.target.name == attempt.target.name]
            if not failed or not _may_pass(failed[-1], billed_too=route.retry_billed):
                continue
            pause = min(_FIRST_PAUSE_SECONDS * 2 ** (len(failed) - 1), _LONGEST_PAUSE_SECONDS)
            pause = max(pause * (0.5 + self._means.chance()), failed[-1].retry_after_seconds or 0.0)
            blocked = self._means.breakers.blocked_until(attempt.target.name, now + pause)
            if blocked is None and pause <= route.max_wait_seconds and now + pause < self._ends:
                reason = f"retry: {attempt.target.name} {failed[-1].code}"
                return NextAttempt(replace(attempt, reason=reason, cause="retry"), pause, None)
        return None

    def _patience(self, route: Route, following: Target | None, *, stream: bool) -> AttemptTimeouts:
        """Raises DeadlineExceeded where no time is left."""
        now = self._means.clock()
        left = self._ends - now
        if left <= 0:
            raise DeadlineExceeded(f"no answer within the {route.total_seconds:.0f} s that route {route.name!r} allows")
        first = route.residency.kind != "any" or route.pinned
        if following is None:
            return AttemptTimeouts(left, min(route.max_wait_seconds, left), None, first)
        budget = max(0.0, self._request.received + route.latency_budget_seconds - now)
        answer = route.answer_budget_seconds
        elsewhere = self._means.memory.experience.first_byte_seconds(following.name, stream)
        elsewhere = budget * _UNKNOWN_ELSEWHERE if elsewhere is None else min(elsewhere, budget * 0.5)
        return AttemptTimeouts(
            left,
            min(max(0.0, budget - elsewhere), left),
            budget,
            first,
            None if answer is None else max(0.0, self._request.received + answer - now),
            elsewhere,
        )

    async def _or_better(
        self, call: TaskCall, decided: RoutingResult, trial: AttemptRunner, payload: Any, made: int
    ) -> tuple[AttemptRunner, Any]:
        """The answer, or a better target's where it is unsure, the route escalates, and the rate allows it."""
        rule, route = decided.rule.escalation if decided.rule else None, decided.decision.route
        betters = [one for one in route.escalations if one.target.name != trial.target.name]
        if rule is None or trial.stream is not None or not betters or confidence_of(payload) is None:
            return trial, payload
        if len(betters) < len(route.escalations):
            return trial, payload  # it was one of them that answered
        of_late, now = self._means.memory.of_late, self._means.clock()
        of_late.judged(route.name, rule, now)
        why = doubt(payload, rule)
        if why is None:
            return trial, payload
        if not of_late.may_escalate(route.name, rule, now):
            text = (
                f"route {route.name!r} would escalate more than {rule.max_rate:.0%} of its answers; unsure ones stand"
            )
            self._means.alerts.warn("escalation_capped", text, route.name)
            self.reword(trial, "answered", f"unsure: {why}; not escalated, the rate is used up", is_unsure=True)
            return trial, payload
        of_late.escalated(route.name, rule, now)
        if of_late.has_room(route.name, rule, now):
            self._means.alerts.clear("escalation_capped", route.name)
        return await self._escalate(call, decided, trial, payload, betters[: route.max_attempts - made], why)

    async def _escalate(
        self,
        call: TaskCall,
        decided: RoutingResult,
        unsure: AttemptRunner,
        payload: Any,
        betters: Sequence[Attempt],
        why: str,
    ) -> tuple[AttemptRunner, Any]:
        """Ask the better ones in order. What they answer is theirs alone; where none does, the unsure answer stands."""
        for number, attempt in enumerate(betters, unsure.index + 1):
            reason = f"escalation: {unsure.target.name} {why}"
            better = self._trial(decided, number, replace(attempt, reason=reason, cause="escalation"))
            try:
                patience = self._patience(decided.decision.route, None, stream=call.streams(better.target))
                answer = await better.run(call, patience)
            except ApplianceError:
                continue
            else:
                self.reword(unsure, "rejected", f"unsure: {why}", is_unsure=True)
                return better, answer
            finally:
                if better.outcome is not None:
                    self.attempts.append(better.outcome)
        self.reword(unsure, "answered", f"unsure: {why}; nobody better answered", is_unsure=True)
        return unsure, payload

    def reword(self, trial: AttemptRunner, result: AttemptResult, detail: str, *, is_unsure: bool) -> None:
        """How an attempt ended, now that more is known of it."""
        before = trial.outcome
        assert before is not None
        trial.outcome = replace(before, result=result, detail=detail, is_unsure=is_unsure)
        self.attempts = [trial.outcome if one is before else one for one in self.attempts]

    def _steps(self) -> Sequence[DegradeRule]:
        """The steps down that this request's route declares and its endpoint can take."""
        rule, request = self._decided.rule, self._request
        if rule is None or request.endpoint not in _STEPPING:
            return ()
        return [step for step in rule.degrade if step.step != "static" or request.format == "text"]

    async def _step_down(
        self, call: TaskCall, steps: Sequence[DegradeRule], cause: ApplianceError
    ) -> tuple[AttemptRunner | None, Any]:
        """The declared steps in their order, until one answers. Raises `cause` where none does."""
        for step in steps:
            if step.step == "static":
                return None, self._static(step, cause)
            shape = shape_of_step(self._decided.shape, step)
            less = shaped(call, self._request.body, shape)
            decided = self._again(replace(self._decided, shape=shape), less.prompt_tokens, less.output_tokens)
            made = len(self.attempts)
            if decided.refusal is not None or made >= decided.decision.route.max_attempts:
                continue
            try:
                return await self._go(less, _marked(decided, step, cause), made, retries=False)
            except ApplianceError as error:
                if not _may_step_down(error):
                    raise
        raise cause

    def _static(self, step: DegradeRule, cause: ApplianceError) -> Any:
        """An answer without a model, written down as one of the site's own that cost nothing."""
        request, means = self._request, self._means
        self.attempts.append(
            AttemptOutcome(
                index=len(self.attempts),
                target="static",
                location="onsite",
                reason=f"degraded (static): {cause.code}",
                result="answered",
                detail="",
                started_at=means.wall(),
                first_byte_seconds=0.0,
                total_seconds=0.0,
                usage=Usage(),
                cost_usd=0.0,
                cause="degraded",
            )
        )
        self._note_first_byte()
        return static_answer(step, request.id, request.endpoint, int(request.received_at))

    def _note_first_byte(self) -> None:
        if self.first_byte_seconds is None:
            self.first_byte_seconds = self._means.clock() - self._request.received


def _standby(route: Route, tried: Sequence[tuple[AttemptRunner, ApplianceError]]) -> NextAttempt | None:
    """An engine that was not up when the request was decided, now that there is nobody else: a hosted target may be
    refused by a budget only after it was chosen."""
    asked = {trial.target.name for trial, _ in tried}
    attempt = next((attempt for attempt in route.standby if attempt.target.name not in asked), None)
    return None if attempt is None else NextAttempt(_after_failure(attempt, *tried[-1]), 0.0, None)


def _marked(decided: RoutingResult, step: DegradeRule, cause: ApplianceError) -> RoutingResult:
    """Every attempt says that it is a lesser one, and why."""
    route = decided.decision.route
    attempts = tuple(
        replace(attempt, reason=f"degraded ({step.step}): {cause.code}; {attempt.reason}", cause="degraded")
        for attempt in route.attempts
    )
    return replace(decided, decision=replace(decided.decision, route=replace(route, attempts=attempts)))


def goes_on(error: ApplianceError) -> bool:
    """Whether another target may be asked: where this one was full, failed or cannot be asked this, never where the
    request itself is the mistake: that would fail anywhere, and sending it out would only leak it."""
    return error.fallback or isinstance(error, Busy | Unavailable | Unsupported)


def _may_pass(error: ApplianceError, *, billed_too: bool) -> bool:
    """Whether the same target may do better in a moment. An answer that did not pass would not pass again, and what may
    have been billed is not asked for twice unless the route says so."""
    if isinstance(error, EngineBusy):
        return True
    if (
        not isinstance(error, BackendError)
        or not error.fallback
        or isinstance(error, RejectedReply | BackendAuth | BackendIncapable)
    ):
        return False
    return billed_too or not error.may_have_cost


def _may_step_down(error: ApplianceError) -> bool:
    """Whether less might be possible where all was not: never where the request may not be answered at all."""
    return goes_on(error) or isinstance(error, ContextTooLong | DeadlineExceeded)


def _after_failure(attempt: Attempt, trial: AttemptRunner, error: ApplianceError) -> Attempt:
    """`attempt`, saying that it is made because `trial` came to nothing."""
    assert trial.outcome is not None
    cause: AttemptCause = _CAUSES.get(trial.outcome.result, "fallback")
    detail = trial.outcome.detail
    reason = f"{cause}: {detail if trial.target.name in detail else f'{trial.target.name} {detail}'}"
    return replace(attempt, reason=reason, cause=cause)


def _last_of(tried: Sequence[tuple[AttemptRunner, ApplianceError]]) -> ApplianceError:
    """The last error; where several targets were tried its message names them all."""
    if not tried:
        return Unavailable("no target is left for this request")
    error = tried[-1][1]
    if len(tried) > 1:
        names = "; ".join(f"{trial.target.name}: {one.code}" for trial, one in tried)
        error.message = f"{error.message} (tried {names})"
        error.args = (error.message,)
    return error
