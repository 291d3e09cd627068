"""Decisions put to a target that speaks OpenAI's `/decisions` itself: the request, and reading its answers."""

import math
from collections.abc import Sequence

import orjson

from appliance.core import UpstreamCall
from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.errors import BackendGarbage
from appliance.tasks.decisions.inputs import Input
from appliance.tasks.decisions.questions import Question, QuestionResult

PATH = "/decisions"


def make_decision_call(text: Input, questions: Sequence[JsonObject], extras: JsonObject) -> UpstreamCall:
    """One request about one input. `questions` are on OpenAI's wire; `extras` are the caller's other fields."""
    return UpstreamCall(PATH, {**extras, "input": text.original, "questions": list(questions)})


def write_openai_questions(questions: Sequence[Question]) -> Sequence[JsonObject]:
    """Questions in OpenAI's shape, for those that came in another."""
    return [_wired(question) for question in questions]


def _wired(question: Question) -> JsonObject:
    openai_questions: MutableJsonObject = {"type": question.kind, "instructions": _with_examples(question)}
    if question.name is not None:
        openai_questions["name"] = question.name
    if question.kind == "predicate":
        meanings = [
            f"{answer} means: {option.description}"
            for answer, option in zip(("True", "False"), question.options, strict=True)
            if option.description
        ]
        openai_questions["instructions"] = "\n".join((openai_questions["instructions"], *meanings))
        return openai_questions
    field, key = ("choices", "value") if question.kind == "choice" else ("levels", "label")
    openai_questions[field] = [
        {key: option.value} if option.description is None else {key: option.value, "description": option.description}
        for option in question.options
    ]
    return openai_questions


def _with_examples(question: Question) -> str:
    """The instructions, and the examples below them: the wire has no field for those."""
    rows = [
        f"{orjson.dumps(example.text).decode()} -> {orjson.dumps(question.options[example.option].value).decode()}"
        for example in question.examples
    ]
    return "\n".join((question.instructions, *(("Examples:", *rows) if rows else ())))


def read_answers(payload: object, questions: Sequence[Question]) -> tuple[QuestionResult, ...]:
    """The answers of one reply, in question order. Raises BackendGarbage where they are not what was asked for."""
    answers = payload.get("answers") if isinstance(payload, dict) else None
    if not isinstance(answers, list) or len(answers) != len(questions):
        raise BackendGarbage(f"the target's reply does not have {len(questions)} answers")
    return tuple(_read_question_result(answer, question) for answer, question in zip(answers, questions, strict=True))


def _read_question_result(answer: object, question: Question) -> QuestionResult:
    if not isinstance(answer, dict) or answer.get("type") not in (question.kind, "refusal"):
        raise BackendGarbage(f"an answer of the target is not of type {question.kind!r}")
    if answer["type"] == "refusal":
        return QuestionResult(None)
    mass = answer.get("label_mass")
    label_mass = float(mass) if isinstance(mass, int | float) else None
    if question.kind == "predicate":
        probability = _probability(answer.get("probability"))
        return QuestionResult((probability, 1.0 - probability), label_mass)
    key = "value" if question.kind == "choice" else "label"
    rows = answer.get("probabilities")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BackendGarbage("an answer of the target has no probabilities")
    # Keyed by type too: the string "true" and the boolean are different choices, and True == 1 in Python.
    given = {(type(row.get(key)), str(row.get(key))): _probability(row.get("probability")) for row in rows}
    probabilities = [given.get((type(option.value), str(option.value)), 0.0) for option in question.options]
    total = math.fsum(probabilities)
    if total <= 0:
        raise BackendGarbage("the probabilities of the target's answer are not about the options that were asked for")
    return QuestionResult(tuple(probability / total for probability in probabilities), label_mass)


def _probability(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1.000001:
        raise BackendGarbage(f"{value!r:.40} in the target's answer is not a probability")
    return min(1.0, float(value))
