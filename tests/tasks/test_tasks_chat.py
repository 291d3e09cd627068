"""Chat and completions: envelopes checked, bodies verbatim, replies verified."""

from dataclasses import replace
from typing import Any

import pytest

from appliance.errors import BackendGarbage, RejectedReply
from appliance.tasks import chat, completions
from appliance.wire.openai.stream import write_chat_stream
from tests.tasks.rows import LOCAL, chat_payload, hosted, refusal, reply

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer"}},
    "required": ["age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def test_a_chat_body_travels_on_verbatim_with_the_fields_nobody_knows() -> None:
    body = {"messages": HELLO, "reasoning_effort": "low", "x_new": {"a": [1]}, "stream": True}
    asked, (call,) = chat.read_chat_request(body)
    (outgoing,) = call.outgoing(LOCAL)
    assert outgoing.path == "/chat/completions"
    assert outgoing.body is body
    assert (asked.model, asked.stream, call.stream, asked.format) == ("auto", True, True, "text")


def test_all_text_is_seen_in_order_with_tool_calls_arguments() -> None:
    messages = [
        {"role": "system", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "text", "text": "three"}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "four", "arguments": '{"five": 5}'}}]},
        {"role": "tool", "content": "six"},
    ]
    asked, _ = chat.read_chat_request({"messages": messages})
    assert asked.text == 'one\ntwo\nthree\nfour\n{"five": 5}\nsix'


@pytest.mark.parametrize(
    ("extra", "needs"),
    [
        ({}, {"chat"}),
        ({"logprobs": True, "top_logprobs": 3}, {"chat", "logprobs"}),
        ({"response_format": FORMAT}, {"chat", "json_schema"}),
        ({"response_format": {"type": "json_object"}}, {"chat", "json_schema"}),
        ({"tools": [TOOL]}, {"chat", "tools"}),
        ({"tools": [TOOL], "tool_choice": "none"}, {"chat"}),
        ({"reasoning_effort": "low"}, {"chat", "reasoning"}),
        ({"reasoning_effort": "none"}, {"chat"}),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
            {"chat", "vision"},
        ),
    ],
)
def test_what_a_body_needs_of_a_target_is_read_from_it(extra: dict[str, Any], needs: set[str]) -> None:
    asked, _ = chat.read_chat_request({"messages": HELLO, **extra})
    assert asked.needs == needs


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"messages": None}, "messages", "missing"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": "Hello"}, "messages", "list"),
        ({"messages": ["Hello"]}, "messages[0]", "object"),
        ({"messages": [{"content": "Hello"}]}, "messages[0].role", "None"),
        ({"messages": [{"role": "robot", "content": "Hello"}]}, "messages[0].role", "'robot'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "5"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", "'x'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "string"),
        ({"model": 5}, "model", "5"),
        ({"model": ""}, "model", "''"),
        ({"n": 0}, "n", "from 1 to 128"),
        ({"n": 129}, "n", "129"),
        ({"n": True}, "n", "True"),
        ({"stream": "yes"}, "stream", "'yes'"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens", "1.5"),
        ({"temperature": 2.5}, "temperature", "from 0 to 2"),
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"top_p": 1.1}, "top_p", "1.1"),
        ({"presence_penalty": -3}, "presence_penalty", "-3"),
        ({"seed": 1e30}, "seed", "1e+30"),
        ({"stop": 5}, "stop", "5"),
        ({"stop": ["a", 5]}, "stop", "list of strings"),
        ({"stop": ["a"] * 17}, "stop", "17"),
        ({"logprobs": 1}, "logprobs", "1"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "21"),
        ({"stream_options": 1}, "stream_options", "1"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "1"),
        ({"response_format": "json"}, "response_format", "'json'"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "missing",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objct"}}}},
            "response_format.json_schema.schema",
            "'objct'",
        ),
        ({"tools": {}}, "tools", "list"),
        ({"tools": [{"type": "function"}]}, "tools[0]", "function"),
        ({"tools": [TOOL], "tool_choice": 5}, "tool_choice", "5"),
    ],
)
def test_a_wrong_chat_field_is_refused_by_name_with_its_value(change: dict[str, Any], param: str, words: str) -> None:
    error = refusal(chat.read_chat_request, {"messages": HELLO, **change})
    assert error.param == param
    assert words in error.message
    assert param in error.message


def test_a_long_prompt_is_not_repeated_in_the_error_about_it() -> None:
    error = refusal(chat.read_chat_request, {"messages": "secret " * 1000})
    assert len(error.message) < 200


def test_streams_that_must_be_verified_are_asked_for_whole() -> None:
    body = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}, "response_format": FORMAT}
    asked, (call,) = chat.read_chat_request(body)
    assert asked.stream and not call.stream
    (outgoing,) = call.outgoing(LOCAL)
    assert "stream" not in outgoing.body and "stream_options" not in outgoing.body
    assert outgoing.body["response_format"] == FORMAT


def test_tool_calls_are_streamed_where_the_engine_holds_them_to_their_schemas_and_whole_elsewhere() -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    _, (call,) = chat.read_chat_request({"messages": HELLO, "stream": True, "tools": tools})
    assert call.streams(LOCAL) and call.outgoing(LOCAL)[0].body["stream"] is True
    for other in (hosted("chat", "tools"), replace(LOCAL, abilities=LOCAL.abilities - {"labels"})):
        assert not call.streams(other) and "stream" not in call.outgoing(other)[0].body


