"""The profile by rules: a table of requests."""

import time
from typing import Any

import pytest

from appliance.router.profile import profile_request
from tests.router.scene import request_of

TASKS = [
    ("Classify this review as positive or negative: I loved it", "classification"),
    ("Reply with exactly one label from: ham, spam.\nWin a prize now", "classification"),
    ("What is the sentiment of: 'meh'?", "classification"),
    ("Extract the name and the date as JSON with keys name, date.\nAnn came on 3 May.", "extraction"),
    (
        "Answer with the shortest span copied from the passage.\nPassage: It rained. Question: What happened?",
        "extraction",
    ),
    ("Summarise the following minutes in three sentences: ...", "summarisation"),
    ("Translate to French: good morning", "translation"),
    ("Write a Python function that reverses a list", "code"),
    ("Why does this fail?\n```\nint main() {}\n```", "code"),
    ("Prove that the square root of 2 is irrational", "reasoning"),
    ("Tom has 3 apples, buys 12 more and eats 4. How many are left?", "reasoning"),
    ("Write a poem about the sea", "generation"),
    ("Who painted the Mona Lisa?", "chat"),
    ("A farmer has twelve cows, sells half and buys three. How many cows has he got?", "reasoning"),
    ("Which of the following is a fish?\nA. trout\nB. whale\nC. seal\nAnswer:", "chat"),
    ("", "chat"),
]


@pytest.mark.parametrize(("text", "task"), TASKS)
def test_the_task_is_read_from_the_text(text: str, task: str) -> None:
    made = profile_request(request_of(text), prompt_tokens=20, output_tokens=None)
    assert made.task == task
    assert made.reasons[0].startswith(task)


@pytest.mark.parametrize(
    ("fields", "task"),
    [
        ({"endpoint": "decisions"}, "classification"),
        ({"endpoint": "extract"}, "extraction"),
        ({"format": "tools"}, "tool_use"),
        ({"format": "json_schema"}, "extraction"),
    ],
)
def test_endpoint_and_format_say_the_task_where_the_text_does_not(fields: dict[str, Any], task: str) -> None:
    assert profile_request(request_of("Ann, 3 May", **fields), prompt_tokens=5, output_tokens=8).task == task


def test_the_endpoint_is_believed_before_the_text() -> None:
    asked = request_of("Prove the theorem", endpoint="decisions")
    assert profile_request(asked, prompt_tokens=5, output_tokens=1).task == "classification"


def test_code_and_reasoning_are_complex_and_labels_never() -> None:
    def complexity(text: str, tokens: int = 50) -> float:
        return profile_request(request_of(text), prompt_tokens=tokens, output_tokens=None).complexity

    assert complexity("Prove that there are infinitely many primes") >= 0.7
    assert complexity("Who painted the Mona Lisa?") < 0.4
    assert complexity("Classify this ticket. " + "word " * 4000, 5000) < 0.3
    assert 0 <= complexity("First analyse, then prove, next derive, finally justify. You must. " * 50, 10**6) <= 1


def test_more_demands_make_a_request_more_complex() -> None:
    plain = profile_request(request_of("Describe the plan"), prompt_tokens=5, output_tokens=None)
    asked = (
        "Describe the plan. It must be detailed, analyze the trade-offs, and should exactly follow the requirements."
    )
    demanding = profile_request(request_of(asked), prompt_tokens=25, output_tokens=None)
    assert demanding.complexity > plain.complexity
    assert "demanding words" in demanding.reasons[1]


def test_a_longer_text_is_more_complex_among_short_ones_too() -> None:
    tokens = (5, 20, 80, 300, 1200, 5000)
    made = [
        profile_request(request_of("Who was it?"), prompt_tokens=one, output_tokens=None).complexity for one in tokens
    ]
    assert made == sorted(made) and len(set(made)) == len(made)


def test_thousands_of_texts_in_a_call_are_a_batch() -> None:
    assert (
        profile_request(request_of("a", body={"inputs": ["a"]}), prompt_tokens=1, output_tokens=1).latency_class
        == "batch"
    )
    assert profile_request(request_of("a"), prompt_tokens=1, output_tokens=1).latency_class == "interactive"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the capital of France and how big is it?", "en"),
        ("Was ist die Hauptstadt von Frankreich und wie groß ist sie?", "de"),
        ("Quelle est la capitale de la France et qui l'a fondée ?", "fr"),
        ("¿Cuál es la capital de España y por qué?", "es"),
        ("フランスの首都はどこですか", "ja"),
        ("Какая столица Франции", "ru"),
        ("42", None),
        ("", None),
    ],
)
def test_the_language_is_guessed_or_left_open(text: str, language: str | None) -> None:
    assert profile_request(request_of(text), prompt_tokens=5, output_tokens=None).language == language


def test_any_text_is_profiled_in_well_under_a_millisecond_of_its_2000_tokens() -> None:
    asked = request_of("The quick brown fox, and then it must jump over 3 lazy dogs. " * 130)
    profile_request(asked, prompt_tokens=2000, output_tokens=None)
    started = time.perf_counter()
    for _ in range(20):
        profile_request(asked, prompt_tokens=2000, output_tokens=None)
    # ten times what it takes on an idle machine, for a busy one
    assert (time.perf_counter() - started) / 20 < 2e-3


@pytest.mark.parametrize(
    "text",
    ["a" * 10_000_000, "\ud800\x00" * 1000, "$" * 100_000, "how many " * 20_000, "[" * 9000, "a. \n" * 9000],
    ids=["one word", "surrogates", "signs", "words", "brackets", "choices"],
)
def test_no_text_is_too_odd_or_too_long(text: str) -> None:
    started = time.perf_counter()
    profile_request(request_of(text), prompt_tokens=100, output_tokens=None)
    assert time.perf_counter() - started < 0.5
