"""A cascade's steps: the classifier is asked about all texts at once, each further step only about those that the one
before was unsure of. Answers are put together in the order of the texts, and every one says who gave it.

A text goes on where the classifier is less sure than its bound wants, where it is out of its scope, or where it was
drawn to be audited: then the last step is asked straight away. The steps are the words of the route's `targets`, and
what a bound request may not reach was left out before it came here.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from appliance.core import (
    Attempt,
    AttemptCause,
    AttemptResult,
    Request,
    ResponseMetadata,
    Route,
    Target,
    TaskCall,
    Usage,
)
from appliance.errors import ApplianceError, Unavailable
from appliance.router.attempts.runner import AttemptRunner
from appliance.router.deps import RouterDeps
from appliance.router.routing.match import in_order
from appliance.router.routing.router import RoutingResult
from appliance.tasks.classify import cascade as tasks
from appliance.tasks.classify.cascade import CascadeAnswer, CascadeCall, CascadeText, CascadeThresholds
from appliance.tasks.decisions import openai_shape
from appliance.tasks.decisions.openai_shape import DecisionResult, DecisionsCall, Row

_CAPPED: Final = "escalation_capped"


class StepExecutor(Protocol):
    """The walk that a cascade is part of."""

    async def ask(self, call: TaskCall, route: Route, made: int, *, retries: bool) -> tuple[AttemptRunner, Any]: ...

    def reword(self, trial: AttemptRunner, result: AttemptResult, detail: str, *, is_unsure: bool) -> None: ...


@dataclass(slots=True)
class _Text:
    """One text on its way."""

    own: Row | None = None
    """What the classifier said."""
    given: CascadeAnswer | None = None
    rank: int = -1
    """The step whose answer that is."""
    error: ApplianceError | None = None
    goes_on: bool = False
    is_audited: bool = False
    is_capped: bool = False
    """It would have gone on, and there was no room."""


class CascadeRunner:
    """One request's way through a cascade. `run` it once; then `told` puts what it came to into the headers."""

    def __init__(
        self, asker: StepExecutor, means: RouterDeps, request: Request, decided: RoutingResult, at_once: int
    ) -> None:
        assert decided.rule is not None and decided.rule.cascade is not None
        self._asker, self._means, self._request = asker, means, request
        self._rule, self._cascade, self._route = decided.rule, decided.rule.cascade, decided.decision.route
        self._classifier = decided.rule.targets[0]
        self._ranks = _ranks(decided.rule.targets, means.state.snapshot.targets)
        self._gate = asyncio.Semaphore(max(1, at_once))
        self._texts: list[_Text] = []
        self._trials: list[tuple[AttemptRunner, Sequence[int]]] = []
        self._usage = Usage()
        self._version: str | None = None

    async def run(self, calls: Sequence[DecisionsCall]) -> DecisionResult:
        """Raises what every text failed with, where none was answered."""
        whole = tasks.joined(calls)
        self._texts = [_Text() for _ in whole.inputs]
        fallback = await self._classify(whole)
        unasked = [place for place, text in enumerate(self._texts) if text.own is None]
        going, why = self._judge(whole)
        audited = [place for place in going if self._texts[place].is_audited]
        unsure = [place for place in going if not self._texts[place].is_audited]
        last = len(self._rule.targets) - 1
        await asyncio.gather(
            self._further(whole, unasked, 0, "fallback", fallback, 1),
            self._further(whole, unsure, 0, "escalation", f"escalation: {self._classifier} {why}", 1),
            self._further(whole, audited, last - 1, "escalation", f"escalation: audit of {self._classifier}", 1),
        )
        return self._ended(whole)

    def told(self, facts: ResponseMetadata) -> ResponseMetadata:
        """Where several targets answered, all of them; hosted as soon as one text's answer came from there."""
        given = [text.given for text in self._texts if text.given is not None]
        counts = tasks.told(given)
        if len(counts) < 2:
            return facts
        by = ", ".join(f"{count} by {name}" for name, count in counts.items())
        return replace(
            facts,
            target=", ".join(counts),
            location="hosted" if any(one.location == "hosted" for one in given) else "onsite",
            reason=f"cascade of {len(self._texts)} texts: {by}",
        )

    # The classifier.

    async def _classify(self, whole: DecisionsCall) -> str:
        """Ask it about every text, and say why it was not, for the attempts that follow."""
        attempts = tuple(one for one in self._route.attempts if one.target.name == self._classifier)
        if not tasks.could_learn(whole.questions) or any(text.has_image for text in whole.inputs):
            return f"fallback: {self._classifier} answers one choice among texts"
        if not attempts:
            return f"fallback: {self._classifier} is not served"
        route = replace(self._route, attempts=attempts, standby=())
        at, reason = 0, f"fallback: {self._classifier} failed"
        for call in openai_shape.split(tasks.for_classifier(whole)):
            places = range(at, at + len(call.inputs))
            at += len(call.inputs)
            try:
                trial, judgement = await self._asker.ask(call, route, 0, retries=False)
            except ApplianceError as error:
                reason = f"fallback: {self._classifier} {error.code}"
                continue
            self._trials.append((trial, places))
            self._usage += judgement.usage
            self._version = judgement.variant
            for place, row in zip(places, judgement.rows, strict=True):
                self._texts[place].own = row
                self._texts[place].given = CascadeAnswer(row, trial.target.name, judgement.model, trial.target.location)
                self._texts[place].rank = 0
        return reason

    def _judge(self, whole: DecisionsCall) -> tuple[Sequence[int], str]:
        """Which of the texts that were classified go on, inside the rate that the route allows, and why."""
        asked = [place for place, text in enumerate(self._texts) if text.own is not None]
        if not asked:
            return (), ""
        of_late, now, name = self._means.memory.of_late, self._means.clock(), self._route.name
        standing = self._means.learning.standing(self._cascade, self._classifier, self._version)
        unsure = [place for place in asked if not self._stands(self._own(place), standing)]
        audited = self._drawn(asked)
        for place in unsure:
            self._doubt(place)
        unsure.sort(key=lambda place: tasks.own_confidence(self._own(place)))
        wanted = [*audited, *(place for place in unsure if place not in audited)]
        of_late.judged(name, self._cascade, now, len(asked))
        room = of_late.room(name, self._cascade, now)
        going = wanted[:room]
        of_late.escalated(name, self._cascade, now, len(going))
        capped = set(wanted[room:]) & set(unsure)
        for place in going:
            self._texts[place].goes_on, self._texts[place].is_audited = True, place in audited
        for place in capped:
            self._texts[place].is_capped = True
        self._alert(len(capped))
        return sorted(going), f"unsure of {len(unsure)} of {len(asked)} texts ({standing.reason})"

    def _doubt(self, place: int) -> None:
        """What is given so far is unsure, and says so if it has to stand."""
        text = self._texts[place]
        if text.given is not None:
            text.given = replace(text.given, unsure=True)

    def _own(self, place: int) -> Row:
        own = self._texts[place].own
        assert own is not None
        return own

    def _stands(self, row: Row, standing: CascadeThresholds) -> bool:
        threshold = standing.threshold
        if threshold is None and self._cascade.until_known == "below_confidence":
            threshold = self._cascade.below_confidence
        return threshold is not None and not tasks.is_out_of_scope(row) and tasks.own_confidence(row) >= threshold

    def _drawn(self, places: Sequence[int]) -> frozenset[int]:
        """Each by the same chance, whatever the classifier said of it: only then do the audited ones tell of all."""
        if not self._cascade.audit_rate or not self._after(len(self._rule.targets) - 2):
            return frozenset()
        return frozenset(place for place in places if self._means.chance() < self._cascade.audit_rate)

    def _alert(self, capped: int) -> None:
        of_late, now, name = self._means.memory.of_late, self._means.clock(), self._route.name
        if capped:
            text = (
                f"route {name!r} would escalate more than {self._cascade.max_rate:.0%} of its texts; unsure answers of "
                f"{self._classifier} stand, outside the bound of {self._cascade.bound:.0%}"
            )
            self._means.alerts.warn(_CAPPED, text, name)
        elif of_late.has_room(name, self._cascade, now):
            self._means.alerts.clear(_CAPPED, name)

    # The steps after it.

    def _after(self, rank: int) -> tuple[Attempt, ...]:
        """Who may be asked after the step `rank`, in the route's order."""
        return self._later(self._route.attempts, rank)

    def _later(self, attempts: Iterable[Attempt], rank: int) -> tuple[Attempt, ...]:
        return tuple(one for one in attempts if self._ranks.get(one.target.name, 0) > rank)

    async def _further(
        self, whole: DecisionsCall, places: Sequence[int], rank: int, cause: AttemptCause, reason: str, made: int
    ) -> None:
        """Put some of the texts to whoever comes after `rank`, cut into calls that an engine answers in seconds."""
        if not places:
            return
        attempts = tuple(replace(one, reason=reason, cause=cause) for one in self._after(rank))
        standby = self._later(self._route.standby, rank)
        if not attempts and not standby:
            self._unanswered(places, Unavailable("no target is left for this text"))
            return
        route = replace(self._route, attempts=attempts or standby, standby=standby if attempts else ())
        at, pieces = 0, []
        for call in openai_shape.split(tasks.only(whole, places)):
            pieces.append(self._piece(whole, call, places[at : at + len(call.inputs)], route, made))
            at += len(call.inputs)
        await asyncio.gather(*pieces)

    async def _piece(
        self, whole: DecisionsCall, call: DecisionsCall, places: Sequence[int], route: Route, made: int
    ) -> None:
        try:
            async with self._gate:
                trial, judgement = await self._asker.ask(call, route, made, retries=True)
        except ApplianceError as error:
            self._unanswered(places, error)
            return
        self._trials.append((trial, places))
        self._usage += judgement.usage
        rank = self._ranks.get(trial.target.name, len(self._rule.targets) - 1)
        # The reference is right by definition. Whoever is last only because a bound ends there is not.
        is_reference = rank == len(self._rule.targets) - 1
        unsure = []
        for place, row in zip(places, judgement.rows, strict=True):
            sure = is_reference or tasks.stands(row, self._cascade.below_confidence)
            self._give(
                place, CascadeAnswer(row, trial.target.name, judgement.model, trial.target.location, not sure), rank
            )
            if not sure:
                unsure.append(place)
        if self._after(rank):
            reason = f"escalation: {trial.target.name} unsure of {len(unsure)} of {len(places)} texts"
            await self._further(whole, unsure, rank, "escalation", reason, made + 1)

    def _give(self, place: int, given: CascadeAnswer, rank: int) -> None:
        """An answer replaces the one before; an error only where there is none."""
        text = self._texts[place]
        if isinstance(given.row, ApplianceError):
            text.error = given.row
            return
        text.given, text.rank = given, rank

    def _unanswered(self, places: Sequence[int], error: ApplianceError) -> None:
        """Nobody better answered: what is there stands, unsure or not."""
        for place in places:
            self._texts[place].error = error

    # The end.

    def _ended(self, whole: DecisionsCall) -> DecisionResult:
        given = []
        for text in self._texts:
            error = text.error or Unavailable("nobody answered this text")
            given.append(text.given or CascadeAnswer(error, "none", "none", "onsite"))
        self._reword_all()
        self._means.learning.seen(self._seen(whole))
        return tasks.merged(given, self._usage)

    def _reword_all(self) -> None:
        """Whose answers were replaced by somebody better's is told of the attempt."""
        for trial, places in self._trials:
            finals = Counter(given.target for place in places if (given := self._texts[place].given) is not None)
            kept = finals[trial.target.name]
            if not kept:
                self._asker.reword(trial, "rejected", "unsure: every text went on", is_unsure=True)
            elif kept < len(places):
                self._asker.reword(
                    trial, "answered", f"{len(places) - kept} of {len(places)} texts went on", is_unsure=False
                )

    def _seen(self, whole: DecisionsCall) -> CascadeCall:
        rows = tuple(self._seen_text(whole, place, text) for place, text in enumerate(self._texts))
        return CascadeCall(
            route=self._route.name,
            classifier=self._classifier,
            version=self._version,
            decision_id=self._request.decision_id,
            owner=self._request.caller.key_id,
            residency=str(self._route.residency),
            keep_texts=self._rule.keep_texts,
            at=self._means.wall(),
            rows=rows if tasks.could_learn(whole.questions) else (),
        )

    def _seen_text(self, whole: DecisionsCall, place: int, text: _Text) -> CascadeText:
        given = text.given
        return CascadeText(
            index=place,
            text=whole.inputs[place].text if self._rule.keep_texts else "",
            own=None if text.own is None else tasks.chosen(text.own, whole.questions),
            own_confidence=0.0 if text.own is None else tasks.own_confidence(text.own),
            answer=None if given is None else tasks.chosen(given.row, whole.questions),
            answered_by="none" if given is None else given.target,
            is_sure=given is not None and not given.unsure,
            went_on=text.goes_on or text.own is None,
            audited=text.is_audited and text.rank == len(self._rule.targets) - 1,
            is_reference=text.rank == len(self._rule.targets) - 1,
            capped=text.is_capped,
        )


def _ranks(words: Sequence[str], targets: Sequence[Target]) -> dict[str, int]:
    """Which step each target belongs to: the first of the route's words that names it."""
    ranks: dict[str, int] = {}
    for rank, word in enumerate(words):
        for target in in_order((word,), targets):
            ranks.setdefault(target.name, rank)
    return ranks
