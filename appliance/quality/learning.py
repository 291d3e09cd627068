"""What is learned from a cascade's traffic: thresholds that keep their bounds, labels, and new versions.

The pipeline calls `get_thresholds` and `record_cascade`, which never wait. `run` does the rest in
rounds: labels are written, thresholds estimated where labels came, candidates looked after.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import structlog

from appliance.config import CascadeRule
from appliance.config import LearningSettings as LearningRules
from appliance.core import HealthAlerts
from appliance.errors import ApplianceError, NotFound, RequestError
from appliance.quality.candidates import CandidateProgram, Candidates, CascadeClassifier, EncoderClient
from appliance.quality.models import FEEDBACK, DailyTraffic, FeedbackReceipt, Labelled, LearningState, TrainingStarted
from appliance.quality.store import LearningStore
from appliance.quality.thresholds import ThresholdEstimates, ThresholdKey
from appliance.quality.traffic import (
    SECONDS_PER_DAY,
    RecentCalls,
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
_MAX_UNWRITTEN_LABELS: Final = 50_000
"""Labels that are held while they cannot be written; the oldest are lost first."""
_SHOWN_DAYS: Final = 30
_UNWRITTEN: Final = "labels_not_kept"

_log = structlog.get_logger(__name__)


class CascadeLearning:
    """Everything is called on the event loop. `classifiers`: those of the policy in force that begin a cascade."""

    def __init__(
        self,
        store: LearningStore,
        encoders: EncoderClient,
        classifiers: Callable[[], Mapping[str, CascadeClassifier]],
        alerts: HealthAlerts,
        rules: LearningRules,
        wall: Callable[[], float],
        is_served: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.store, self._classifiers, self._alerts, self._rules, self._wall = store, classifiers, alerts, rules, wall
        self._wake = asyncio.Event()
        self._program = CandidateProgram(encoders)
        self._candidates = Candidates(store, self._program, alerts)
        self._estimates = ThresholdEstimates(store, self._program, alerts, is_served, self._wake)
        self._recent = RecentCalls()
        self._rows: list[Labelled] = []
        self._days: dict[tuple[str, str, int], DailyTraffic] = {}
        self._states: dict[str, LearningState] = {}
        self._changing = asyncio.Lock()
        self._pruned_at = 0.0
        self.totals: dict[str, DailyTraffic] = {}
        """Since the start, by classifier."""

    async def start(self) -> None:
        self._states = dict(await self.store.read_states())

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

    # What the pipeline calls.

    def get_thresholds(self, cascade: CascadeRule, classifier: str, version: str | None) -> CascadeThresholds:
        return self._estimates.get(cascade, classifier, version)

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
            self._estimates.mark_stale(call.classifier)
        self._recent.add(call)

    # What callers say.

    async def add_feedback(
        self, owner: str, decision_id: str, index: int, label: str, *, sees_all: bool
    ) -> FeedbackReceipt:
        """What was right for one text of a decision. Raises NotFound for one that is not known, or another key's."""
        row = await self._known(decision_id, index)
        if row is None or not (sees_all or row.owner == owner):
            raise NotFound(
                f"text {index} of decision {decision_id[:80]!r} is not known here (any more): its route must have a "
                "cascade; give input and classifier besides to add a labelled text of your own"
            )
        corrected = replace(row, label=label, source=FEEDBACK, at=self._wall())
        await self._add(corrected, kept=row.label)
        return {"decision_id": decision_id, "index": index, "classifier": row.classifier, "answered": row.own}

    async def add_example(self, owner: str, classifier: str, text: str, label: str, residency: str) -> FeedbackReceipt:
        """A labelled text of the caller's own. Raises RequestError where no route keeps texts for the classifier."""
        learner = self._classifiers().get(classifier)
        if learner is None or not learner.keep_texts:
            known = ", ".join(sorted(name for name, one in self._classifiers().items() if one.keep_texts)) or "none"
            raise RequestError(
                f"no route keeps texts for {classifier[:80]!r}; those that learn: {known}", param="classifier"
            )
        made = Labelled(
            decision_id=f"taught_{secrets.token_hex(12)}",
            index=0,
            classifier=classifier,
            route=learner.route,
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
        self._estimates.mark_stale(row.classifier)

    async def forget_owner(self, owner: str, classifier: str | None = None) -> int:
        """Remove a key's labels and texts; how many there were. Versions that were trained on them stay."""
        await self._flush()
        self._recent.remove_owner(owner)
        gone = await self.store.remove_owner(owner, classifier)
        self._estimates.mark_stale()
        return gone

    # What operators ask.

    async def describe_classifier(self, name: str) -> Mapping[str, Any] | None:
        """What came of a classifier's traffic; None where no route begins a cascade with it."""
        classifier = self._classifiers().get(f"classifier/{name}")
        if classifier is None:
            return None
        await self._flush()
        since = int(self._wall() // SECONDS_PER_DAY) - _SHOWN_DAYS
        days = await self.store.list_days(classifier.target, since)
        state = self._states.get(classifier.target, LearningState())
        cascade = classifier.cascade
        return {
            "route": classifier.route,
            "bound": cascade.bound,
            "confidence": cascade.confidence,
            "over_texts": cascade.over_texts,
            "thresholds": [
                {"version": int(key.version), "threshold": found.threshold, "reason": found.reason}
                for key, found in self._estimates.list_current(classifier).items()
            ],
            "labels": await self.store.count_labels(classifier.target),
            "learning": {"phase": state.phase, "candidate": state.candidate, "tests": state.tests},
            "news": list(state.news),
            "days": [{"day": format_day(one.day), "route": one.route, **one.to_json()} for one in days],
        }

    async def start_training(self, name: str) -> TrainingStarted:
        """Train a candidate now. Raises NotFound, RequestError, Busy."""
        classifier = self._classifiers().get(f"classifier/{name}")
        if classifier is None:
            raise NotFound(f"no route begins a cascade with classifier/{name[:80]}: add one to the policy")
        await self._flush()
        async with self._changing:
            state = await self._candidates.start_training(
                classifier, self._states.get(classifier.target, LearningState())
            )
            await self._save(classifier.target, state)
        return {"name": name, "phase": state.phase, "news": list(state.news[:1])}

    async def forget_classifier(self, name: str) -> None:
        """A classifier was removed with all its versions: what was learned for it goes too."""
        target = f"classifier/{name}"
        self._states.pop(target, None)
        self._estimates.remove(target)
        await self.store.remove_classifier(target)

    @property
    def thresholds(self) -> Mapping[ThresholdKey, CascadeThresholds]:
        return self._estimates.known

    # What is done in rounds.

    async def run_round(self) -> None:
        """One round. Raises where labels cannot be kept; what cannot be done of the rest is tried again next time."""
        await self._flush()
        for classifier in self._classifiers().values():
            try:
                candidate = self._states.get(classifier.target, LearningState()).candidate
                await self._estimates.estimate(classifier, candidate)
                async with self._changing:
                    before = self._states.get(classifier.target, LearningState())
                    await self._save(classifier.target, await self._candidates.advance(classifier, before))
            except ApplianceError as error:
                _log.warning("a classifier was not looked after", classifier=classifier.target, reason=error.message)
        now = self._wall()
        if now - self._pruned_at >= _PRUNE_SECONDS:
            self._pruned_at = now
            before_at = now - self._rules.retention_days * SECONDS_PER_DAY
            await self.store.prune(list(self._classifiers()), before_at, self._rules.max_texts)

    async def _save(self, classifier: str, state: LearningState) -> None:
        before = self._states.get(classifier, LearningState())
        if state != before:
            self._states[classifier] = state
            await self.store.save_state(classifier, state)
            if state.news != before.news:
                _log.info("classifier learns", classifier=classifier, news=state.news[0])

    async def _flush(self) -> None:
        rows, days = self._rows, self._days
        if not rows and not days:
            return
        self._rows, self._days = [], {}
        try:
            await self.store.add_labels(rows, list(days.values()))
        except ApplianceError:
            self._rows = (rows + self._rows)[-_MAX_UNWRITTEN_LABELS:]
            for place, day in days.items():
                self._days[place] = self._days[place] + day if place in self._days else day
            raise
