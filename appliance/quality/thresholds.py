"""From which confidence on a classifier's answers stand. Requests read what is known; rounds estimate it anew."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from appliance.config import CascadeRule
from appliance.core import HealthAlerts
from appliance.errors import ApplianceError, RequestError
from appliance.quality.candidates import CandidateProgram, CascadeClassifier
from appliance.quality.rules import combine_thresholds
from appliance.quality.store import LearningStore
from appliance.tasks.classify.cascade import CascadeThresholds

_UNPROVEN: Final = "cascade_unproven"
"""The health page's code for a cascade whose bound no threshold keeps."""


class ThresholdKey(NamedTuple):
    """What a threshold is estimated for."""

    classifier: str
    version: str
    bound: float
    confidence: float
    over_texts: int

    @classmethod
    def of(cls, cascade: CascadeRule, classifier: str, version: str) -> "ThresholdKey":
        return cls(classifier, version, cascade.bound, cascade.confidence, cascade.over_texts)


class ThresholdEstimates:
    """`wake` is set where there is something to estimate; `estimate` does it."""

    def __init__(
        self,
        store: LearningStore,
        program: CandidateProgram,
        alerts: HealthAlerts,
        is_served: Callable[[str], bool],
        wake: asyncio.Event,
    ) -> None:
        self._store, self._program, self._alerts = store, program, alerts
        self._is_served, self._wake = is_served, wake
        self._stale: set[ThresholdKey] = set()
        self._versions: dict[str, str] = {}
        """The version of each classifier that answered last."""
        self.known: dict[ThresholdKey, CascadeThresholds] = {}

    def get(self, cascade: CascadeRule, classifier: str, version: str | None) -> CascadeThresholds:
        if version is None:
            return CascadeThresholds(None, "its version is not known")
        self._versions[classifier] = version
        key = ThresholdKey.of(cascade, classifier, version)
        known = self.known.get(key)
        if known is None:
            self._stale.add(key)
            self._wake.set()
            return CascadeThresholds(None, "no threshold was estimated yet")
        return known

    def mark_stale(self, classifier: str | None = None) -> None:
        """Labels came or went: what was estimated holds until it is estimated anew. None: of all classifiers."""
        self._stale |= {key for key in self.known if classifier in (None, key.classifier)}
        self._wake.set()

    def remove(self, classifier: str) -> None:
        self._versions.pop(classifier, None)
        self._stale = {key for key in self._stale if key.classifier != classifier}
        self.known = {key: found for key, found in self.known.items() if key.classifier != classifier}

    def list_current(self, classifier: CascadeClassifier) -> Mapping[ThresholdKey, CascadeThresholds]:
        """Those for what its cascade demands now, by version."""
        return {
            key: found
            for key, found in self.known.items()
            if key == ThresholdKey.of(classifier.cascade, classifier.target, key.version)
        }

    async def estimate(self, classifier: CascadeClassifier, candidate: int | None) -> None:
        """The thresholds of the serving version and the candidate, where labels came or none is known."""
        if classifier.target not in self._versions and not await self._look_up_version(classifier):
            return
        stale = {key for key in self._stale if key.classifier == classifier.target}
        if candidate is not None:
            stale |= {ThresholdKey.of(classifier.cascade, classifier.target, str(candidate))} - set(self.known)
        for key in stale:
            # Labels that come meanwhile make it stale again.
            self._stale.discard(key)
            try:
                self.known[key] = await self._estimate_one(classifier, key)
            except RequestError:
                self.known.pop(key, None)  # that version is no more
            except ApplianceError:
                self._stale.add(key)
                raise
        self._update_alert(classifier)

    async def _look_up_version(self, classifier: CascadeClassifier) -> bool:
        """So that the first text need not wait for a threshold. The program is not started only to find nothing."""
        found = await self._program.get_classifier(classifier.name) if self._is_served(classifier.target) else None
        if found is None:
            return False
        self.get(classifier.cascade, classifier.target, str(found["serving"]))
        return True

    async def _estimate_one(self, classifier: CascadeClassifier, key: ThresholdKey) -> CascadeThresholds:
        live, complaints = await self._store.list_scores(key.classifier, key.version)
        body = {
            "version": int(key.version),
            "bound": key.bound,
            "confidence": key.confidence,
            "over_texts": key.over_texts,
            "live": live,
            "complaints": complaints,
        }
        return combine_thresholds(await self._program.estimate_threshold(classifier.name, body), key.bound)

    def _update_alert(self, classifier: CascadeClassifier) -> None:
        version = self._versions[classifier.target]
        found = self.known.get(ThresholdKey.of(classifier.cascade, classifier.target, version))
        if found is None or found.threshold is not None:
            self._alerts.clear(_UNPROVEN, classifier.route)
            return
        below = (
            "every text goes on"
            if classifier.cascade.until_known == "escalate"
            else f"those below {classifier.cascade.below_confidence:g} go on, and nothing is promised"
        )
        self._alerts.warn(_UNPROVEN, f"route {classifier.route!r}: {found.reason}; {below}", classifier.route)
