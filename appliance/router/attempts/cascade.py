"""A cascade's steps: the classifier is asked about all texts at once, each further step only about those that the one
before was unsure of. Answers are combined in the order of the texts, and each names the target that gave it.

A text escalates where the classifier is less sure than its bound wants, where the text is out of its scope, or where it
was drawn to be audited: then the last step is asked at once. The steps are the words of the route's `targets`; targets
that a residency-bound request may not reach have been left out before.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from appliance.core import (
    Attempt,
    AttemptCause,
    AttemptResult,
    Request,
    ResponseMetadata,
    Route,
    Target,
    Usage,
)
from appliance.errors import ApplianceError, Unavailable
from appliance.router.attempts.runner import AttemptRunner
from appliance.router.deps import RouterDeps
from appliance.router.routing.match import order_targets
from appliance.router.routing.router import RoutingResult
from appliance.tasks.classify import cascade as tasks
from appliance.tasks.classify.cascade import CascadeAnswer, CascadeCall, CascadeText, CascadeThresholds
from appliance.tasks.decisions import openai_shape
from appliance.tasks.decisions.decision_results import DecisionResult, Row
from appliance.tasks.decisions.openai_shape import DecisionsCall

_CAPPED: Final = "escalation_capped"


class StepExecutor(Protocol):
    """The attempt loop that a cascade is part of."""

    async def run_step(
        self, call: DecisionsCall, route: Route, attempts_used: int, *, retries: bool
    ) -> tuple[AttemptRunner, DecisionResult]: ...

    def amend_outcome(self, runner: AttemptRunner, result: AttemptResult, detail: str, *, is_unsure: bool) -> None: ...


@dataclass(slots=True)
class _TextState:
    """One text so far."""

    classifier_row: Row | None = None
    """What the classifier said."""
    answer: CascadeAnswer | None = None
    step: int = -1
    """The step whose answer that is."""
    error: ApplianceError | None = None
    escalates: bool = False
    is_audited: bool = False
    is_capped: bool = False
    """It would have escalated, and the rate was used up."""


class CascadeRunner:
    """One request's way through a cascade. `run` it once, then `combine_metadata`."""

    def __init__(
        self, executor: StepExecutor, deps: RouterDeps, request: Request, routing: RoutingResult, at_once: int
    ) -> None:
        assert routing.rule is not None and routing.rule.cascade is not None
        self._executor, self._deps, self._request = executor, deps, request
        self._rule, self._cascade, self._route = routing.rule, routing.rule.cascade, routing.decision.route
        self._classifier = routing.rule.targets[0]
        self._step_of_target = _step_of_target(routing.rule.targets, deps.state.snapshot.targets)
        self._gate = asyncio.Semaphore(max(1, at_once))
        self._texts: list[_TextState] = []
        self._runners: list[tuple[AttemptRunner, Sequence[int]]] = []
        self._usage = Usage()
        self._version: str | None = None

    async def run(self, calls: Sequence[DecisionsCall]) -> DecisionResult:
        """Raises what every text failed with, where none was answered."""
        whole = tasks.join_calls(calls)
        self._texts = [_TextState() for _ in whole.inputs]
        fallback = await self._ask_classifier(whole)
        unclassified = [index for index, text in enumerate(self._texts) if text.classifier_row is None]
        escalating, why = self._select_escalations(whole)
        audited = [index for index in escalating if self._texts[index].is_audited]
        unsure = [index for index in escalating if not self._texts[index].is_audited]
        last = len(self._rule.targets) - 1
        await asyncio.gather(
            self._ask_next_step(whole, unclassified, 0, "fallback", fallback, 1),
            self._ask_next_step(whole, unsure, 0, "escalation", f"escalation: {self._classifier} {why}", 1),
            self._ask_next_step(whole, audited, last - 1, "escalation", f"escalation: audit of {self._classifier}", 1),
        )
        return self._combine_answers(whole)

    def combine_metadata(self, metadata: ResponseMetadata) -> ResponseMetadata:
        """Where several targets answered, all of them; hosted as soon as one text's answer came from there."""
        answers = [text.answer for text in self._texts if text.answer is not None]
        counts = tasks.count_by_target(answers)
        if len(counts) < 2:
            return metadata
        by = ", ".join(f"{count} by {name}" for name, count in counts.items())
        return replace(
            metadata,
            target=", ".join(counts),
            location="hosted" if any(one.location == "hosted" for one in answers) else "onsite",
            reason=f"cascade of {len(self._texts)} texts: {by}",
        )

    # The classifier.

    async def _ask_classifier(self, whole: DecisionsCall) -> str:
        """Ask it about every text; returns why the texts without an answer have none."""
        attempts = tuple(one for one in self._route.attempts if one.target.name == self._classifier)
        if not tasks.is_classifier_question(whole.questions) or any(text.has_image for text in whole.inputs):
            return f"fallback: {self._classifier} answers one choice among texts"
        if not attempts:
            return f"fallback: {self._classifier} is not served"
        route = replace(self._route, attempts=attempts, cold_targets=())
        at, reason = 0, f"fallback: {self._classifier} failed"
        for call in openai_shape.split_call(tasks.make_classifier_call(whole)):
            indices = range(at, at + len(call.inputs))
            at += len(call.inputs)
            try:
                runner, result = await self._executor.run_step(call, route, 0, retries=False)
            except ApplianceError as error:
                reason = f"fallback: {self._classifier} {error.code}"
                continue
            self._runners.append((runner, indices))
            self._usage += result.usage
            self._version = result.variant
            for index, row in zip(indices, result.rows, strict=True):
                self._texts[index].classifier_row = row
                self._texts[index].answer = CascadeAnswer(row, runner.target.name, result.model, runner.target.location)
                self._texts[index].step = 0
        return reason

    def _select_escalations(self, whole: DecisionsCall) -> tuple[Sequence[int], str]:
        """Which of the classified texts escalate, inside the rate that the route allows, and why."""
        asked = [index for index, text in enumerate(self._texts) if text.classifier_row is not None]
        if not asked:
            return (), ""
        windows, now, name = self._deps.stats.windows, self._deps.clock(), self._route.name
        thresholds = self._deps.feedback.get_thresholds(self._cascade, self._classifier, self._version)
        unsure = [index for index in asked if not self._is_sure_enough(self._classifier_row(index), thresholds)]
        audited = self._draw_audit_sample(asked)
        for index in unsure:
            self._mark_unsure(index)
        unsure.sort(key=lambda index: tasks.classifier_confidence(self._classifier_row(index)))
        wanted = [*audited, *(index for index in unsure if index not in audited)]
        windows.record_answers(name, self._cascade, now, len(asked))
        allowed = windows.escalations_left(name, self._cascade, now)
        escalating = wanted[:allowed]
        windows.record_escalations(name, self._cascade, now, len(escalating))
        capped = set(wanted[allowed:]) & set(unsure)
        for index in escalating:
            self._texts[index].escalates, self._texts[index].is_audited = True, index in audited
        for index in capped:
            self._texts[index].is_capped = True
        self._alert_if_capped(len(capped))
        return sorted(escalating), f"unsure of {len(unsure)} of {len(asked)} texts ({thresholds.reason})"

    def _mark_unsure(self, index: int) -> None:
        """The answer so far is unsure, and says so if it stands."""
        text = self._texts[index]
        if text.answer is not None:
            text.answer = replace(text.answer, unsure=True)

    def _classifier_row(self, index: int) -> Row:
        row = self._texts[index].classifier_row
        assert row is not None
        return row

    def _is_sure_enough(self, row: Row, thresholds: CascadeThresholds) -> bool:
        threshold = thresholds.threshold
        if threshold is None and self._cascade.until_known == "below_confidence":
            threshold = self._cascade.below_confidence
        return (
            threshold is not None and not tasks.is_out_of_scope(row) and tasks.classifier_confidence(row) >= threshold
        )

    def _draw_audit_sample(self, indices: Sequence[int]) -> frozenset[int]:
        """Each text by the same chance, whatever the classifier said: only then does the sample stand for all."""
        if not self._cascade.audit_rate or not self._attempts_after(len(self._rule.targets) - 2):
            return frozenset()
        return frozenset(index for index in indices if self._deps.draw() < self._cascade.audit_rate)

    def _alert_if_capped(self, capped: int) -> None:
        windows, now, name = self._deps.stats.windows, self._deps.clock(), self._route.name
        if capped:
            text = (
                f"route {name!r} would escalate more than {self._cascade.max_rate:.0%} of its texts; unsure answers of "
                f"{self._classifier} stand, outside the bound of {self._cascade.bound:.0%}"
            )
            self._deps.alerts.warn(_CAPPED, text, name)
        elif windows.is_under_rate(name, self._cascade, now):
            self._deps.alerts.clear(_CAPPED, name)

    # The steps after it.

    def _attempts_after(self, step: int) -> tuple[Attempt, ...]:
        """The attempts of the steps after `step`, in the route's order."""
        return self._of_later_steps(self._route.attempts, step)

    def _of_later_steps(self, attempts: Iterable[Attempt], step: int) -> tuple[Attempt, ...]:
        return tuple(one for one in attempts if self._step_of_target.get(one.target.name, 0) > step)

    async def _ask_next_step(
        self,
        whole: DecisionsCall,
        indices: Sequence[int],
        step: int,
        cause: AttemptCause,
        reason: str,
        attempts_used: int,
    ) -> None:
        """Send some of the texts to the steps after `step`, split into calls that an engine answers in seconds."""
        if not indices:
            return
        attempts = tuple(replace(one, reason=reason, cause=cause) for one in self._attempts_after(step))
        cold = self._of_later_steps(self._route.cold_targets, step)
        if not attempts and not cold:
            self._set_errors(indices, Unavailable("no target is left for this text"))
            return
        route = replace(self._route, attempts=attempts or cold, cold_targets=cold if attempts else ())
        at, parts = 0, []
        for call in openai_shape.split_call(tasks.select_inputs(whole, indices)):
            parts.append(self._ask_part(whole, call, indices[at : at + len(call.inputs)], route, attempts_used))
            at += len(call.inputs)
        await asyncio.gather(*parts)

    async def _ask_part(
        self, whole: DecisionsCall, call: DecisionsCall, indices: Sequence[int], route: Route, attempts_used: int
    ) -> None:
        try:
            async with self._gate:
                runner, result = await self._executor.run_step(call, route, attempts_used, retries=True)
        except ApplianceError as error:
            self._set_errors(indices, error)
            return
        self._runners.append((runner, indices))
        self._usage += result.usage
        step = self._step_of_target.get(runner.target.name, len(self._rule.targets) - 1)
        # The reference is right by definition; a target that is last only because of a residency bound is not.
        is_reference = step == len(self._rule.targets) - 1
        unsure = []
        for index, row in zip(indices, result.rows, strict=True):
            sure = is_reference or tasks.is_sure(row, self._cascade.below_confidence)
            self._set_answer(
                index, CascadeAnswer(row, runner.target.name, result.model, runner.target.location, not sure), step
            )
            if not sure:
                unsure.append(index)
        if self._attempts_after(step):
            reason = f"escalation: {runner.target.name} unsure of {len(unsure)} of {len(indices)} texts"
            await self._ask_next_step(whole, unsure, step, "escalation", reason, attempts_used + 1)

    def _set_answer(self, index: int, answer: CascadeAnswer, step: int) -> None:
        """An answer replaces the one before; an error only where there is none."""
        text = self._texts[index]
        if isinstance(answer.row, ApplianceError):
            text.error = answer.row
            return
        text.answer, text.step = answer, step

    def _set_errors(self, indices: Sequence[int], error: ApplianceError) -> None:
        """No later step answered: the answers so far stand, unsure or not."""
        for index in indices:
            self._texts[index].error = error

    # The end.

    def _combine_answers(self, whole: DecisionsCall) -> DecisionResult:
        answers = []
        for text in self._texts:
            error = text.error or Unavailable("nobody answered this text")
            answers.append(text.answer or CascadeAnswer(error, "none", "none", "onsite"))
        self._amend_outcomes()
        self._deps.feedback.record_cascade(self._training_record(whole))
        return tasks.merge_answers(answers, self._usage)

    def _amend_outcomes(self) -> None:
        """An attempt whose answers were replaced by a better target's says so."""
        for runner, indices in self._runners:
            finals = Counter(answer.target for index in indices if (answer := self._texts[index].answer) is not None)
            kept = finals[runner.target.name]
            if not kept:
                self._executor.amend_outcome(runner, "rejected", "unsure: every text went on", is_unsure=True)
            elif kept < len(indices):
                self._executor.amend_outcome(
                    runner, "answered", f"{len(indices) - kept} of {len(indices)} texts went on", is_unsure=False
                )

    def _training_record(self, whole: DecisionsCall) -> CascadeCall:
        rows = tuple(self._training_row(whole, index, text) for index, text in enumerate(self._texts))
        return CascadeCall(
            route=self._route.name,
            classifier=self._classifier,
            version=self._version,
            decision_id=self._request.decision_id,
            owner=self._request.caller.key_id,
            residency=str(self._route.residency),
            keep_texts=self._rule.keep_texts,
            at=self._deps.wall(),
            rows=rows if tasks.is_classifier_question(whole.questions) else (),
        )

    def _training_row(self, whole: DecisionsCall, index: int, text: _TextState) -> CascadeText:
        answer = text.answer
        return CascadeText(
            index=index,
            text=whole.inputs[index].text if self._rule.keep_texts else "",
            own=None if text.classifier_row is None else tasks.chosen_label(text.classifier_row, whole.questions),
            classifier_confidence=0.0
            if text.classifier_row is None
            else tasks.classifier_confidence(text.classifier_row),
            answer=None if answer is None else tasks.chosen_label(answer.row, whole.questions),
            answered_by="none" if answer is None else answer.target,
            is_sure=answer is not None and not answer.unsure,
            went_on=text.escalates or text.classifier_row is None,
            audited=text.is_audited and text.step == len(self._rule.targets) - 1,
            is_reference=text.step == len(self._rule.targets) - 1,
            capped=text.is_capped,
        )


def _step_of_target(words: Sequence[str], targets: Sequence[Target]) -> dict[str, int]:
    """Which step each target belongs to: the first word of the route that names it."""
    steps: dict[str, int] = {}
    for step, word in enumerate(words):
        for target in order_targets((word,), targets):
            steps.setdefault(target.name, step)
    return steps
