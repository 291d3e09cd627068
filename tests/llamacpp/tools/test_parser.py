"""Every family's way to call tools and to think aloud is read, whole and in pieces of any size, to the same message."""

import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core import ToolFormat
from appliance.llamacpp.tools.formats import SYNTAXES, find_reasoning_format, find_tool_format
from appliance.llamacpp.tools.parser import ReplySyntaxes, ToolCallBroken
from tests.llamacpp.written_calls import ARGUMENTS, SCHEMAS, TWO_CALLS, deepseek, read

FORMATS = sorted(TWO_CALLS)
BOTH = [["get_weather", ARGUMENTS], ["now", "{}"]]


def as_format(format: ToolFormat, **more: Any) -> ReplySyntaxes:
    return ReplySyntaxes(tools=format, schemas=SCHEMAS, **more)


def every_cut(text: str) -> range:
    return range(1, len(text))


def test_every_format_that_has_a_name_is_known_and_tested() -> None:
    assert set(SYNTAXES) == set(get_args(ToolFormat)) == set(TWO_CALLS)


@pytest.mark.parametrize("format", FORMATS)
def test_two_calls_are_read_whole_and_character_by_character(format: ToolFormat) -> None:
    text = TWO_CALLS[format]
    whole = read(text, as_format(format))
    assert [[name, json.loads(arguments)] for name, arguments in whole.calls] == [
        [name, json.loads(arguments)] for name, arguments in BOTH
    ]
    assert whole.content == ""
    assert read(text, as_format(format), every_cut(text)) == whole


@pytest.mark.parametrize("format", FORMATS)
def test_it_does_not_matter_where_one_cut_is(format: ToolFormat) -> None:
    text = TWO_CALLS[format]
    whole = read(text, as_format(format))
    for cut in every_cut(text):
        assert read(text, as_format(format), [cut]) == whole


# A Llama or a Pythonic call is one only at the very start of a reply.
@pytest.mark.parametrize("format", [one for one in FORMATS if not SYNTAXES[one].bare and one != "harmony"])
def test_words_before_a_call_are_content_without_the_space_between(format: ToolFormat) -> None:
    text = f"Let me look.\n\n{TWO_CALLS[format]}"
    message = read(text, as_format(format), every_cut(text))
    assert message.content == "Let me look."
    assert [name for name, _ in message.calls] == ["get_weather", "now"]


@pytest.mark.parametrize("format", [one for one in FORMATS if one != "harmony"])
def test_thoughts_before_a_call_are_reasoning(format: ToolFormat) -> None:
    for opened, text in ((False, "<think>\nHm,\n\nwell.\n</think>\n\n"), (True, "\nHm,\n\nwell.\n</think>\n\n")):
        text += TWO_CALLS[format]
        read_as = as_format(format, reasoning="think", thinking_open=opened)
        message = read(text, read_as)
        assert message.reasoning == "Hm,\n\nwell."
        assert [name for name, _ in message.calls] == ["get_weather", "now"]
        assert read(text, read_as, every_cut(text)) == message


@pytest.mark.parametrize("format", FORMATS)
def test_a_reply_that_its_length_cut_off_anywhere_is_told_as_far_as_it_goes(format: ToolFormat) -> None:
    text = TWO_CALLS[format]
    for stop in every_cut(text):
        message = read(text[:stop], as_format(format), cut=True)
        assert read(text[:stop], as_format(format), every_cut(text[:stop]), cut=True) == message
        for (name, arguments), (whole_name, whole) in zip(message.calls, BOTH, strict=False):
            assert name == whole_name
            assert whole.startswith(arguments)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("text", ["", "Just words.", "  spaced  \n", "1 < 2 and {a: [1]} or f(x)", "`code` [x] <b>"])
