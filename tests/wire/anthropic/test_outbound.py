"""What a chat becomes for Anthropic's Messages API. No sockets."""

import pytest

from appliance.errors import RequestError
from appliance.wire.anthropic.outbound import write_message_body
from appliance.wire.anthropic.output_schema import narrow_schema
from tests.wire.targets import ASKED, CALL, claude


def test_results_of_several_tools_and_the_next_question_are_one_turn() -> None:
    other = {**CALL, "id": "c2", "function": {"name": "clock", "arguments": ""}}
    body = write_message_body(
        claude(),
        {
            "messages": [
                ASKED,
                {"role": "assistant", "content": "", "tool_calls": [CALL, other]},
                {"role": "tool", "tool_call_id": "call:1.a", "content": "12", "is_error": True},
                {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "noon"}]},
                {"role": "user", "content": "So?"},
            ]
        },
    )
    assert [turn["role"] for turn in body["messages"]] == ["user", "assistant", "user"]
    used, answered = body["messages"][1]["content"], body["messages"][2]["content"]
    assert [block["id"] for block in used] == ["call_1_a", "c2"] and used[1]["input"] == {}
    assert answered[0] == {"type": "tool_result", "tool_use_id": "call_1_a", "content": "12", "is_error": True}
    assert [block["type"] for block in answered] == ["tool_result", "tool_result", "text"]


def test_later_instructions_keep_their_place() -> None:
    messages = [{"role": "system", "content": "A"}, ASKED, {"role": "developer", "content": "B"}]
    body = write_message_body(claude(), {"messages": messages})
    assert body["system"] == [{"type": "text", "text": "A"}]
    assert [turn["role"] for turn in body["messages"]] == ["user", "system"]


def test_hints_of_caching_are_carried_to_where_they_stood() -> None:
    mark = {"type": "ephemeral"}
    part = {"type": "text", "text": "long", "prompt_cache_breakpoint": {"mode": "explicit"}}
    tool = {"type": "function", "function": {"name": "t"}, "cache_control": {**mark, "ttl": "1h"}}
    called = {"role": "assistant", "tool_calls": [{**CALL, "cache_control": mark}]}
    result = {"role": "tool", "tool_call_id": "call:1.a", "content": "x", "cache_control": mark}
    body = write_message_body(
        claude(), {"messages": [{"role": "user", "content": [part]}, called, result], "tools": [tool]}
    )
    assert body["messages"][0]["content"][0]["cache_control"] == mark
    assert body["messages"][1]["content"][0]["cache_control"] == mark
    assert body["messages"][2]["content"][0]["cache_control"] == mark
    assert body["tools"][0]["cache_control"]["ttl"] == "1h"


def test_anthropics_own_word_on_thinking_counts_more_than_an_effort() -> None:
    given = {"messages": [ASKED], "thinking": {"type": "enabled", "budget_tokens": 5000}, "reasoning_effort": "high"}
    body = write_message_body(claude(), given)
    assert body["thinking"] == given["thinking"] and body["max_tokens"] == 5000 + 8192


@pytest.mark.parametrize("arguments", ["{", "[1]", '"text"'], ids=["no JSON", "a list", "a text"])
def test_arguments_that_are_no_object_are_the_callers_mistake(arguments: str) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    messages = [ASKED, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(RequestError, match=r"messages\[1\].tool_calls\[0\]"):
        write_message_body(claude(), {"messages": messages})


@pytest.mark.parametrize("url", ["data:image/png;base64,@@@", "data:image/png,abc", "data:;base64,AAAA", "ftp://x/y"])
def test_a_picture_that_cannot_be_read_is_the_callers_mistake(url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    with pytest.raises(RequestError):
        write_message_body(claude(), {"messages": [{"role": "user", "content": [part]}]})


def test_a_schema_gets_no_wider_and_its_limits_are_told() -> None:
    schema = {
        "$schema": "x",
        "type": ["object", "null"],
        "properties": {"n": {"type": "integer", "minimum": 1, "description": "How many."}, "minLength": {"const": 3}},
        "oneOf": [{"type": "object"}, {"$ref": "#/$defs/a"}],
        "$defs": {"a": {"type": "array", "items": {"properties": {}}, "minItems": 3}},
    }
    assert narrow_schema(schema) == {
        "type": ["object", "null"],
        "properties": {"n": {"type": "integer", "description": "How many. {minimum: 1}"}, "minLength": {"const": 3}},
        "anyOf": [{"type": "object", "additionalProperties": False}, {"$ref": "#/$defs/a"}],
        "$defs": {
            "a": {
                "type": "array",
                "items": {"properties": {}, "additionalProperties": False},
                "description": "{minItems: 3}",
            }
        },
        "additionalProperties": False,
    }
