"""What is learned from a cascade's traffic: thresholds that keep their bounds, labels, and new versions.

The pipeline asks `standing` and tells `seen`, neither of which waits. Everything else is done by `tend`, which `run`
calls again and again: labels are written down, thresholds estimated anew where labels came, candidates looked after.
"""

import asyncio
import contextlib
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import structlog

from appliance.config import CascadeRule
from appliance.config import LearningSettings as LearningRules
from appliance.core import HealthAlerts
from appliance.errors import ApplianceError, NotFound, RequestError
from appliance.quality import rules as deciders
from appliance.quality.candidates import CandidateProgram, Candidates, CascadeClassifier, EncoderClient
from appliance.quality.models import FEEDBACK, DailyTraffic, Labelled, LearningState
from appliance.quality.store import LearningStore
from appliance.quality.traffic import (
    SECONDS_PER_DAY,
    count_traffic,
    drop_unusable_text,
    format_day,
    is_example,
    make_label,
)
from appliance.tasks.classify.cascade import CascadeCall, CascadeThresholds

_PACE_SECONDS: Final = 2.0
"""Between two rounds: an estimate takes some milliseconds, and labels come one by one."""
_IDLE_SECONDS: Final = 4.0
"""Without new labels: trainings end, and classifiers come, without anybody telling."""
_PRUNE_SECONDS: Final = 3_600.0
_RECENT_TEXTS: Final = 50_000
"""Answers that feedback may still be given to without their text; older ones where they were labelled anyway."""
_RECENT_CHARACTERS: Final = 20_000_000
"""Of texts that are kept in memory for that."""
_SHOWN_DAYS: Final = 30
_UNPROVEN: Final = "cascade_unproven"
_UNWRITTEN: Final = "labels_not_kept"

_Key = tuple[str, str, float, float, int]
"""Classifier, version, bound, confidence, texts that the bound is for."""

_log = structlog.get_logger(__name__)


