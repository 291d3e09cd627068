"""Calibrating a task from labelled examples: what is asked, what is learnt, what is refused."""

import math
import random
from collections.abc import Mapping
from typing import Any

import pytest

from appliance.core import Usage
from appliance.errors import BackendOverloaded, RequestError
from appliance.tasks.decisions import calibration
from appliance.tasks.decisions.decision_options import DecisionMethod, hash_question
from tests.tasks.rows import LOCAL, refusal, reply

TOPIC: dict[str, Any] = {
    "type": "choice",
    "name": "topic",
    "instructions": "What is it about?",
    "choices": [{"value": "billing"}, {"value": True}],
}
MOOD: dict[str, Any] = {
    "type": "score",
    "name": "mood",
    "instructions": "How angry?",
    "levels": [{"label": "calm"}, {"label": "furious"}],
}


def body(count: int = 70, **more: Any) -> dict[str, Any]:
    examples = [{"input": f"text {n}", "label": "billing" if n % 4 else True} for n in range(count)]
    return {"task": "mail", "questions": [TOPIC], "examples": examples, **more}


def answered(call: Any, rng: random.Random) -> Any:
    """Scores that are three times too sure of what is right three times in four."""
    results: list[Mapping[str, Any]] = []
    for _ in call.outgoing(LOCAL)[0].body["items"]:
        share = 0.95 if rng.random() < 0.75 else 0.1
        rows = [{"label": "x", "logprob": math.log(share)}, {"label": "y", "logprob": math.log(1 - share)}]
        results.append({"labels": rows, "label_mass": 0.5})
    return call.read(LOCAL, [reply({"results": results}, Usage(50, 0))])


def test_examples_become_calls_and_calls_become_a_fit() -> None:
    asked, calls = calibration.read_calibration_request(body(bias=True))
    assert asked.needs == {"labels"} and len(calls) == 3
    rng = random.Random(4)
    learnt = calibration.fit_task(body(bias=True), calls, [answered(call, rng) for call in calls])
    fit = learnt.fit
    assert (fit.task, fit.target, fit.variant, fit.method) == ("mail", LOCAL.name, None, DecisionMethod())
    (row,) = learnt.report["questions"]
    assert row["temperature"] == fit.fits[hash_question(calls[0].questions[0])].temperature > 1
    assert row["examples"] == 70 and [one["value"] for one in row["bias"]] == ["billing", True]
    assert row["after"]["ece"] < row["before"]["ece"] and row["after"]["brier"] < row["before"]["brier"]
    assert learnt.report["usage"]["input_tokens"] == 150


def test_a_method_is_part_of_what_is_learnt() -> None:
    given = body(debias=True, calibrate="content_free")
    _, calls = calibration.read_calibration_request(given)
    learnt = calibration.fit_task(given, calls, [answered(call, random.Random(1)) for call in calls])
    assert learnt.fit.method == DecisionMethod(debias=True, content_free=True)


def test_a_call_that_failed_costs_its_examples_and_too_few_are_refused() -> None:
    _, calls = calibration.read_calibration_request(body())
    rng = random.Random(4)
    first = answered(calls[0], rng)
    rest = [BackendOverloaded("full")] * (len(calls) - 1)
    learnt = calibration.fit_task(body(), calls, [first, *rest])
    assert learnt.report["questions"][0]["examples"] == len(calls[0].inputs)
    small = body(34)
    _, calls = calibration.read_calibration_request(small)
    with pytest.raises(RequestError, match="2 examples are too few"):
        calibration.fit_task(small, calls, [BackendOverloaded("full"), answered(calls[1], rng)])


def test_several_questions_take_labels_by_name() -> None:
    examples = [{"input": "x", "labels": {"topic": True, "mood": "furious"}}] * 20
    given = {"task": "mail", "questions": [TOPIC, MOOD], "examples": examples}
    _, calls = calibration.read_calibration_request(given)
    assert calibration.read_labels(given, calls[0].questions)[0] == [1, 1]


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"task": None}, "task", "missing"),
        ({"examples": []}, "examples", "0 examples"),
        ({"examples": [{"input": "x", "label": True}] * 2_001}, "examples", "2001"),
        ({"examples": [5] * 20}, "examples[0]", "5"),
        ({"examples": [{"label": True}] * 20}, "examples[0].input", "missing"),
        ({"examples": [{"input": "", "label": True}] * 20}, "examples[0].input", "empty"),
        ({"examples": [{"input": "x", "label": "true"}] * 20}, "examples[0].label", "'billing', True"),
        ({"examples": [{"input": "x"}] * 20}, "examples[0].labels", "None"),
        ({"questions": [TOPIC, MOOD]}, "examples[0].labels", "None"),
        (
            {"questions": [{**TOPIC, "name": None}], "examples": [{"input": "x", "labels": {}}] * 20},
            "examples[0].labels.None",
            "name",
        ),
        ({"bias": 1}, "bias", "true or false"),
        ({"calibrate": "x"}, "calibrate", "content_free"),
    ],
)
def test_wrong_fields_are_refused_by_name(change: dict[str, Any], param: str, words: str) -> None:
    error = refusal(calibration.read_calibration_request, {**body(20), **change})
    assert error.param == param
    assert words in error.message


def test_a_body_for_another_endpoint_is_told_so() -> None:
    assert "/v1/decisions" in refusal(calibration.read_calibration_request, {"input": "x", "task": "t"}).message
