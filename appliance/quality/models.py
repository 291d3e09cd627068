"""What is known of a classifier's traffic, and how far its learning is. Frozen values."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

FEEDBACK = "feedback"
"""The source of labels that callers give."""

Phase = Literal["idle", "training", "shadow"]


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text that somebody better has labelled. Fields as the table `labelled` has them."""

    decision_id: str
    index: int
    classifier: str
    route: str
    owner: str
    residency: str
    version: str | None
    own: str | None
    own_confidence: float
    label: str
    source: str
    audited: bool
    text: str | None
    at: float

    @property
    def is_right(self) -> bool:
        return self.own == self.label


@dataclass(frozen=True, slots=True)
class DailyTraffic:
    """Numbers of texts of one classifier on one route in one UTC day."""

    classifier: str
    route: str
    day: int
    texts: int = 0
    local: int = 0
    """Answered by the classifier."""
    went_on: int = 0
    capped: int = 0
    """Unsure, and the rate of escalations was used up."""
    audited: int = 0
    agreed: int = 0
    feedback: int = 0

    def __add__(self, other: "DailyTraffic") -> "DailyTraffic":
        sums = {name: getattr(self, name) + getattr(other, name) for name in COUNTS}
        return DailyTraffic(self.classifier, self.route, self.day, **sums)

    def to_json(self) -> Mapping[str, Any]:
        counts: dict[str, Any] = {name: getattr(self, name) for name in COUNTS}
        counts["local_share"] = round(self.local / self.texts, 4) if self.texts else None
        counts["agreement"] = round(self.agreed / self.audited, 4) if self.audited else None
        return counts


COUNTS = tuple(field.name for field in fields(DailyTraffic) if field.name not in ("classifier", "route", "day"))


@dataclass(frozen=True, slots=True)
class LearningState:
    """How far the learning of one classifier is."""

    phase: Phase = "idle"
    examples_trained: int = 0
    """Labelled texts there were at the last training."""
    candidate: int | None = None
    tests: int = 0
    tested_rows: int = 0
    news: tuple[str, ...] = ()
    """What happened last, newest first."""