class CascadeLearning:
    """Everything is called on the event loop. `lessons`: the cascades of the policy in force, by classifier."""

    def __init__(
        self,
        store: LearningStore,
        encoders: EncoderClient,
        lessons: Callable[[], Mapping[str, CascadeClassifier]],
        alerts: HealthAlerts,
        rules: LearningRules,
        wall: Callable[[], float],
        is_served: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.store, self._lessons, self._alerts, self._rules, self._wall = store, lessons, alerts, rules, wall
        self._is_served = is_served
        self._program = CandidateProgram(encoders)
        self._candidates = Candidates(store, self._program, alerts)
        self._standings: dict[_Key, CascadeThresholds] = {}
        self._stale: set[_Key] = set()
        self._asked: dict[str, str] = {}
        """The version of each classifier that answered last."""
        self._recent: OrderedDict[str, CascadeCall] = OrderedDict()
        self._recent_texts = self._recent_characters = 0
        self._rows: list[Labelled] = []
        self._days: dict[tuple[str, str, int], DailyTraffic] = {}
        self._learnt: dict[str, LearningState] = {}
        self._wake = asyncio.Event()
        self._changing = asyncio.Lock()
        self._pruned_at = 0.0
        self.totals: dict[str, DailyTraffic] = {}
        """Since the start, by classifier."""

    async def start(self) -> None:
        self._learnt = dict(await self.store.read_states())

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            self._wake.clear()
            try:
                await self.run_round()
                self._alerts.clear(_UNWRITTEN)
            except ApplianceError as error:
                self._alerts.warn(_UNWRITTEN, f"what classifiers learn from is not kept at present: {error.message}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_IDLE_SECONDS):
                    await self._wake.wait()
            await asyncio.sleep(_PACE_SECONDS)

    async def aclose(self) -> None:
        with contextlib.suppress(ApplianceError):
            await self._flush()
        await self.store.close()

    # What the pipeline asks and tells.

    def get_thresholds(self, cascade: CascadeRule, classifier: str, version: str | None) -> CascadeThresholds:
        if version is None:
            return CascadeThresholds(None, "its version is not known")
        self._asked[classifier] = version
        key = _key(cascade, classifier, version)
        known = self._standings.get(key)
        if known is None:
            self._want(key)
            return CascadeThresholds(None, "no threshold was estimated yet")
        return known

    def record_cascade(self, call: CascadeCall) -> None:
        call = replace(call, rows=tuple(map(drop_unusable_text, call.rows)))
        day = count_traffic(call)
        place = (day.classifier, day.route, day.day)
        self._days[place] = self._days[place] + day if place in self._days else day
        total = self.totals.get(call.classifier)
        self.totals[call.classifier] = day if total is None else total + replace(day, day=total.day)
        rows = [make_label(call, row) for row in call.rows if is_example(call, row)]
        self._rows += rows
        if any(row.audited for row in rows):
            self._doubt(call.classifier)
        self._remember(call)

    def _remember(self, call: CascadeCall) -> None:
        self._recent[call.decision_id] = call
        self._count(call, 1)
        while len(self._recent) > 1 and (
            self._recent_texts > _RECENT_TEXTS or self._recent_characters > _RECENT_CHARACTERS
        ):
            _, oldest = self._recent.popitem(last=False)
            self._count(oldest, -1)

    def _count(self, call: CascadeCall, times: int) -> None:
        self._recent_texts += times * len(call.rows)
        self._recent_characters += times * sum(len(row.text) for row in call.rows)

    def _want(self, key: _Key) -> None:
        self._stale.add(key)
        self._wake.set()

    def _doubt(self, classifier: str) -> None:
        """New labels: what was estimated holds until it is estimated anew."""
        self._stale |= {key for key in self._standings if key[0] == classifier}
        self._wake.set()

    # What callers say.

    async def add_feedback(
        self, owner: str, decision_id: str, index: int, label: str, *, sees_all: bool
    ) -> Mapping[str, Any]:
        """What was right for one text of a decision. Raises NotFound for one that is not known, or somebody else's."""
        row = await self._known(decision_id, index)
        if row is None or not (sees_all or row.owner == owner):
            raise NotFound(
                f"text {index} of decision {decision_id[:80]!r} is not known here (any more): its route must have a "
                "cascade; give input and classifier besides to add a labelled text of your own"
            )
        told = replace(row, label=label, source=FEEDBACK, at=self._wall())
        await self._add(told, kept=row.label)
        return {"decision_id": decision_id, "index": index, "classifier": row.classifier, "answered": row.own}

    async def add_example(
        self, owner: str, classifier: str, text: str, label: str, residency: str
    ) -> Mapping[str, Any]:
        """A labelled text of the caller's own. Raises RequestError where no route keeps texts for the classifier."""
        lesson = self._lessons().get(classifier)
        if lesson is None or not lesson.keep_texts:
            known = ", ".join(sorted(name for name, one in self._lessons().items() if one.keep_texts)) or "none"
            raise RequestError(
                f"no route keeps texts for {classifier[:80]!r}; those that learn: {known}", param="classifier"
            )
        made = Labelled(
            decision_id=f"taught_{secrets.token_hex(12)}",
            index=0,
            classifier=classifier,
            route=lesson.route,
            owner=owner,
            residency=residency,
            version=None,
            own=None,
            own_confidence=0.0,
            label=label,
            source=FEEDBACK,
            audited=False,
            text=text,
            at=self._wall(),
        )
        await self._add(made, kept=None)
        return {"decision_id": made.decision_id, "index": 0, "classifier": classifier, "answered": None}

    async def _known(self, decision_id: str, index: int) -> Labelled | None:
        await self._flush()
        found = await self.store.get_label(decision_id, index)
        call = self._recent.get(decision_id)
        if found is not None or call is None or not 0 <= index < len(call.rows):
            return found
        return make_label(call, call.rows[index])

    async def _add(self, row: Labelled, *, kept: str | None) -> None:
        day = DailyTraffic(row.classifier, row.route, int(row.at // SECONDS_PER_DAY), feedback=1)
        if row.audited and kept != row.label:
            # The reference was corrected: agreement is with what is right.
            day = replace(day, agreed=(row.own == row.label) - (row.own == kept))
        await self.store.add_labels([row], [day])
        self._doubt(row.classifier)

    async def forget_owner(self, owner: str, classifier: str | None = None) -> int:
        """Remove a key's labels and texts; how many there were. Versions that were trained on them stay."""
        await self._flush()
        for decision_id in [name for name, call in self._recent.items() if call.owner == owner]:
            self._count(self._recent.pop(decision_id), -1)
        gone = await self.store.remove_owner(owner, classifier)
        self._stale |= set(self._standings)
        self._wake.set()
        return gone

    # What operators ask.

    async def describe_classifier(self, name: str) -> Mapping[str, Any] | None:
        """What came of a classifier's traffic; None where no route begins a cascade with it."""
        lesson = self._lessons().get(f"classifier/{name}")
        if lesson is None:
            return None
        await self._flush()
        since = int(self._wall() // SECONDS_PER_DAY) - _SHOWN_DAYS
        days = await self.store.list_days(lesson.target, since)
        learnt = self._learnt.get(lesson.target, LearningState())
        cascade = lesson.cascade
        return {
            "route": lesson.route,
            "bound": cascade.bound,
            "confidence": cascade.confidence,
            "over_texts": cascade.over_texts,
            "thresholds": [
                {"version": int(key[1]), "threshold": found.threshold, "reason": found.reason}
                for key, found in self._standings.items()
                if key == _key(cascade, lesson.target, key[1])
            ],
            "labels": await self.store.count_labels(lesson.target),
            "learning": {"phase": learnt.phase, "candidate": learnt.candidate, "tests": learnt.tests},
            "news": list(learnt.news),
            "days": [{"day": format_day(one.day), "route": one.route, **one.to_json()} for one in days],
        }

    async def start_training(self, name: str) -> Mapping[str, Any]:
        """Train a candidate now. Raises NotFound, RequestError, Busy."""
        lesson = self._lessons().get(f"classifier/{name}")
        if lesson is None:
            raise NotFound(f"no route begins a cascade with classifier/{name[:80]}: add one to the policy")
        await self._flush()
        async with self._changing:
            learnt = await self._candidates.start_training(lesson, self._learnt.get(lesson.target, LearningState()))
            await self._save(lesson.target, learnt)
        return {"name": name, "phase": learnt.phase, "news": list(learnt.news[:1])}

    async def forget_classifier(self, name: str) -> None:
        """A classifier was removed with all its versions: what was learned for it goes too."""
        target = f"classifier/{name}"
        self._learnt.pop(target, None)
        self._asked.pop(target, None)
        self._stale = {key for key in self._stale if key[0] != target}
        self._standings = {key: found for key, found in self._standings.items() if key[0] != target}
        await self.store.remove_classifier(target)

    @property
    def thresholds(self) -> Mapping[_Key, CascadeThresholds]:
        return self._standings

    # What is done in rounds.

    async def run_round(self) -> None:
        """One round. Raises where labels cannot be kept; what cannot be done of the rest is tried again next time."""
        await self._flush()
        for lesson in self._lessons().values():
            try:
                await self._estimate(lesson)
                async with self._changing:
                    before = self._learnt.get(lesson.target, LearningState())
                    await self._save(lesson.target, await self._candidates.advance(lesson, before))
            except ApplianceError as error:
                _log.warning("a classifier was not looked after", classifier=lesson.target, reason=error.message)
        now = self._wall()
        if now - self._pruned_at >= _PRUNE_SECONDS:
            self._pruned_at = now
            before_at = now - self._rules.retention_days * SECONDS_PER_DAY
            await self.store.prune(list(self._lessons()), before_at, self._rules.max_texts)

    async def _save(self, classifier: str, learnt: LearningState) -> None:
        before = self._learnt.get(classifier, LearningState())
        if learnt != before:
            self._learnt[classifier] = learnt
            await self.store.save_state(classifier, learnt)
            if learnt.news != before.news:
                _log.info("classifier learns", classifier=classifier, news=learnt.news[0])

    async def _flush(self) -> None:
        rows, days = self._rows, self._days
        if not rows and not days:
            return
        self._rows, self._days = [], {}
        try:
            await self.store.add_labels(rows, list(days.values()))
        except ApplianceError:
            self._rows = (rows + self._rows)[-_RECENT_TEXTS:]
            for place, day in days.items():
                self._days[place] = self._days[place] + day if place in self._days else day
            raise

    async def _estimate(self, lesson: CascadeClassifier) -> None:
        """The thresholds of the serving version and the candidate, where labels came or none is known."""
        if lesson.target not in self._asked and not await self._first_look(lesson):
            return
        stale = {key for key in self._stale if key[0] == lesson.target}
        learnt = self._learnt.get(lesson.target, LearningState())
        if learnt.candidate is not None:
            stale |= {_key(lesson.cascade, lesson.target, str(learnt.candidate))} - set(self._standings)
        for key in stale:
            # Labels that come meanwhile make it stale again.
            self._stale.discard(key)
            try:
                self._standings[key] = await self._standing(lesson, key)
            except RequestError:
                self._standings.pop(key, None)  # that version is no more
            except ApplianceError:
                self._stale.add(key)
                raise
        self._tell(lesson)

    async def _first_look(self, lesson: CascadeClassifier) -> bool:
        """So that the first text need not wait for a threshold. The program is not started only to find nothing."""
        told = await self._program.get_classifier(lesson.name) if self._is_served(lesson.target) else None
        if told is None:
            return False
        self.get_thresholds(lesson.cascade, lesson.target, str(told["serving"]))
        return True

    async def _standing(self, lesson: CascadeClassifier, key: _Key) -> CascadeThresholds:
        classifier, version, bound, confidence, over_texts = key
        live, complaints = await self.store.list_scores(classifier, version)
        body = {
            "version": int(version),
            "bound": bound,
            "confidence": confidence,
            "over_texts": over_texts,
            "live": live,
            "complaints": complaints,
        }
        return deciders.combine_thresholds(await self._program.estimate_threshold(lesson.name, body), bound)

    def _tell(self, lesson: CascadeClassifier) -> None:
        found = self._standings.get(_key(lesson.cascade, lesson.target, self._asked[lesson.target]))
        if found is None or found.threshold is not None:
            self._alerts.clear(_UNPROVEN, lesson.route)
            return
        what = (
            "every text goes on"
            if lesson.cascade.until_known == "escalate"
            else f"those below {lesson.cascade.below_confidence:g} go on, and nothing is promised"
        )
        self._alerts.warn(_UNPROVEN, f"route {lesson.route!r}: {found.reason}; {what}", lesson.route)


def _key(cascade: CascadeRule, classifier: str, version: str) -> _Key:
    return classifier, version, cascade.bound, cascade.confidence, cascade.over_texts
