"""Anthropic's bodies: what is translated, and what is refused by its name."""

from dataclasses import replace
from typing import Any

import pytest

from appliance.errors import RequestError
from tests.tasks.rows import LOCAL, hosted
from tests.wire.readers import read_messages as read

HELLO: dict[str, Any] = {"model": "auto", "max_tokens": 50, "messages": [{"role": "user", "content": "Hello"}]}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
PIXEL = "iVBORw0KGgo="


def messages(body: dict[str, Any]) -> Any:
    return read(body)[0].body["messages"]


def with_blocks(*blocks: Any) -> dict[str, Any]:
    return {**HELLO, "messages": [{"role": "user", "content": list(blocks)}]}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name"),
    ({"messages": [*HELLO["messages"], {"role": "assistant", "content": "I"}]}, "messages[1]"),
    ({"temperature": 1.5}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ({"stream": "yes"}, "stream"),
    ({"container": "c"}, "container"),
    ({"mcp_servers": [{}]}, "mcp_servers"),
    ({"inference_geo": "us"}, "inference_geo"),
    ({"speed": "fast"}, "speed"),
    ({"metadata": {"user_id": "u", "team": "t"}}, "metadata.team"),
    ({"frequency_penalty": 1}, "frequency_penalty"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0]"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [{"name": "f", "input_schema": {"type": 5}}]}, "tools[0].input_schema"),
    ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
    ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"system": [{"type": "image"}]}, "system[0].type"),
]


@pytest.mark.parametrize(("change", "param"), REFUSED)
def test_what_cannot_be_carried_over_is_refused_by_its_name(change: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        read({**HELLO, **change})
    assert refused.value.param == param
    assert param in refused.value.message


BLOCKS: list[tuple[Any, str]] = [
    ({"type": "text"}, "text"),
    ({"type": "text", "text": "x", "citations": [{}]}, "citations"),
    ({"type": "image", "source": {"type": "file", "file_id": "f"}}, "source.type"),
    ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "!"}}, "source.data"),
    ({"type": "image", "source": {"type": "url", "url": "file:///etc/passwd"}}, "source.url"),
    (
        {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AA=="}},
        "source.type",
    ),
    ({"type": "tool_result", "tool_use_id": "t", "content": "x"}, "tool_use_id"),
    ({"type": "server_tool_use", "id": "t", "name": "x", "input": {}}, "type"),
    ({"type": "tool_use", "id": "t", "name": "f", "input": {}}, "type"),
    ({"type": "text", "text": "x", "cache_control": {"type": "forever"}}, "cache_control.type"),
]


@pytest.mark.parametrize(("block", "place"), BLOCKS)
def test_a_block_that_cannot_be_carried_over_is_refused_by_its_place(block: Any, place: str) -> None:
    with pytest.raises(RequestError) as refused:
        read(with_blocks(block))
    assert refused.value.param == f"messages[0].content[0].{place}"


def test_images_and_plain_documents_are_carried_over() -> None:
    body = with_blocks(
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}},
        {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}},
        {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}},
    )
    assert messages(body)[0]["content"] == [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "text", "text": "T\n\nD"},
    ]
    assert "vision" in read(body)[0].needs


def test_a_turn_of_results_and_words_becomes_messages_right_behind_the_calls() -> None:
    uses = [{"type": "tool_use", "id": name, "name": "f", "input": {"n": 1}} for name in ("a", "b")]
    results = [{"type": "tool_result", "tool_use_id": name, "content": name.upper()} for name in ("b", "a")]
    results[0]["is_error"] = True  # type: ignore[assignment]
    turns = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": [{"type": "text", "text": "Well"}, *uses]},
        {"role": "user", "content": [*results, {"type": "text", "text": "Now?"}]},
    ]
    made = messages({**HELLO, "messages": turns, "tools": [TOOL]})
    assert [message["role"] for message in made] == ["user", "assistant", "tool", "tool", "user"]
    assert made[1]["content"] == "Well"
    assert [call["id"] for call in made[1]["tool_calls"]] == ["a", "b"]
    assert (made[2]["tool_call_id"], made[2]["content"], made[2]["is_error"]) == ("b", "B", True)
    assert made[4]["content"] == "Now?"


def test_marks_for_the_cache_stay_where_they_were() -> None:
    mark = {"type": "ephemeral", "ttl": "1h"}
    asked = read(
        {
            **HELLO,
            "system": [{"type": "text", "text": "S", "cache_control": mark}],
            "tools": [{**TOOL, "cache_control": mark}],
            "cache_control": mark,
        }
    )[0]
    assert asked.body["messages"][0]["content"][0]["cache_control"] == mark
    assert asked.body["messages"][1]["cache_control"] == mark
    assert asked.body["tools"][0]["cache_control"] == mark


@pytest.mark.parametrize(
    ("choice", "ours"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_tool_choices_have_their_like(choice: Any, ours: Any) -> None:
    body = read({**HELLO, "tools": [TOOL], "tool_choice": {**choice, "disable_parallel_tool_use": True}})[0].body
    assert (body["tool_choice"], body["parallel_tool_calls"]) == (ours, False)


@pytest.mark.parametrize(
    ("thinking", "effort"),
    [
        ({"type": "disabled"}, "none"),
        ({"type": "adaptive"}, None),
        ({"type": "enabled", "budget_tokens": 4096}, "low"),
        ({"type": "enabled", "budget_tokens": 16384}, "medium"),
        ({"type": "enabled", "budget_tokens": 16385}, "high"),
    ],
)
def test_a_budget_for_thinking_is_told_in_words_and_to_its_own_dialect_exactly(thinking: Any, effort: Any) -> None:
    _, (call,) = read({**HELLO, "max_tokens": 20_000, "thinking": thinking})
    assert call.body.get("reasoning_effort") == effort
    (sent,) = call.outgoing(replace(hosted("chat"), dialect="anthropic"))
    assert sent.body["thinking"] == thinking
    assert "reasoning_effort" not in sent.body


@pytest.mark.parametrize(
    "wish", [{"thinking": {"type": "enabled", "budget_tokens": 2048}}, {"output_config": {"effort": "high"}}]
)
def test_how_hard_to_think_is_a_wish_that_a_model_without_thoughts_may_answer(wish: dict[str, Any]) -> None:
    asked, (call,) = read({**HELLO, "max_tokens": 4096, **wish})
    assert "reasoning" not in asked.needs
    assert "reasoning_effort" not in call.outgoing(LOCAL)[0].body
    thinks = replace(LOCAL, abilities=LOCAL.abilities | {"reasoning"})
    assert call.outgoing(thinks)[0].body["reasoning_effort"] in ("low", "high")


def test_null_asks_for_nothing() -> None:
    read({**HELLO, "container": None, "tools": None, "speed": None, "whatever": None})
