"""Few-shot examples of decisions: where they stand in the prompt, and how wrong ones are refused."""

from typing import Any

import pytest

from appliance.tasks.decisions import label_prompts, openai_shape, systemone
from appliance.tasks.decisions.decision_options import hash_question
from tests.tasks.rows import LOCAL, hosted, refusal

TOPIC: dict[str, Any] = {
    "type": "choice",
    "name": "topic",
    "instructions": "What is it about?",
    "choices": [{"value": "billing"}, {"value": "sports"}],
}
URGENT: dict[str, Any] = {"type": "predicate", "name": "urgent", "instructions": "Is it urgent?"}
EXAMPLES = [{"input": "Twice charged", "label": "billing"}, {"input": "Two goals", "label": "sports"}]


def sent(body: dict[str, Any], target: Any = LOCAL) -> Any:
    _, (call,) = openai_shape.read_decision_request(
        {"input": "Pay me!", "questions": [TOPIC], "examples": EXAMPLES, **body}
    )
    return call.outgoing(target)[0].body


def test_examples_are_answered_turns_before_the_text() -> None:
    body = sent({})
    assert [(row["role"], row["content"]) for row in body["messages"][1:]] == [
        ("user", "Twice charged"),
        ("assistant", "Label: billing"),
        ("user", "Two goals"),
        ("assistant", "Label: sports"),
    ]
    assert body["items"] == [{"content": "Pay me!", "labels": "set0"}]


def test_in_the_short_layout_the_answer_stands_in_the_texts_own_turn() -> None:
    turns = sent({"layout": "short"})["messages"][1:]
    assert turns[0] == {"role": "user", "content": "Twice charged\nLabel: billing"} and len(turns) == 2


def test_an_example_shows_the_number_that_its_option_has_in_that_order() -> None:
    long = {**TOPIC, "choices": [{"value": "a" * 50}, {"value": "b" * 50}, {"value": "c" * 50}]}
    body = sent({"questions": [long], "examples": [{"input": "x", "label": "a" * 50}], "debias": True})
    forward, turned = (item["messages"][2]["content"] for item in body["items"])
    assert (forward, turned) == ("Label: 1", "Label: 3")


def test_texts_of_a_batch_share_the_examples_and_are_not_cut_apart_by_them() -> None:
    many = [{"input": "long " * 200, "label": "billing"}] * 30
    body = {"inputs": ["one", "two", "three"], "questions": [TOPIC], "examples": many}
    _, (call,) = openai_shape.read_decision_batch(body)
    assert len(call.outgoing(LOCAL)[0].body["messages"]) == 61
    assert call.longest_prompt_tokens > 30 * 200


def test_one_text_under_several_questions_stands_behind_each_ones_examples() -> None:
    examples = [{"input": "Twice charged", "labels": {"topic": "billing", "urgent": True}}]
    body = sent({"questions": [TOPIC, URGENT], "examples": [*examples, {"input": "x", "labels": {"urgent": False}}]})
    topic, urgent = (item["messages"] for item in body["items"])
    assert [row["content"] for row in topic[1:]] == ["Twice charged", "Label: billing", "Pay me!"]
    assert [row["content"] for row in urgent[1:]] == ["Twice charged", "Label: yes", "x", "Label: no", "Pay me!"]


def test_a_hosted_target_reads_the_examples_in_the_instructions() -> None:
    openai_questions = sent({}, hosted("decisions"))
    assert openai_questions["questions"][0]["instructions"] == (
        'What is it about?\nExamples:\n"Twice charged" -> "billing"\n"Two goals" -> "sports"'
    )
    assert "examples" not in openai_questions


def test_what_was_fitted_without_the_examples_is_another_question() -> None:
    _, (plain,) = openai_shape.read_decision_request({"input": "x", "questions": [TOPIC]})
    _, (shown,) = openai_shape.read_decision_request({"input": "x", "questions": [TOPIC], "examples": EXAMPLES})
    assert hash_question(plain.questions[0]) != hash_question(shown.questions[0])
    assert label_prompts.estimate_question_tokens(shown.questions[0]) > label_prompts.estimate_question_tokens(
        plain.questions[0]
    )


def test_system_one_takes_examples_too() -> None:
    questions = {"topic": {"type": "choice", "instructions": "What?", "criteria": {"billing": None, "sports": None}}}
    _, (call,) = systemone.read_systemone_request({"state": "x", "questions": questions, "examples": EXAMPLES})
    assert [example.option for example in call.questions[0].examples] == [0, 1]


@pytest.mark.parametrize(
    ("examples", "param"),
    [
        ([], "examples"),
        ("many", "examples"),
        ([{"label": "billing"}], "examples[0].input"),
        ([{"input": "x"}], "examples[0].label"),
        ([{"input": "x", "label": "politics"}], "examples[0].label"),
        ([{"input": "x", "label": "billing", "weight": 2}], "examples[0].weight"),
        ([{"input": "x", "labels": {"mood": "good"}}], "examples[0].labels"),
        (EXAMPLES * 201, "examples"),
    ],
)
def test_wrong_examples_are_refused_by_place(examples: Any, param: str) -> None:
    error = refusal(openai_shape.read_decision_request, {"input": "x", "questions": [TOPIC], "examples": examples})
    assert error.param == param
