"""Debiasing, content-free calibration and fits of a task: what is asked more, and what becomes of the answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from appliance.core import Target
from appliance.errors import BackendGarbage, NotFound, RequestError
from appliance.tasks.decisions import label_prompts, openai_shape, systemone
from appliance.tasks.decisions.decision_options import (
    CONTENT_FREE,
    CalibrationParameters,
    DecisionMethod,
    Priors,
    TaskCalibration,
    Tasks,
    hash_question,
)
from appliance.tasks.decisions.questions import Option, Question
from tests.tasks.rows import LOCAL, hosted, reply

TOPIC: dict[str, Any] = {
    "type": "choice",
    "name": "topic",
    "instructions": "What is it about?",
    "choices": [{"value": "billing"}, {"value": "sports"}],
}
TOPIC_QUESTION = Question("choice", "topic", "What is it about?", (Option("billing"), Option("sports")))
LEVELS = Question("score", None, "How angry?", (Option("calm"), Option("annoyed"), Option("furious")))
LONG = Question("choice", None, "Which?", (Option("a" * 50), Option("b" * 50), Option("c" * 50)))


def scored(*shares: float, mass: float = 0.9) -> dict[str, Any]:
    return {"labels": [{"label": "x", "logprob": math.log(share * mass)} for share in shares], "label_mass": mass}


def answer_of(payload: Mapping[str, Any]) -> Mapping[str, float]:
    return {row["value"]: row["probability"] for row in payload["answers"][0]["probabilities"]}


def one_call(more: Mapping[str, Any], tasks: Tasks | None = None, priors: Priors | None = None) -> Any:
    _, (call,) = openai_shape.read_decision_request({"input": "Pay me!", "questions": [TOPIC], **more}, tasks, priors)
    return call


def items(call: Any, target: Target = LOCAL) -> Sequence[Mapping[str, Any]]:
    rows: Sequence[Mapping[str, Any]] = call.outgoing(target)[0].body["items"]
    return rows


def test_the_other_order_lists_the_options_in_reverse_and_scores_the_same_labels() -> None:
    forward, turned = label_prompts.list_label_texts(TOPIC_QUESTION, debias=True)
    assert forward.ask.endswith("- billing\n- sports") and turned.ask.endswith("- sports\n- billing")
    assert (forward.labels, forward.options) == (turned.labels, turned.options)


def test_numbers_that_stand_for_long_options_are_given_anew_in_the_other_order() -> None:
    _, turned = label_prompts.list_label_texts(LONG, debias=True)
    assert f'- 1: "{"c" * 50}"' in turned.ask and f'- 3: "{"a" * 50}"' in turned.ask
    assert (turned.labels, turned.options) == (("1", "2", "3"), (2, 1, 0))


def test_levels_in_the_other_order_go_down_and_keep_their_meaning() -> None:
    _, turned = label_prompts.list_label_texts(LEVELS, debias=True)
    assert turned.ask.startswith("Rate the text, from the highest level to the lowest: How angry?")
    assert turned.ask.endswith("- furious\n- annoyed\n- calm")
    assert turned.options == (0, 1, 2)


def test_debiasing_averages_both_orders() -> None:
    call = one_call({"debias": True})
    assert len(items(call)) == 2 and call.output_tokens == 2
    payload = call.read(LOCAL, [reply({"results": [scored(0.8, 0.2, mass=0.6), scored(0.5, 0.5, mass=0.2)]})]).payload
    assert answer_of(payload) == pytest.approx({"billing": 2 / 3, "sports": 1 / 3})  # the geometric mean, normalised
    assert payload["answers"][0]["label_mass"] == pytest.approx(0.4)


def test_numbered_options_are_read_by_what_their_number_meant() -> None:
    choices = [{"value": option.value} for option in LONG.options]
    _, (call,) = openai_shape.read_decision_request(
        {"input": "x", "questions": [{**TOPIC, "choices": choices}], "debias": True}, None, None
    )
    payload = call.read(LOCAL, [reply({"results": [scored(0.8, 0.1, 0.1), scored(0.1, 0.1, 0.8)]})]).payload
    assert payload["answers"][0]["choice"] == "a" * 50
    assert payload["answers"][0]["confidence"] == pytest.approx(0.8)


def test_content_free_calibration_takes_off_what_is_said_to_nothing_and_asks_that_once() -> None:
    priors = Priors()
    first = one_call({"calibrate": "content_free"}, None, priors)
    assert len(items(first)) == 2 and any(
        CONTENT_FREE in str(item) for item in items(one_call({"calibrate": "content_free"}))
    )
    payload = first.read(LOCAL, [reply({"results": [scored(0.8, 0.2), scored(0.8, 0.2)]})]).payload
    assert answer_of(payload) == pytest.approx({"billing": 0.5, "sports": 0.5})
    second = one_call({"calibrate": "content_free"}, None, priors)
    assert len(items(second)) == 1
    payload = second.read(LOCAL, [reply({"results": [scored(0.6, 0.4)]})]).payload
    assert answer_of(payload)["sports"] == pytest.approx(0.4 / 0.2 / (0.4 / 0.2 + 0.6 / 0.8))


def test_a_prior_belongs_to_target_variant_question_and_layout() -> None:
    priors = Priors()
    call = one_call({"calibrate": "content_free"}, None, priors)
    items(call)
    call.read(LOCAL, [reply({"results": [scored(0.8, 0.2), scored(0.8, 0.2)]})])
    assert len(items(call)) == 1
    assert len(items(call, replace(LOCAL, variant="q8_0"))) == 2
    assert len(items(call, replace(LOCAL, name="onsite/other"))) == 2
    assert len(items(one_call({"calibrate": "content_free", "debias": True}, None, priors))) == 4


def test_priors_are_asked_for_again_after_many_uses_and_their_number_is_bounded() -> None:
    priors = Priors()
    priors.note(("k",), (0.0,))
    assert [priors.wanted([("k",)]) for _ in range(1_001)] == [False] * 1_000 + [True]
    for number in range(5_000):
        priors.note((number,), (0.0,))
    assert priors.get(("k",)) is None and priors.get((4_999,)) == (0.0,)


def test_without_the_scores_for_nothing_there_is_no_answer() -> None:
    call = one_call({"calibrate": "content_free"})
    with pytest.raises(BackendGarbage, match="says nothing"):
        call.read(LOCAL, [reply({"results": [scored(0.8, 0.2)]})])


def tasks_with(target: str = LOCAL.name, variant: str | None = None, **more: Any) -> Tasks:
    fits = {hash_question(TOPIC_QUESTION): CalibrationParameters(2.0, (0.0, 1.0))}
    return {"mail": [TaskCalibration("mail", target, variant, DecisionMethod(**more), fits)]}


def test_a_named_task_applies_its_fit_and_says_so() -> None:
    payload = one_call({"task": "mail"}, tasks_with()).read(LOCAL, [reply({"results": [scored(0.8, 0.2)]})]).payload
    weights = math.sqrt(0.8), math.sqrt(0.2) * math.e
    assert answer_of(payload)["billing"] == pytest.approx(weights[0] / sum(weights))
    assert payload["answers"][0]["calibrated_for"] == "mail"


@pytest.mark.parametrize("tasks", [tasks_with("onsite/other"), tasks_with(variant="q8_0")])
def test_a_fit_is_never_given_to_another_model_or_variant(tasks: Tasks) -> None:
    payload = one_call({"task": "mail"}, tasks).read(LOCAL, [reply({"results": [scored(0.8, 0.2)]})]).payload
    assert answer_of(payload)["billing"] == pytest.approx(0.8)
    assert "calibrated_for" not in payload["answers"][0]


def test_a_hosted_answer_is_given_as_it_comes_and_our_fields_stay_here() -> None:
    call = one_call({"task": "mail", "prompt_cache_key": "k"}, tasks_with())
    target = hosted("decisions")
    assert set(call.outgoing(target)[0].body) == {"input", "questions", "prompt_cache_key"}
    probabilities = [{"value": "billing", "probability": 0.3}, {"value": "sports", "probability": 0.7}]
    payload = call.read(target, [reply({"answers": [{"type": "choice", "probabilities": probabilities}]})]).payload
    assert answer_of(payload) == {"billing": 0.3, "sports": 0.7}
    assert "calibrated_for" not in payload["answers"][0]


def test_a_task_brings_the_method_it_was_fitted_with() -> None:
    assert len(items(one_call({"task": "mail"}, tasks_with(debias=True)))) == 2


def test_the_short_layout_puts_the_label_behind_the_text() -> None:
    body = one_call({"layout": "short"}).outgoing(LOCAL)[0].body
    assert body["open_turn"] is True and body["cue"].startswith("\n")
    assert "open_turn" not in one_call({"layout": "chat"}).outgoing(LOCAL)[0].body


def test_a_low_label_mass_makes_an_answer_unsure_in_both_formats() -> None:
    payload = one_call({}).read(LOCAL, [reply({"results": [scored(0.9, 0.1, mass=0.01)]})]).payload
    assert payload["answers"][0]["unsure"] is True
    body = {
        "state": "x",
        "questions": {"t": {"type": "choice", "instructions": "?", "criteria": {"a": None, "b": None}}},
    }
    _, (call,) = systemone.read_systemone_request({**body, "debias": True})
    results = [scored(0.9, 0.1, mass=0.01), scored(0.9, 0.1, mass=0.02)]
    answer = call.read(LOCAL, [reply({"results": results})]).payload["answers"]["t"]
    assert answer["unsure"] is True and answer["confidence"] == pytest.approx(0.9)
    assert "unsure" not in one_call({}).read(LOCAL, [reply({"results": [scored(0.9, 0.1)]})]).payload["answers"][0]


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"debias": "yes"}, "debias", "true or false"),
        ({"calibrate": "platt"}, "calibrate", "content_free"),
        ({"layout": "long"}, "layout", "short"),
        ({"task": ""}, "task", "a name"),
        ({"task": 5}, "task", "5"),
        ({"task": "mail", "debias": True}, "debias", "the task's"),
        ({"task": "mail", "questions": [{**TOPIC, "instructions": "Else?"}]}, "questions[0]", "calibrated for"),
    ],
)
def test_wrong_fields_are_refused_by_name(more: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        one_call(more, tasks_with())
    assert caught.value.param == param and words in caught.value.message


def test_an_unknown_task_is_not_found_and_the_known_are_named() -> None:
    with pytest.raises(NotFound, match="'mail'") as caught:
        one_call({"task": "post"}, tasks_with())
    assert (caught.value.status, caught.value.param) == (404, "task")
    with pytest.raises(NotFound, match="none yet"):
        one_call({"task": "post"}, {})
    assert one_call({"task": "post"}).options.fits == ()  # a dry run looks nothing up


def test_questions_are_told_apart_by_what_the_model_sees() -> None:
    renamed = replace(TOPIC_QUESTION, name="other")
    typed = replace(TOPIC_QUESTION, options=(Option("true"), Option("sports")))
    assert hash_question(renamed) == hash_question(TOPIC_QUESTION)
    assert (
        len(
            {
                hash_question(one)
                for one in (TOPIC_QUESTION, typed, replace(typed, options=(Option(True), Option("sports"))))
            }
        )
        == 3
    )
