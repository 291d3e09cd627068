"""What is known of a classifier's traffic, and how far its learning is. Frozen values."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, TypedDict

FEEDBACK = "feedback"
"""The source of labels that callers give."""

Phase = Literal["idle", "training", "shadow"]


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text that a better model, or feedback, has labelled. Fields as the table `labelled` has them."""

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

    def to_json(self) -> Mapping[str, float | None]:
        counts: dict[str, float | None] = {name: getattr(self, name) for name in COUNTS}
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


# What the encoder program answers.


class ShadowReply(TypedDict):
    """What the candidate in shadow has seen."""

    version: int
    texts: int
    disagreed: int


class ClassifierReply(TypedDict):
    serving: int
    versions: list[int]
    labels: list[str]
    shadow: ShadowReply | None


class TrainingReply(TypedDict):
    state: str
    """running, done, or how it failed."""
    error: str | None
    version: int | None


class SampleThreshold(TypedDict):
    """What one sample allows."""

    rows: int
    is_enough: bool
    threshold: float | None
    """None: no threshold keeps the bound on it."""


class ThresholdReply(TypedDict):
    held_out: SampleThreshold
    live: SampleThreshold
    """Audited traffic."""


# What callers are answered.


class FeedbackReceipt(TypedDict):
    decision_id: str
    index: int
    classifier: str
    answered: str | None
    """What the classifier had answered; None where it was not asked."""


class TrainingStarted(TypedDict):
    name: str
    phase: Phase
    news: list[str]
