"""Fields of chat completions that are about more than an answer: each works, or is refused by its name."""

from typing import Any

import pytest

from appliance.errors import Unsupported
from appliance.tasks.chat import read_chat_request
from tests.tasks.rows import LOCAL, hosted, refusal

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"user": 5}, "user"),
        ({"store": "yes"}, "store"),
        ({"metadata": []}, "metadata"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "assistant", "reasoning_content": 5}]}, "messages[0].reasoning_content"),
        ({"messages": [{"role": "assistant", "thinking_blocks": {}}]}, "messages[0].thinking_blocks"),
    ],
)
def test_what_is_not_here_at_all_is_refused_by_its_name(change: dict[str, Any], param: str) -> None:
    assert refusal(read_chat_request, {**HELLO, **change}).param == param


@pytest.mark.parametrize(
    "change",
    [
        {"store": True},
        {"web_search_options": {}},
        {"moderation": {"model": "x"}},
        {"verbosity": "low"},
        {"service_tier": "priority"},
    ],
)
def test_what_only_some_providers_do_is_refused_for_an_engine_of_this_node(change: dict[str, Any]) -> None:
    _, (call,) = read_chat_request({**HELLO, **change})
    with pytest.raises(Unsupported) as refused:
        call.outgoing(LOCAL)
    assert refused.value.param == next(iter(change))
    (sent,) = call.outgoing(hosted("chat"))
    assert sent.body == {**HELLO, **change}


@pytest.mark.parametrize(
    "change",
    [
        {"store": False},
        {"service_tier": "auto"},
        {"modalities": ["text"]},
        {"reasoning_effort": "low"},
        {"prediction": {"type": "content", "content": "x"}},
        {"metadata": {"a": "b"}},
        {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k"},
        {"parallel_tool_calls": False},
        {"max_completion_tokens": 5},
    ],
)
def test_what_changes_nothing_or_works_travels_on(change: dict[str, Any]) -> None:
    _, (call,) = read_chat_request({**HELLO, **change})
    (sent,) = call.outgoing(LOCAL)
    assert sent.body == {**HELLO, **change}


def test_what_a_model_thought_is_part_of_what_it_reads() -> None:
    messages = [*HELLO["messages"], {"role": "assistant", "content": "Hi", "reasoning_content": "A greeting."}]
    assert (
        read_chat_request({"messages": [*messages, {"role": "user", "content": "?"}]})[0].text
        == "Hello\nHi\nA greeting.\n?"
    )
