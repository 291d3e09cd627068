"""When an answer is unsure enough to ask somebody better, and how often that may happen. Pure."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from appliance.config import EscalationRule
from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.tasks.decisions.openai_shape import DecisionResult
from appliance.tasks.extract.extraction import Extracted


def find_doubt(payload: Any, rule: EscalationRule) -> str | None:
    """Why `payload` counts as unsure, or None. An answer that tells no confidence is never unsure."""
    confidence, mass = confidence_of(payload), label_mass_of(payload)
    if confidence is not None and confidence < rule.below_confidence:
        return f"confidence {confidence:.2f} is below {rule.below_confidence:.2f}"
    if rule.below_label_mass is not None and mass is not None and mass < rule.below_label_mass:
        return f"label mass {mass:.2f} is below {rule.below_label_mass:.2f}"
    return None


def confidence_of(payload: Any) -> float | None:
    """The least confidence among an answer's parts, from 0 to 1; None where it tells none."""
    return min(_confidences(payload), default=None)


def label_mass_of(payload: Any) -> float | None:
    return min(_masses(payload), default=None)


def _confidences(payload: Any) -> Iterator[float]:
    match payload:
        case DecisionResult():
            rows = (row for row in payload.rows if isinstance(row, tuple))
            for judged in (judged for row in rows for judged in row):
                if judged.probabilities is not None:
                    yield max(judged.probabilities)
        case Extracted():
            yield from (payload.confidence or {}).values()
        case {"answers": list() | dict() as answers}:
            for answer in _rows(answers):
                yield from _confidence_of_answer(answer)
        case {"choices": list() as choices}:
            for choice in choices:
                yield from _confidence_of_choice(choice)


def _rows(answers: list[Any] | MutableJsonObject) -> Iterator[JsonObject]:
    for answer in answers if isinstance(answers, list) else answers.values():
        if isinstance(answer, Mapping):
            yield answer


def _confidence_of_answer(answer: JsonObject) -> Iterator[float]:
    """Of a choice or score as it says; of a yes-or-no question the likelier side."""
    for name in ("probability", "noul"):
        if isinstance(answer.get(name), int | float):
            yield max(answer[name], 1 - answer[name])
            return
    if isinstance(answer.get("confidence"), int | float):
        yield float(answer["confidence"])


def _confidence_of_choice(choice: Any) -> Iterator[float]:
    """Of a chat whose caller asked for logprobs: the average probability of a token, geometrically."""
    logprobs = choice.get("logprobs") if isinstance(choice, dict) else None
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    told = [row["logprob"] for row in tokens or () if isinstance(row, dict) and _is_number(row.get("logprob"))]
    if told:
        yield math.exp(math.fsum(told) / len(told))


def _masses(payload: Any) -> Iterator[float]:
    match payload:
        case DecisionResult():
            rows = (row for row in payload.rows if isinstance(row, tuple))
            for judged in (judged for row in rows for judged in row):
                if judged.label_mass is not None:
                    yield judged.label_mass
        case {"answers": list() | dict() as answers}:
            for answer in _rows(answers):
                if _is_number(answer.get("label_mass")):
                    yield float(answer["label_mass"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