def test_words_alone_stay_as_they_are(format: ToolFormat, text: str) -> None:
    for cuts in ((), every_cut(text)):
        message = read(text, as_format(format), cuts)
        assert (message.content, message.calls) == (text, [])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_splitting_of_any_text_gives_the_same_message(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(FORMATS))
    call = TWO_CALLS[format]
    pieces = [call, call[: len(call) // 2], call[3:], "<think>", "</think>", "```json\n", '{"name": "now"', "\n", "a{"]
    text = "".join(data.draw(st.lists(st.one_of(st.sampled_from(pieces), st.text(max_size=8)), max_size=4)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    read_as = as_format(format, reasoning=data.draw(st.sampled_from([None, "think"])))
    cut = data.draw(st.booleans())
    try:
        whole = read(text, read_as, cut=cut)
    except ToolCallBroken:
        with pytest.raises(ToolCallBroken):
            read(text, read_as, cuts, cut=cut)
        return
    assert read(text, read_as, cuts, cut=cut) == whole
    if not cut:
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in whole.calls)


# What single families do


@pytest.mark.parametrize(
    ("format", "text", "calls", "content"),
    [
        ("hermes", '<tool_call>{"arguments": {"city": "x"}, "name": "get_weather"}</tool_call>', 1, ""),
        ("hermes", '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"x\\"}"}</tool_call>', 1, ""),
        ("hermes", '<tool_call>{"name": "now"}</tool_call>', 1, ""),
        ("hermes", '<tool_call>{"name": "now", "arguments": null, "id": "7"}</tool_call> done', 1, " done"),
        ("hermes", "<tool_call>nothing</tool_call>", 0, "<tool_call>nothing</tool_call>"),
        ("hermes", '```json\n{\n "name": "now",\n "arguments": {}\n}\n```', 1, ""),
        ("hermes", '<tools>\n{"name": "now", "arguments": {}}\n</tools>', 1, ""),
        ("hermes", '{{"name": "now", "parameters": {}}}', 1, ""),
        (
            "hermes",
            '```json\n{"name": "other", "arguments": {}}\n```',
            0,
            '```json\n{"name": "other", "arguments": {}}\n```',
        ),
        ("hermes", "```python\nprint({1: 2})\n```", 0, "```python\nprint({1: 2})\n```"),
        ("phi4", 'functools[{"name": "now", "arguments": {}}]', 1, ""),
        ("phi4", "use functools.cache", 0, "use functools.cache"),
        ("mistral_named", "[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}", 1, ""),
        ("mistral_named", '[TOOL_CALLS][{"name": "now", "arguments": {}}]', 1, ""),
        ("llama3", '<|python_tag|>{"type": "function", "name": "now", "parameters": {}}', 1, ""),
        ("llama3", '{"answer": 42}', 0, '{"answer": 42}'),
        ("qwen3_coder", "<function=now>\n</function>", 1, ""),
        ("pythonic", "[get_weather(city='it\\'s (fine)', hourly=True)]", 1, ""),
        ("pythonic", "[1] is a footnote", 0, "[1] is a footnote"),
    ],
)
def test_what_models_really_write(format: ToolFormat, text: str, calls: int, content: str) -> None:
    message = read(text, as_format(format), every_cut(text))
    assert len(message.calls) == calls
    assert message.content == content
    assert all(isinstance(json.loads(arguments), dict) for _, arguments in message.calls)


def test_tagged_values_are_typed_by_the_schema() -> None:
    text = (
        '<tool_call>\n<function=get_weather>\n<parameter=city>\n7 "quoted"\nlines\n</parameter>\n'
        "<parameter=days>\n7\n</parameter>\n<parameter=hourly>\ntrue\n</parameter>\n</function>\n</tool_call>"
    )
    (call,) = read(text, as_format("qwen3_coder"), every_cut(text)).calls
    assert json.loads(call[1]) == {"city": '7 "quoted"\nlines', "days": 7, "hourly": True}


def test_channels_are_reasoning_comment_call_and_answer() -> None:
    text = (
        "<|channel|>analysis<|message|>Which city?<|end|><|start|>assistant<|channel|>commentary<|message|>I look."
        "<|end|><|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>"
        f"{ARGUMENTS}<|call|>"
    )
    for read_as in (as_format("harmony"), ReplySyntaxes(reasoning="harmony")):
        message = read(text, read_as, every_cut(text))
        assert (message.reasoning, message.content) == ("Which city?", "I look.")
        assert message.calls == [["get_weather", ARGUMENTS]]
    final = "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>"
    assert read(final, ReplySyntaxes(reasoning="harmony")).content == "Four."


def test_a_call_that_ends_before_its_arguments_do_is_an_error_and_no_call() -> None:
    with pytest.raises(ToolCallBroken, match="ends before"):
        read('<tool_call>\n{"name": "get_weather", "arguments": {"city": "P', as_format("hermes"))


def test_without_tools_markup_is_text_and_thoughts_are_still_told_apart() -> None:
    text = f"<think>hm</think>\n{TWO_CALLS['hermes']}"
    message = read(text, ReplySyntaxes(reasoning="think"), every_cut(text))
    assert (message.reasoning, message.content, message.calls) == ("hm", TWO_CALLS["hermes"], [])


def test_a_reply_may_end_inside_its_thoughts() -> None:
    message = read("half a thou", ReplySyntaxes(reasoning="think", thinking_open=True), cut=True)
    assert (message.reasoning, message.content) == ("half a thou", "")


@pytest.mark.parametrize(
    ("template", "format"),
    [
        ("{{ tools }} return <tool_call>\n{json}\n</tool_call>", "hermes"),
        ("{{ tools }} <tool_call>[{json}]</tool_call>", "hermes_list"),
        ("<tool_call>\n<function=a>\n<parameter=b>", "qwen3_coder"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS] [{", "mistral"),
        ("[TOOL_CALLS]{{ name }}[ARGS]", "mistral_named"),
        ("<|channel|>analysis<|message|>", "harmony"),
        ('Environment: ipython {"name": f, "parameters": d}', "llama3"),
        (deepseek("tool calls begin") + "```json", "deepseek_v3"),
        (deepseek("tool calls begin"), "deepseek_v31"),
        ("<tool_call>{{ n }}<arg_key>", "glm"),
        ("<|tool|>{{ tools }}<|/tool|>", "phi4"),
        ("<|tool_call|>", "granite"),
        ("<|tool_call_start|>", "lfm2"),
        ("[func_name1(params_name1=params_value1)]", "pythonic"),
        ("{{ messages }}", None),
    ],
)
def test_the_format_is_told_by_the_template(template: str, format: str | None) -> None:
    assert find_tool_format(template) == format


def test_reasoning_is_told_by_the_template() -> None:
    assert find_reasoning_format("<think>\n\n</think>") == "think"
    assert find_reasoning_format("[THINK][/THINK]") == "mistral_think"
    assert find_reasoning_format("<|channel|><|message|>") == "harmony"
    assert find_reasoning_format("{{ messages }}") is None
