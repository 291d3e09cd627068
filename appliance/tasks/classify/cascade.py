"""A cascade's answers, text by text: which of them may stand, who gave each, and their combined result. Pure.

The classifier's answer to a text stands from a threshold of confidence on, and never where the text is out of its
scope; a model's stands from a fixed confidence on, and not where its label mass is low; the last step's always stands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from appliance.core import Usage
from appliance.errors import ApplianceError
from appliance.tasks.decisions.confidence import UNSURE_LABEL_MASS
from appliance.tasks.decisions.decision_results import DecisionResult, Row
from appliance.tasks.decisions.openai_shape import DecisionsCall
from appliance.tasks.decisions.questions import Question, QuestionResult


@dataclass(frozen=True, slots=True)
class CascadeThresholds:
    """From which confidence on a version's answers stand on one route; None: not known, and `reason` says why."""

    threshold: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class CascadeText:
    """One text that went through a cascade. `own` is what the classifier said, None where it was not asked."""

    index: int
    text: str
    """Empty where the route keeps no texts."""
    own: str | None
    classifier_confidence: float
    """0 for a text out of scope: such an answer never stands."""
    answer: str | None
    """What the caller was told; None where nobody knew."""
    answered_by: str
    is_sure: bool
    """Whether whoever answered was sure of it, or is the route's last step: what the others learn from."""
    went_on: bool
    audited: bool
    is_reference: bool
    """Whether the last step answered it."""
    capped: bool = False


@dataclass(frozen=True, slots=True)
class CascadeCall:
    """What a request's cascade came to."""

    route: str
    classifier: str
    version: str | None
    decision_id: str
    owner: str
    residency: str
    keep_texts: bool
    at: float
    """Wall clock, seconds since the epoch."""
    rows: tuple[CascadeText, ...]


def is_classifier_question(questions: Sequence[Question]) -> bool:
    """Whether a classifier could ever answer these: one choice among texts."""
    if len(questions) != 1 or questions[0].kind != "choice":
        return False
    return all(isinstance(option.value, str) for option in questions[0].options)


def make_classifier_call(call: DecisionsCall) -> DecisionsCall:
    """The call as the classifier is to be asked: for all of its labels or not at all, for its confidence is of them."""
    return replace(call, render=None, for_classifier=True, every_label=True)


def select_inputs(call: DecisionsCall, places: Sequence[int]) -> DecisionsCall:
    """The same questions about some of the inputs."""
    return replace(call, inputs=tuple(call.inputs[place] for place in places), render=None)


def join_calls(calls: Sequence[DecisionsCall]) -> DecisionsCall:
    """Calls that one was cut into, as one again."""
    return replace(calls[0], inputs=tuple(one for call in calls for one in call.inputs), render=None)


def classifier_confidence(row: Row) -> float:
    """Of a classifier's answer; 0 where the text is out of scope or there is no answer."""
    if isinstance(row, ApplianceError) or row[0].probabilities is None:
        return 0.0
    return 0.0 if is_out_of_scope(row) else row[0].confidence


def is_out_of_scope(row: Row) -> bool:
    return not isinstance(row, ApplianceError) and (row[0].ood_score or 0.0) > 0


def chosen_label(row: Row, questions: Sequence[Question]) -> str | None:
    """The label that a row chooses; None where it chooses none that is a text."""
    if isinstance(row, ApplianceError) or row[0].probabilities is None or questions[0].kind != "choice":
        return None
    value = (row[0].options or questions[0].options)[row[0].chosen].value
    return value if isinstance(value, str) else None


def is_sure(row: Row, below_confidence: float) -> bool:
    """Whether a model's answer to one text is sure in all of its parts. A text that failed is not."""
    if isinstance(row, ApplianceError):
        return False
    return all(_is_sure(question_result, below_confidence) for question_result in row)


def _is_sure(question_result: QuestionResult, below_confidence: float) -> bool:
    if question_result.probabilities is None:
        return False
    has_mass = question_result.label_mass is None or question_result.label_mass >= UNSURE_LABEL_MASS
    return question_result.confidence >= below_confidence and has_mass


@dataclass(frozen=True, slots=True)
class CascadeAnswer:
    """A text's answer so far, and who gave it."""

    row: Row
    target: str
    model: str
    location: str
    unsure: bool = False


def merge_answers(given: Sequence[CascadeAnswer], usage: Usage) -> DecisionResult:
    """One result of rows from several targets; every answer names its target."""
    models = ", ".join(dict.fromkeys(one.model for one in given))
    targets = ", ".join(dict.fromkeys(one.target for one in given))
    return DecisionResult(models, tuple(_signed(one) for one in given), usage, targets)


def _signed(one: CascadeAnswer) -> Row:
    if isinstance(one.row, ApplianceError):
        return one.row
    return tuple(
        replace(question_result, answered_by=one.target, unsure=one.unsure or question_result.unsure)
        for question_result in one.row
    )


def split_result(result: DecisionResult, calls: Sequence[DecisionsCall]) -> list[DecisionResult | ApplianceError]:
    """The rows given back to the calls they are of; a call whose rows all failed is their error. What was used stands
    with the first."""
    results: list[DecisionResult | ApplianceError] = []
    at, usage = 0, result.usage
    for call in calls:
        rows = result.rows[at : at + len(call.inputs)]
        at += len(call.inputs)
        failed = [row for row in rows if isinstance(row, ApplianceError)]
        if len(failed) == len(rows):
            results.append(failed[0])
            continue
        results.append(replace(result, rows=rows, usage=usage))
        usage = Usage()
    return results


def count_by_target(given: Sequence[CascadeAnswer]) -> Mapping[str, int]:
    """How many texts each target answered."""
    counts: dict[str, int] = {}
    for one in given:
        if not isinstance(one.row, ApplianceError):
            counts[one.target] = counts.get(one.target, 0) + 1
    return counts
