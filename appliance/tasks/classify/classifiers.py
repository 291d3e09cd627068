"""Decisions put to a classifier that was trained here: `model: "classifier/NAME"`.

A classifier answers one question, a choice among its labels. The question may name some of them (their probabilities
then add up to 1) or leave `choices` out, and the whole question may be left out: its labels are the choices.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from appliance.core import Target, UpstreamCall
from appliance.errors import BackendGarbage, RequestError, Unsupported
from appliance.tasks.decisions.inputs import Input
from appliance.tasks.decisions.questions import Option, Question, QuestionResult

PREFIX: Final = "classifier/"
PATH: Final = "/classify"
INPUTS_PER_CALL: Final = 1_024
_SHOWN_LABELS: Final = 10

OPEN: Final = Question("choice", None, "Which label is right?", ())
"""Stands for the question that was left out: no options are its classifier's labels."""


def names_classifier(model: object) -> bool:
    """Whether a body names a classifier as its model."""
    return isinstance(model, str) and model.startswith(PREFIX)


def drop_choices(row: object) -> bool:
    """Whether a question of a body is a choice that leaves its choices to the classifier."""
    return isinstance(row, Mapping) and row.get("type") == "choice" and not (row.get("choices") or row.get("criteria"))


def count_tokens(inputs: Sequence[Input]) -> int:
    """An estimate, as the classifier itself reports it."""
    return sum(len(text.text) // 4 + 1 for text in inputs)


def make_classify_call(target: Target, inputs: Sequence[Input], questions: Sequence[Question]) -> UpstreamCall:
    """Raises Unsupported for what a classifier cannot be asked."""
    if len(questions) != 1 or questions[0].kind != "choice":
        raise Unsupported(
            f"{target.name} answers one question, a choice among its labels; ask another model for the others",
            param="questions",
        )
    return UpstreamCall(PATH, {"texts": [text.text for text in inputs]})


def read_version(payload: object) -> str | None:
    """Which version answered, as a variant is written."""
    number = payload.get("version") if isinstance(payload, dict) else None
    return str(number) if isinstance(number, int) else None


def read_classification(
    target: Target, payload: object, questions: Sequence[Question], inputs: int, *, every_label: bool = False
) -> list[tuple[QuestionResult, ...]]:
    """A row for each input. Raises BackendGarbage for a broken reply, and Unsupported where a choice is no label, or,
    with `every_label`, where a label is no choice."""
    if not isinstance(payload, dict):
        raise BackendGarbage(f"{target.name} did not answer with an object")
    labels, rows, strange = payload.get("labels"), payload.get("probabilities"), payload.get("out_of_scope")
    if not (isinstance(labels, list) and isinstance(rows, list) and isinstance(strange, list)):
        raise BackendGarbage(f"{target.name} did not answer with labels and probabilities")
    if len(rows) != inputs or len(strange) != inputs:
        raise BackendGarbage(f"{target.name} answered {len(rows)} of {inputs} texts")
    if any(len(row) != len(labels) for row in rows):
        raise BackendGarbage(f"{target.name} has {len(labels)} labels and did not answer with as many probabilities")
    (question,) = questions
    if not question.options:
        options = tuple(Option(label) for label in labels)
        return [
            (QuestionResult(tuple(row), options=options, ood_score=score),)
            for row, score in zip(rows, strange, strict=True)
        ]
    places = _places(target, question, labels)
    if every_label and len(places) < len(labels):
        raise Unsupported(
            f"the question has {len(places)} of the {len(labels)} labels of {target.name}: name them all",
            param="questions",
        )
    return [(_of_some(row, places, score),) for row, score in zip(rows, strange, strict=True)]


def _of_some(row: Sequence[float], places: Sequence[int], ood_score: float) -> QuestionResult:
    shares = [row[place] for place in places]
    total = math.fsum(shares)
    if total <= 0:
        shares, total = [1.0] * len(places), float(len(places))
    return QuestionResult(tuple(share / total for share in shares), ood_score=ood_score)


def _places(target: Target, question: Question, labels: Sequence[str]) -> Sequence[int]:
    known = {label: place for place, label in enumerate(labels)}
    for option in question.options:
        if not isinstance(option.value, str) or option.value not in known:
            shown = ", ".join(map(repr, labels[:_SHOWN_LABELS]))
            more = f" and {len(labels) - _SHOWN_LABELS} more" if len(labels) > _SHOWN_LABELS else ""
            raise Unsupported(
                f"{option.value!r} is not a label of {target.name}, which has {shown}{more}: leave choices out, "
                "or name some of those",
                param="questions",
            )
    return [known[str(option.value)] for option in question.options]


def read_open_question(rows: object) -> Question | None:
    """The open question that `questions` of a body leaves to the classifier, or None where it is spelt out."""
    if rows is None:
        return OPEN
    row = rows[0] if isinstance(rows, list) and len(rows) == 1 else None
    if not drop_choices(row):
        return None
    assert isinstance(row, Mapping)
    name, instructions = row.get("name"), row.get("instructions")
    if name is not None and not isinstance(name, str):
        raise RequestError(f"questions[0].name is {name!r:.40}: it must be a string", param="questions[0].name")
    said = instructions if isinstance(instructions, str) and instructions.strip() else OPEN.instructions
    return Question("choice", name, said, ())
