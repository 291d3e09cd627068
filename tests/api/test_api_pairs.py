"""What came in one dialect leaves in another: exactly as it came where both are the same, else complete or refused."""

from dataclasses import replace
from typing import Any

import pytest

from appliance.errors import Unsupported
from appliance.wire.anthropic.outbound import write_message_body
from appliance.wire.gemini.outbound import write_content_body
from appliance.wire.responses.outbound import write_response_body
from tests.tasks.rows import hosted
from tests.wire.readers import read_contents, read_messages, read_responses

PIXEL = "iVBORw0KGgo="
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
MARK = {"type": "ephemeral"}
WRITERS: dict[str, Any] = {
    "anthropic": write_message_body,
    "gemini": write_content_body,
    "openai": write_response_body,
}

MESSAGES: dict[str, Any] = {
    "max_tokens": 3000,
    "system": [{"type": "text", "text": "s", "cache_control": MARK}],
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "x"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "text", "text": "y"},
                {"type": "tool_use", "id": "1", "name": "f", "input": {"city": "Bonn"}},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "1", "content": "r", "is_error": True}],
        },
    ],
    "tools": [{"name": "f", "input_schema": SCHEMA, "cache_control": MARK}],
}
ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
    {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"city":"Bonn"}'},
    {"type": "function_call_output", "call_id": "1", "output": "r"},
]
RESPONSES: dict[str, Any] = {
    "instructions": "s",
    "input": ITEMS,
    "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
    "max_output_tokens": 50,
}
CONTENTS: dict[str, Any] = {
    "systemInstruction": {"parts": [{"text": "s"}]},
    "contents": [
        {"role": "user", "parts": [{"text": "x"}, {"inlineData": {"mimeType": "image/png", "data": PIXEL}}]},
        {
            "role": "model",
            "parts": [{"functionCall": {"name": "f", "args": {"city": "Bonn"}}, "thoughtSignature": "c2ln"}],
        },
        {"role": "user", "parts": [{"functionResponse": {"name": "f", "response": {"result": "r"}}}]},
    ],
    "tools": [{"functionDeclarations": [{"name": "f", "parametersJsonSchema": SCHEMA}]}],
    "generationConfig": {"maxOutputTokens": 50},
}
READERS: list[tuple[Any, dict[str, Any]]] = [
    (read_messages, MESSAGES),
    (read_responses, RESPONSES),
    (lambda body: read_contents(body, "auto"), CONTENTS),
]


def leaves(read: Any, body: dict[str, Any], dialect: Any) -> Any:
    _, (call,) = read(body)
    target = replace(hosted("chat", "tools", "vision", "reasoning"), dialect=dialect)
    (sent,) = call.outgoing(target)
    return WRITERS[dialect](target, sent.body)


@pytest.mark.parametrize("dialect", list(WRITERS))
@pytest.mark.parametrize(("read", "body"), READERS)
def test_a_conversation_with_a_tool_leaves_in_every_dialect(read: Any, body: dict[str, Any], dialect: str) -> None:
    text = repr(leaves(read, body, dialect))
    assert all(word in text for word in ("'s'", "'x'", "Bonn", "'r'", "'f'"))


def test_anthropics_own_body_leaves_as_it_came() -> None:
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "stop_sequences": ["z"]}
    left = leaves(read_messages, {**MESSAGES, **thinking}, "anthropic")
    assert {name: left[name] for name in (*MESSAGES, *thinking)} == {**MESSAGES, **thinking}


@pytest.mark.parametrize(
    ("dialect", "change", "param"),
    [("openai", {"stop_sequences": ["z"]}, "stop"), ("openai", {"top_k": 5}, "top_k")],
)
def test_what_the_other_side_has_no_place_for_is_refused_before_it_leaves(
    dialect: str, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(Unsupported) as refused:
        leaves(read_messages, {**MESSAGES, **change}, dialect)
    assert refused.value.param == param
