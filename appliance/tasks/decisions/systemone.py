"""Decisions in TypeSafe's shape: `POST /v1/systemone`.

Request: {model, state: text or JSON, questions: {id: {type, instructions, criteria}}} with type `noul` (criteria
optional {true, false}), `choice` (criteria {option: description or null}) or `score` (criteria [level, ...] from the
lowest). Response: {model, answers: {id: answer}, usage}. Levels are numbered from 0, as strings, in `legend` and
`probabilities`. A question that the model declined to answer is missing from `answers`. `label_mass`, `unsure` and
`calibrated_for` are ours, and so are the request's `examples`, `debias`, `calibrate`, `layout` and `task`: see
decisions.py.
"""

from collections.abc import Sequence
from dataclasses import replace

import orjson

from appliance.core import ParsedRequest
from appliance.core.json_types import JsonObject
from appliance.errors import RequestError
from appliance.tasks.classify import classifiers
from appliance.tasks.decisions.decision_options import Priors, Tasks, read_decision_options
from appliance.tasks.decisions.decision_results import DecisionResult, require_single_row
from appliance.tasks.decisions.examples import attach_examples
from appliance.tasks.decisions.inputs import Input
from appliance.tasks.decisions.openai_decisions import write_openai_questions
from appliance.tasks.decisions.openai_shape import DecisionsCall, make_call, make_parsed_request
from appliance.tasks.decisions.questions import (
    MAX_CHOICES,
    MAX_LEVELS,
    MAX_QUESTIONS,
    PREDICATE,
    Option,
    Question,
    QuestionResult,
    require_unique_options,
)
from appliance.wire.strict_fields import missing, read_object, refuse_other_contract, wrong
from appliance.wire.usage import write_responses_usage


def read_systemone_request(
    body: JsonObject, tasks: Tasks | None = None, priors: Priors | None = None
) -> tuple[ParsedRequest, Sequence[DecisionsCall]]:
    """Check a System One body, as `decisions.read` does. Raises RequestError naming field, value and remedy."""
    others = {"input": "/v1/decisions", "inputs": "/v1/decisions/batch"}
    refuse_other_contract(body, "/v1/systemone", "state", others)
    questions = read_systemone_questions(body)
    text = _content(body["state"], "state")
    call = make_call((Input(text, text),), questions, write_openai_questions(questions), {}, _payload)
    call = replace(
        call,
        options=read_decision_options(body, questions, tasks),
        priors=priors or call.priors,
        for_classifier=classifiers.names_classifier(body.get("model")),
    )
    return make_parsed_request(body, call), (call,)


def read_systemone_questions(body: JsonObject) -> tuple[Question, ...]:
    """A classifier's question need not be spelt out; one that is left out is called `label`."""
    given = body.get("questions")
    if classifiers.names_classifier(body.get("model")):
        if given is None:
            return (replace(classifiers.OPEN, name="label"),)
        if isinstance(given, dict) and len(given) == 1:
            ((name, row),) = given.items()
            left_open = classifiers.read_open_question([row])
            if left_open is not None:
                return (replace(left_open, name=name),)
    return attach_examples(body, _read_questions(given))


def _read_questions(value: object) -> tuple[Question, ...]:
    if value is None:
        raise missing("questions", "it must be an object: {id: {type, instructions, criteria}}")
    rows = read_object(value, "questions", "{id: {type, instructions, criteria}}")
    if not 1 <= len(rows) <= MAX_QUESTIONS:
        raise RequestError(f"questions has {len(rows)} questions: it must have 1 to {MAX_QUESTIONS}", param="questions")
    return tuple(_read_question(name, row, f"questions.{name}") for name, row in rows.items())


def _read_question(name: str, row: object, path: str) -> Question:
    question = read_object(row, path, "with type and instructions")
    kind = question.get("type")
    if kind not in ("noul", "choice", "score"):
        raise wrong(f"{path}.type", kind, "it must be noul, choice or score")
    instructions = _content(question.get("instructions"), f"{path}.instructions")
    criteria, place = question.get("criteria"), f"{path}.criteria"
    if kind == "noul":
        return Question("predicate", name, instructions, _read_noul(criteria, place))
    if kind == "choice":
        return Question("choice", name, instructions, _read_choice(criteria, place))
    return Question("score", name, instructions, _read_score(criteria, place))


def _content(value: object, path: str) -> str:
    """Text, or JSON shown as text."""
    if value is None:
        raise missing(path, "it must be text or JSON")
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    if not text.strip():
        raise RequestError(f"{path} is empty: it must be text or JSON", param=path)
    return text


def _read_noul(criteria: object, path: str) -> tuple[Option, ...]:
    if criteria is None:
        return PREDICATE
    rows = read_object(criteria, path, '{"true": ..., "false": ...}')
    for key in rows:
        if key not in ("true", "false"):
            raise wrong(path, key, "it may describe only true and false")
    return (
        Option(True, _description(rows.get("true"), f"{path}.true")),
        Option(False, _description(rows.get("false"), f"{path}.false")),
    )


def _read_choice(criteria: object, path: str) -> tuple[Option, ...]:
    rows = read_object(criteria, path, "{option: description or null}")
    if not 2 <= len(rows) <= MAX_CHOICES:
        raise RequestError(f"{path} has {len(rows)} options: it must have 2 to {MAX_CHOICES}", param=path)
    options = [Option(value, _description(text, f"{path}.{value}")) for value, text in rows.items()]
    return require_unique_options(options, path)


def _read_score(criteria: object, path: str) -> tuple[Option, ...]:
    if not isinstance(criteria, list):
        raise wrong(path, criteria, f"it must be a list of 2 to {MAX_LEVELS} levels, from the lowest")
    if not 2 <= len(criteria) <= MAX_LEVELS:
        raise RequestError(f"{path} has {len(criteria)} levels: it must have 2 to {MAX_LEVELS}", param=path)
    return require_unique_options([Option(_content(row, f"{path}[{i}]")) for i, row in enumerate(criteria)], path)


def _description(value: object, path: str) -> str | None:
    return None if value is None else _content(value, path)


def _payload(result: DecisionResult, questions: Sequence[Question]) -> JsonObject:
    row = require_single_row(result)
    return {
        "model": result.model,
        "answers": {
            question.name: _answer(question_result, question)
            for question_result, question in zip(row, questions, strict=True)
            if question_result.probabilities is not None
        },
        "usage": write_responses_usage(result.usage),
    }


def _answer(question_result: QuestionResult, question: Question) -> JsonObject:
    shares = question_result.probabilities
    assert shares is not None
    tail = question_result.extra_fields
    if question.kind == "predicate":
        return {"type": "noul", "noul": shares[0], **tail}
    values = [str(option.value) for option in question_result.options or question.options]
    if question.kind == "choice":
        return {
            "type": "choice",
            "choice": values[question_result.chosen],
            "probabilities": dict(zip(values, shares, strict=True)),
            "confidence": question_result.confidence,
            **tail,
        }
    return {
        "type": "score",
        "score": question_result.score,
        "legend": {str(level): value for level, value in enumerate(values)},
        "probabilities": {str(level): share for level, share in enumerate(shares)},
        "confidence": question_result.confidence,
        **tail,
    }
