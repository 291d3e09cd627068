"""A cascade's texts: which of them are examples, what they add to their day, and the recent ones. No I/O."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from appliance.config import Policy
from appliance.quality.candidates import CascadeClassifier
from appliance.quality.models import DailyTraffic, Labelled
from appliance.tasks.classify.cascade import CascadeCall, CascadeText

SECONDS_PER_DAY: Final = 86_400
_MOST_TEXT_CHARS: Final = 20_000
"""Longer texts are no examples: training refuses them, and with them all the others."""

_RECENT_TEXTS: Final = 50_000
"""Answers that feedback may still be given to without their text; older ones where they were labelled anyway."""
_RECENT_CHARACTERS: Final = 20_000_000
"""Of texts that are kept in memory for that."""


def find_cascade_classifiers(policy: Policy) -> Mapping[str, CascadeClassifier]:
    """The cascades of a policy by classifier; of several routes that begin with the same one, the first."""
    found: dict[str, CascadeClassifier] = {}
    for route in policy.routes:
        if route.cascade is not None:
            name = route.targets[0].partition("/")[2]
            classifier = CascadeClassifier(name, route.name, route.cascade, route.keep_texts)
            found.setdefault(classifier.target, classifier)
    return found


def is_example(call: CascadeCall, row: CascadeText) -> bool:
    """Whether a better model has labelled the text, so that a classifier can learn from it."""
    if row.answer is None or row.answered_by == call.classifier:
        return False
    return row.audited or (call.keep_texts and row.is_sure)


def make_label(call: CascadeCall, row: CascadeText) -> Labelled:
    return Labelled(
        decision_id=call.decision_id,
        index=row.index,
        classifier=call.classifier,
        route=call.route,
        owner=call.owner,
        residency=call.residency,
        version=call.version,
        own=row.own,
        own_confidence=row.classifier_confidence,
        label=row.answer or "",
        source=row.answered_by,
        audited=row.audited,
        text=row.text if call.keep_texts and row.text else None,
        at=call.at,
    )


def count_traffic(call: CascadeCall) -> DailyTraffic:
    rows: Sequence[CascadeText] = call.rows
    return DailyTraffic(
        classifier=call.classifier,
        route=call.route,
        day=int(call.at // SECONDS_PER_DAY),
        texts=len(rows),
        local=sum(row.answered_by == call.classifier for row in rows),
        went_on=sum(row.went_on for row in rows),
        capped=sum(row.capped for row in rows),
        audited=sum(row.audited for row in rows),
        agreed=sum(row.audited and row.own == row.answer for row in rows),
    )


def format_day(day: int) -> str:
    return datetime.fromtimestamp(day * SECONDS_PER_DAY, UTC).date().isoformat()


def drop_unusable_text(row: CascadeText) -> CascadeText:
    """Without its text where that can be no example."""
    return row if len(row.text) <= _MOST_TEXT_CHARS and row.text.strip() else replace(row, text="")


class RecentCalls:
    """The last cascades by decision, as many as memory is granted for."""

    def __init__(self) -> None:
        self.calls: OrderedDict[str, CascadeCall] = OrderedDict()
        self.texts = self.characters = 0

    def add(self, call: CascadeCall) -> None:
        self.calls[call.decision_id] = call
        self._count(call, 1)
        while len(self.calls) > 1 and (self.texts > _RECENT_TEXTS or self.characters > _RECENT_CHARACTERS):
            _, oldest = self.calls.popitem(last=False)
            self._count(oldest, -1)

    def get(self, decision_id: str) -> CascadeCall | None:
        return self.calls.get(decision_id)

    def remove_owner(self, owner: str) -> None:
        for decision_id in [name for name, call in self.calls.items() if call.owner == owner]:
            self._count(self.calls.pop(decision_id), -1)

    def _count(self, call: CascadeCall, times: int) -> None:
        self.texts += times * len(call.rows)
        self.characters += times * sum(len(row.text) for row in call.rows)
