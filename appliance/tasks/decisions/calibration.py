"""Calibrating a task: `POST /v1/decisions/calibrate` with labelled examples.

Request: `task` (its name), `questions` as for /v1/decisions, `examples` (20 to 2,000): {input, label} for one question,
{input, labels: {question's name: label}} for several, where a label is a choice's value, a score's level or a
predicate's true or false; optionally `model`, `debias`, `calibrate`, `layout` (they become the task's method),
`few_shot` (what /v1/decisions takes as `examples`) and `bias` (true: a bias for each option is fitted too, which needs
examples of every option; false otherwise).
Response: {task, target, variant, questions: [{name, examples, temperature, bias, before, after}], usage}; `before` and
`after` hold accuracy, ece, brier and log_loss, `after` on examples that were not fitted on.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from appliance.core import ParsedRequest, Usage
from appliance.core.json_types import JsonObject
from appliance.errors import ApplianceError, BackendGarbage, RequestError
from appliance.tasks.decisions.calibration_fit import MIN_EXAMPLES, FittedCalibration, fit_question
from appliance.tasks.decisions.decision_options import (
    DecisionOptions,
    Priors,
    TaskCalibration,
    hash_question,
    read_method,
    read_task,
)
from appliance.tasks.decisions.decision_results import DecisionResult
from appliance.tasks.decisions.examples import attach_examples, read_label
from appliance.tasks.decisions.inputs import Input, read_input
from appliance.tasks.decisions.openai_shape import DecisionsCall, make_call, make_parsed_request, split_call
from appliance.tasks.decisions.questions import Question, read_questions
from appliance.wire.strict_fields import missing, read_bool, read_list, read_object, refuse_other_contract
from appliance.wire.usage import write_responses_usage

MAX_EXAMPLES = 2_000
"""Beyond, a fit changes little; fitting takes some seconds for so many with 77 options."""


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """What to remember, and what to tell."""

    fit: TaskCalibration
    report: JsonObject


def read_calibration_request(
    body: JsonObject, priors: Priors | None = None
) -> tuple[ParsedRequest, Sequence[DecisionsCall]]:
    """Check the body and make the calls that answer its examples. Raises RequestError naming field and value."""
    refuse_other_contract(body, "/v1/decisions/calibrate", "examples", {"input": "/v1/decisions"})
    if read_task(body) is None:
        raise missing("task", "give the name that requests will use")
    read_bool(body, "bias")
    questions = attach_examples(body, read_questions(body), "few_shot")
    rows = _rows(body)
    read_labels(body, questions)
    inputs = tuple(_input(row, index) for index, row in enumerate(rows))
    whole = make_call(inputs, questions, body["questions"], {})
    whole = replace(whole, options=DecisionOptions(read_method(body)), priors=priors or whole.priors)
    asked = make_parsed_request(body, whole)
    # Only what is scored here can be fitted: others give probabilities that may be anything.
    return replace(asked, needs=asked.needs | {"labels"}), split_call(whole)


def read_labels(body: JsonObject, questions: Sequence[Question]) -> Sequence[Sequence[int]]:
    """For every example, the index of the right option of each question."""
    return [
        [read_label(row, question, questions, f"examples[{index}]") for question in questions]
        for index, row in enumerate(_rows(body))
    ]


def _rows(body: JsonObject) -> Sequence[JsonObject]:
    rows = read_list(body["examples"], "examples", MIN_EXAMPLES, MAX_EXAMPLES, "examples")
    return [read_object(row, f"examples[{index}]", "with input and label") for index, row in enumerate(rows)]


def _input(row: JsonObject, index: int) -> Input:
    if "input" not in row:
        raise missing(f"examples[{index}].input", "give the text to decide about")
    return read_input(row["input"], f"examples[{index}].input")


def fit_task(
    body: JsonObject, calls: Sequence[DecisionsCall], results: Sequence[DecisionResult | ApplianceError]
) -> CalibrationResult:
    """Fit every question on the target that answered most examples. Seconds of CPU: call it in a thread.

    Raises the first call's error where none was answered, and RequestError where too few were.
    """
    questions, method = calls[0].questions, calls[0].options.method
    done = [result for result in results if isinstance(result, DecisionResult)]
    (target, variant), _ = Counter((result.target, result.variant) for result in done).most_common(1)[0]
    answered = _answered(calls, results, (target, variant), read_labels(body, questions))
    with_bias = read_bool(body, "bias")
    fitted = [
        _fit([row[place].scores for row, _ in answered], [right[place] for _, right in answered], with_bias=with_bias)
        for place in range(len(questions))
    ]
    fits = {hash_question(question): one.fit for question, one in zip(questions, fitted, strict=True)}
    name = str(body["task"])
    report = {
        "task": name,
        "target": target,
        "variant": variant,
        "questions": [_describe_fit(question, one) for question, one in zip(questions, fitted, strict=True)],
        "usage": write_responses_usage(sum((result.usage for result in done), Usage())),
    }
    return CalibrationResult(TaskCalibration(name, target, variant, method, fits), report)


def _answered(
    calls: Sequence[DecisionsCall],
    results: Sequence[DecisionResult | ApplianceError],
    place: tuple[str, str | None],
    right: Sequence[Sequence[int]],
) -> list[tuple[Any, Sequence[int]]]:
    """What one target said to the examples it could answer, each with the right options."""
    answered: list[tuple[Any, Sequence[int]]] = []
    first = 0
    for call, result in zip(calls, results, strict=True):
        if isinstance(result, DecisionResult) and (result.target, result.variant) == place:
            rows = enumerate(result.rows, first)
            answered += [(row, right[index]) for index, row in rows if not isinstance(row, ApplianceError)]
        first += len(call.inputs)
    return answered


def _fit(scores: Sequence[Sequence[float]], right: Sequence[int], *, with_bias: bool) -> FittedCalibration:
    if not all(scores):
        raise BackendGarbage("the target gave probabilities without the scores they were made of")
    try:
        return fit_question(scores, right, with_bias=with_bias)
    except ValueError as error:
        raise RequestError(f"examples: {error}; the others could not be answered", param="examples") from error


def _describe_fit(question: Question, fitted: FittedCalibration) -> JsonObject:
    values = [option.value for option in question.options]
    bias = [{"value": value, "bias": shift} for value, shift in zip(values, fitted.fit.bias, strict=False)]
    return {
        "name": question.name,
        "examples": fitted.examples,
        "temperature": fitted.fit.temperature,
        "bias": bias or None,
        "before": asdict(fitted.before),
        "after": asdict(fitted.after),
    }
