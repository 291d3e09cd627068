"""What decisions came to, and the response in OpenAI's shape. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from appliance.core import Usage
from appliance.core.json_types import JsonObject
from appliance.errors import ApplianceError
from appliance.tasks.decisions.probabilities import WORTH_A_TEMPLATE, ShareWriter
from appliance.tasks.decisions.questions import Question, QuestionResult
from appliance.wire.usage import write_responses_usage

Row = tuple[QuestionResult, ...] | ApplianceError


@dataclass(frozen=True, slots=True)
class DecisionResult:
    """A TaskResult of decisions: a row for each input, in order."""

    model: str
    rows: tuple[Row, ...]
    usage: Usage
    target: str = ""
    variant: str | None = None
    payload: Any = None
    """The response, where the call is a whole request."""

    @property
    def confidence(self) -> float | None:
        shares = (answer.probabilities for answer in self.write_answers())
        return min((max(one) for one in shares if one is not None), default=None)

    @property
    def label_mass(self) -> float | None:
        return min((one.label_mass for one in self.write_answers() if one.label_mass is not None), default=None)

    def write_answers(self) -> Iterator[QuestionResult]:
        for row in self.rows:
            if not isinstance(row, ApplianceError):
                yield from row


def make_openai_payload(result: DecisionResult, questions: Sequence[Question]) -> JsonObject:
    """The response of /v1/decisions. Raises the error of its one input."""
    row = require_single_row(result)
    return {
        "model": result.model,
        "answers": write_answers(row, questions),
        "usage": write_responses_usage(result.usage),
    }


def require_single_row(result: DecisionResult) -> tuple[QuestionResult, ...]:
    (row,) = result.rows
    if isinstance(row, ApplianceError):
        raise row
    return row


def write_answers(
    row: Sequence[QuestionResult], questions: Sequence[Question], writer: ShareWriter | None = None
) -> Sequence[JsonObject]:
    return [
        _answer(question_result, question, writer) for question_result, question in zip(row, questions, strict=True)
    ]


def _answer(question_result: QuestionResult, question: Question, writer: ShareWriter | None) -> JsonObject:
    if question_result.probabilities is None:
        return {"type": "refusal", "name": question.name}
    head = {"type": question.kind, "name": question.name}
    tail = question_result.extra_fields
    if question.kind == "predicate":
        return {**head, "probability": question_result.probabilities[0], **tail}
    options = question_result.options or question.options
    pairs = zip(options, question_result.probabilities, strict=True)
    rows: Sequence[JsonObject] | orjson.Fragment
    if question.kind == "choice":
        if writer is not None and len(options) >= WORTH_A_TEMPLATE:
            rows = writer.write(options, question_result.probabilities)
        else:
            rows = [{"value": option.value, "probability": share} for option, share in pairs]
        result: JsonObject = {"choice": options[question_result.chosen].value}
    else:
        rows = [
            {"value": level, "label": option.value, "probability": share} for level, (option, share) in enumerate(pairs)
        ]
        result = {"score": question_result.score}
    return {**head, **result, "confidence": question_result.confidence, "probabilities": rows, **tail}