def test_a_valid_json_reply_is_handed_on_untouched() -> None:
    _, (call,) = chat.read_chat_request({"messages": HELLO, "response_format": FORMAT})
    payload = chat_payload('{"age": 5}', x_vendor={"a": 1})
    assert call.read(LOCAL, [reply(payload)]).payload is payload


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (chat_payload('{"age": "five"}'), "$.age"),
        (chat_payload('{"age": 5'), "not valid JSON"),
        (chat_payload('{"age": 5}', finish_reason="length"), "cut off"),
        (chat_payload(None), "no content"),
        (chat_payload("[1]"), "does not match"),
    ],
)
def test_a_reply_that_is_not_the_json_asked_for_is_rejected(payload: dict[str, Any], words: str) -> None:
    _, (call,) = chat.read_chat_request({"messages": HELLO, "response_format": FORMAT})
    with pytest.raises(RejectedReply, match=words.replace("$", r"\$")):
        call.read(LOCAL, [reply(payload)])


def test_any_json_object_will_do_for_json_object_and_nothing_else() -> None:
    _, (call,) = chat.read_chat_request({"messages": HELLO, "response_format": {"type": "json_object"}})
    call.read(LOCAL, [reply(chat_payload('{"anything": []}'))])
    with pytest.raises(RejectedReply):
        call.read(LOCAL, [reply(chat_payload("[1]"))])


def test_a_refusal_is_an_answer_and_not_a_broken_json() -> None:
    _, (call,) = chat.read_chat_request({"messages": HELLO, "response_format": FORMAT})
    payload = chat_payload(None, message={"refusal": "I will not."})
    assert call.read(LOCAL, [reply(payload)]).payload is payload


@pytest.mark.parametrize(
    ("function", "accepted"),
    [
        ({"name": "weather", "arguments": '{"city": "Bonn"}'}, True),
        ({"name": "weather", "arguments": ""}, True),
        ({"name": "wether", "arguments": "{}"}, False),
        ({"name": "weather", "arguments": "{"}, False),
        ({"name": "weather", "arguments": "[]"}, False),
        ({"name": "weather", "arguments": {"city": "Bonn"}}, False),
    ],
)
def test_tool_calls_must_name_an_offered_tool_with_json_arguments(function: dict[str, Any], accepted: bool) -> None:
    _, (call,) = chat.read_chat_request({"messages": HELLO, "tools": [TOOL]})
    calls = [{"id": "t", "type": "function", "function": function}]
    payload = chat_payload(None, message={"tool_calls": calls})
    if accepted:
        assert call.read(LOCAL, [reply(payload)]).payload is payload
    else:
        with pytest.raises(RejectedReply):
            call.read(LOCAL, [reply(payload)])


def test_only_the_last_call_of_a_reply_that_was_cut_off_may_be_unfinished() -> None:
    _, (call,) = chat.read_chat_request({"messages": HELLO, "tools": [TOOL]})
    whole = {"id": "t", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    half = {"id": "u", "type": "function", "function": {"name": "weather", "arguments": '{"ci'}}
    cut = chat_payload(None, message={"tool_calls": [whole, half]}, finish_reason="length")
    assert call.read(LOCAL, [reply(cut)]).payload is cut
    for calls, end in (([half, whole], "length"), ([whole, half], "tool_calls")):
        broken = chat_payload(None, message={"tool_calls": calls}, finish_reason=end)
        with pytest.raises(RejectedReply):
            call.read(LOCAL, [reply(broken)])


@pytest.mark.parametrize("payload", [None, [], {}, {"choices": []}, {"choices": [5]}, {"choices": [{"message": "x"}]}])
def test_a_reply_without_choices_is_garbage(payload: Any) -> None:
    _, (call,) = chat.read_chat_request({"messages": HELLO})
    with pytest.raises(BackendGarbage):
        call.read(LOCAL, [reply(payload)])


def test_a_verified_reply_becomes_the_stream_that_was_asked_for() -> None:
    payload = chat_payload('{"age": 5}') | {"usage": {"total_tokens": 3}, "created": 1}
    events = list(write_chat_stream(payload, {"stream_options": {"include_usage": True}}))
    assert len(events) == 4
    assert b'"delta":{"role":"assistant","content":"{\\"age\\": 5}"}' in events[0]
    assert b'"finish_reason":"stop"' in events[1]
    assert b'"usage":{"total_tokens":3}' in events[2]
    assert events[3] == b"data: [DONE]\n\n"


def test_tool_calls_in_a_stream_are_numbered() -> None:
    calls = [{"id": "t", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    events = list(write_chat_stream(chat_payload(None, message={"tool_calls": calls}), {}))
    assert b'"tool_calls":[{"index":0,"id":"t"' in events[0]


def test_a_completions_body_travels_on_verbatim() -> None:
    body = {"prompt": ["one", "two"], "max_tokens": 5, "n": 2, "x_new": 1}
    asked, (call,) = completions.read_completion_request(body)
    assert asked.text == "one\ntwo"
    assert call.output_tokens == 20
    assert call.outgoing(LOCAL)[0].body is body
    payload = {"choices": [{"text": "three"}]}
    assert call.read(LOCAL, [reply(payload)]).payload is payload


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "missing"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": 5}, "prompt", "5"),
        ({"prompt": ["a", 5]}, "prompt[1]", "5"),
        ({"prompt": [1, 2]}, "prompt", "token ids"),
        ({"prompt": [[1, 2]]}, "prompt", "token ids"),
        ({"prompt": "a", "n": 0}, "n", "0"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "0"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "True"),
    ],
)
def test_a_wrong_completions_field_is_refused_by_name(body: dict[str, Any], param: str, words: str) -> None:
    error = refusal(completions.read_completion_request, body)
    assert error.param == param
    assert words in error.message
