"""Labelled examples in bodies: the few that are shown to the model with a question, and the many of a calibration.

`examples` of a decision: [{input, label}], or [{input, labels: {question's name: label}}] where there are several
questions; an example need not answer all of them. They are put before every text, so an engine computes them once.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from appliance.core.json_types import JsonObject
from appliance.errors import RequestError
from appliance.tasks.decisions.inputs import read_input
from appliance.tasks.decisions.questions import Example, Question
from appliance.wire.strict_fields import missing, read_list, read_object, wrong

MAX_EXAMPLES: Final = 400
"""Five for each of the 77 labels of a large set; contexts of small models end long before."""
_SHOWN_OPTIONS: Final = 8


def attach_examples(body: JsonObject, questions: Sequence[Question], field: str = "examples") -> tuple[Question, ...]:
    """The questions, each with the examples in `field` that answer it. Raises RequestError naming the place."""
    given = body.get(field)
    if given is None:
        return tuple(questions)
    rows = read_list(given, field, 1, MAX_EXAMPLES, "examples")
    shown: list[list[Example]] = [[] for _ in questions]
    for index, given_row in enumerate(rows):
        path = f"{field}[{index}]"
        row = read_object(given_row, path, "with input and label")
        text = read_input(row.get("input"), f"{path}.input").text
        _refuse_unknown(row, questions, path)
        for place, question in enumerate(questions):
            if "label" in row or question.name in (row.get("labels") or ()):
                shown[place].append(Example(text, read_label(row, question, questions, path)))
    return tuple(replace(question, examples=tuple(rows)) for question, rows in zip(questions, shown, strict=True))


def read_label(row: JsonObject, question: Question, questions: Sequence[Question], path: str) -> int:
    """The index of the option that an example says is right."""
    if len(questions) == 1 and "label" in row:
        place, given = f"{path}.label", row["label"]
    else:
        labels = read_object(row.get("labels"), f"{path}.labels", "question's name -> label")
        if question.name is None or question.name not in labels:
            raise missing(f"{path}.labels.{question.name}", "every question needs a name, and each example its label")
        place, given = f"{path}.labels.{question.name}", labels[question.name]
    for index, option in enumerate(question.options):
        if type(option.value) is type(given) and option.value == given:
            return index
    known = ", ".join(repr(option.value) for option in question.options[:_SHOWN_OPTIONS])
    raise wrong(place, given, f"it must be one of the question's options: {known}")


def _refuse_unknown(row: JsonObject, questions: Sequence[Question], path: str) -> None:
    for name in row:
        if name not in ("input", "label", "labels"):
            raise RequestError(f"{path}.{name} is not known: an example has input and label", param=f"{path}.{name}")
    if "label" not in row and "labels" not in row:
        raise missing(f"{path}.label", "give the right answer")
    for name in read_object(row.get("labels") or {}, f"{path}.labels", "question's name -> label"):
        if all(question.name != name for question in questions):
            raise wrong(f"{path}.labels", name, "no question has this name")
