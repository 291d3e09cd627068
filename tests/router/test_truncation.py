"""Calls cut down: what stays of a context, which limit holds, and that the caller's body stays as it was."""

import copy
from typing import Any

import pytest

from appliance.config import DegradeRule
from appliance.router.routing.truncation import NO_TRIM, PromptTrim, make_static_answer, tighten_trim, trim_call
from appliance.tasks import chat, completions
from appliance.tasks.extract import extraction
from tests.router.scene import engine_target

TARGET = engine_target()


def message(role: str, words: int = 40, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": "word " * words, **fields}


def sent(body: dict[str, Any], shape: PromptTrim, reader: Any = chat.read_chat_request) -> tuple[dict[str, Any], Any]:
    """The body that a target would get, and the shaped call."""
    before = copy.deepcopy(body)
    _, (call,) = reader(body)
    made = trim_call(call, body, shape)
    out = dict(made.outgoing(TARGET)[0].body)
    assert body == before, "the caller's body is not changed"
    return out, made


def test_nothing_is_touched_where_nothing_is_cut() -> None:
    body = {"messages": [message("user")], "max_tokens": 10}
    _, (call,) = chat.read_chat_request(body)
    assert trim_call(call, body, NO_TRIM) is call
    assert sent(body, PromptTrim(max_output_tokens=50, keep_tokens=10_000))[0] == body


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_tokens": 100}),
        ({"max_tokens": 500}, {"max_tokens": 100}),
        ({"max_tokens": 50}, {"max_tokens": 50}),
        ({"max_completion_tokens": 500}, {"max_completion_tokens": 100}),
    ],
)
def test_the_output_limit_is_lowered_in_the_field_that_the_caller_used(
    given: dict[str, int], expected: dict[str, int]
) -> None:
    out, made = sent({"messages": [message("user")], **given}, PromptTrim(max_output_tokens=100))
    assert {name: value for name, value in out.items() if "tokens" in name} == expected
    assert made.output_tokens == next(iter(expected.values()))


def test_an_output_limit_is_for_each_choice() -> None:
    assert sent({"messages": [message("user")], "n": 3}, PromptTrim(max_output_tokens=10))[1].output_tokens == 30


def test_the_oldest_turns_go_first_and_the_system_message_stays() -> None:
    turns = [message(role, 40, name=f"{role}{number}") for number in range(4) for role in ("user", "assistant")]
    messages = [message("system", 10), *turns, message("user", 10)]
    out, made = sent({"messages": messages}, PromptTrim(keep_tokens=200))
    kept = out["messages"]
    assert kept[0] == messages[0] and kept[-1] == messages[-1]
    assert kept[1:-1] == turns[-len(kept) + 2 :] and 0 < len(kept) < len(messages)
    assert made.prompt_tokens <= 200


def test_a_tools_result_never_stays_without_the_call_it_answers() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]}
    messages = [message("user", 300), call, message("tool", 50, tool_call_id="1"), message("user", 5)]
    kept = sent({"messages": messages}, PromptTrim(keep_tokens=100))[0]["messages"]
    assert kept == [messages[-1]]


def test_the_last_question_stays_however_long_it_is() -> None:
    messages = [message("user", 50), message("assistant", 50), message("user", 5000)]
    assert sent({"messages": messages}, PromptTrim(keep_tokens=100))[0]["messages"] == messages[2:]


def test_reduced_scope_is_the_system_message_and_the_last_user_message() -> None:
    messages = [message("developer", 3), message("user", 3), message("assistant", 3), message("user", 2)]
    kept = sent({"messages": messages}, PromptTrim(last_only=True))[0]["messages"]
    assert kept == [messages[0], messages[3]]


def test_completions_get_the_limit_and_extractions_keep_their_own_messages() -> None:
    assert (
        sent(
            {"prompt": "Once", "max_tokens": 90}, PromptTrim(max_output_tokens=5), completions.read_completion_request
        )[0]["max_tokens"]
        == 5
    )
    body = {"text": "Ann, 12 EUR", "schema": {"type": "object", "properties": {"name": {"type": "string"}}}}
    out, _ = sent(body, PromptTrim(max_output_tokens=20, keep_tokens=1), extraction.read_extract_request)
    assert out["max_tokens"] == 20 and len(out["messages"]) == 2


def test_a_step_never_allows_more_than_its_route() -> None:
    step = DegradeRule(step="constrained", max_output_tokens=500, keep_tokens=50)
    assert tighten_trim(PromptTrim(100, None), step) == PromptTrim(100, 50)
    assert tighten_trim(NO_TRIM, DegradeRule(step="reduced_scope")).last_only


def test_a_static_answer_has_the_form_of_its_endpoint() -> None:
    step = DegradeRule(step="static", text="Please call us.")
    told = make_static_answer(step, "req-1", "chat", 7)
    assert told["choices"][0]["message"] == {"role": "assistant", "content": "Please call us."}
    assert make_static_answer(step, "req-1", "completions", 7)["choices"][0]["text"] == "Please call us."
