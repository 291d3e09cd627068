"""Tools and reasoning over HTTP, with a real engine and a model too small to be trusted with anything."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.llamacpp.engine_program import Program, end, health, start, until
from tests.llamacpp.written_calls import SCHEMAS, TOOLS

pytestmark = pytest.mark.anyio

TURNS = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content -}}
{% for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"""
TOOL_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\nCall tools as <tool_call>\n{json}\n</tool_call>: ' }}"
    "{{ tools | tojson }}{{ '<|im_end|>\n' }}{% endif %}" + TURNS + "{% endif %}"
)
THINKING_TEMPLATE = TURNS + (
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def served(model: Path, folder: Path, template: str) -> Iterator[Program]:
    file = folder / "template.jinja"
    file.write_text(template)
    running = start(folder, model, "--chat-template", str(file), "--context-tokens", "4096", "--sequences", "4")
    until(lambda: health(running.uds) == 200, "the engine")
    yield running
    end(running)


@pytest.fixture(scope="module")
def tool_engine(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    yield from served(smollm2_path, tmp_path_factory.mktemp("tools"), TOOL_TEMPLATE)


@pytest.fixture(scope="module")
def thinking_engine(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    yield from served(smollm2_path, tmp_path_factory.mktemp("thinking"), THINKING_TEMPLATE)


async def ask(program: Program, **body: Any) -> dict[str, Any]:
    async with program.client() as http:
        reply = await http.post("/v1/chat/completions", json={"messages": WEATHER, "max_tokens": 100, **body})
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


async def stream(program: Program, **body: Any) -> list[dict[str, Any]]:
    async with program.client() as http:
        whole = {"messages": WEATHER, "max_tokens": 100, "stream": True, **body}
        reply = await http.post("/v1/chat/completions", json=whole)
    assert reply.status_code == 200, reply.text
    *events, done = [line[6:] for line in reply.text.splitlines() if line]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


def together(events: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The message that a client puts together from its deltas, as the whole reply has it."""
    message: dict[str, Any] = {"content": "", "calls": [], "finish_reason": None}
    for event in events:
        for choice in event["choices"]:
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    message["calls"].append([call["function"]["name"], ""])
                message["calls"][call["index"]][1] += call["function"]["arguments"]
            message["finish_reason"] = choice["finish_reason"] or message["finish_reason"]
    return message


def check(call: dict[str, Any]) -> None:
    assert call["type"] == "function" and call["id"].startswith("call_")
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])


async def refused(program: Program, **body: Any) -> dict[str, Any]:
    async with program.client() as http:
        reply = await http.post("/v1/chat/completions", json={"messages": WEATHER, **body})
    assert reply.status_code == 400, reply.text
    error: dict[str, Any] = reply.json()["error"]
    return error


async def test_the_engine_says_what_it_found_that_its_model_can_do(
    tool_engine: Program, thinking_engine: Program
) -> None:
    async with tool_engine.client() as http:
        tools = (await http.get("/v1/models")).json()["data"][0]["meta"]
    async with thinking_engine.client() as http:
        thinking = (await http.get("/v1/models")).json()["data"][0]["meta"]
    assert (tools["tool_format"], tools["reasoning_format"]) == ("hermes", None)
    assert (thinking["tool_format"], thinking["reasoning_format"]) == (None, "think")
    assert set(tools["abilities"]) ^ set(thinking["abilities"]) == {"tools", "reasoning"}


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("choice", ["required", NAMED])
async def test_a_forced_call_has_arguments_that_fit_its_schema_whatever_the_model_would_say(
    tool_engine: Program, choice: Any, temperature: float
) -> None:
    answer = await ask(tool_engine, tools=TOOLS, tool_choice=choice, temperature=temperature, n=3, max_tokens=300)
    for number in answer["choices"]:
        message = number["message"]
        assert message["tool_calls"] and message["content"] is None
        finished = message["tool_calls"] if number["finish_reason"] == "tool_calls" else message["tool_calls"][:-1]
        for call in finished:
            check(call)
        if choice == NAMED and number["finish_reason"] == "tool_calls":
            assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather"]


async def test_one_call_at_most_where_parallel_ones_are_not_wanted(tool_engine: Program) -> None:
    answer = await ask(tool_engine, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, temperature=1, n=4)
    for choice in answer["choices"]:
        assert len(choice["message"]["tool_calls"]) == 1


async def test_a_stream_gives_the_same_message_as_the_whole_reply(tool_engine: Program) -> None:
    body: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "temperature": 0}
    (choice,) = (await ask(tool_engine, **body))["choices"]
    events = await stream(tool_engine, **body, stream_options={"include_usage": True})
    streamed = together(events)
    function = choice["message"]["tool_calls"][0]["function"]
    assert streamed["calls"] == [[function["name"], function["arguments"]]]
    assert (streamed["content"], streamed["finish_reason"]) == ("", choice["finish_reason"])
    assert events[-1]["usage"]["completion_tokens"] > 0
    pieces = [event for event in events if any("tool_calls" in one["delta"] for one in event["choices"])]
    assert len(pieces) > 2, "the arguments come as they are written"


async def test_streams_of_several_choices_keep_their_calls_apart(tool_engine: Program) -> None:
    events = await stream(tool_engine, tools=TOOLS, tool_choice=NAMED, temperature=1, seed=3, n=3, max_tokens=200)
    for index in range(3):
        message = together(events, index)
        ((name, arguments),) = message["calls"]
        if message["finish_reason"] == "tool_calls":
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])


async def test_free_text_stays_free_while_tools_are_on_offer(tool_engine: Program) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Count: one, two,"}], "temperature": 0}
    (choice,) = (await ask(tool_engine, **body, tools=TOOLS, logprobs=True, max_tokens=20))["choices"]
    assert choice["message"]["content"] and "tool_calls" not in choice["message"]
    written = "".join(token["token"] for token in choice["logprobs"]["content"])
    assert written.startswith(choice["message"]["content"])


async def test_a_call_that_the_length_cuts_off_is_reported_as_what_it_is(tool_engine: Program) -> None:
    (choice,) = (await ask(tool_engine, tools=TOOLS, tool_choice=NAMED, max_tokens=20, temperature=0))["choices"]
    assert choice["finish_reason"] == "length"
    for call in choice["message"].get("tool_calls", ()):
        assert not call["function"]["arguments"].endswith("}")


async def test_stop_strings_are_looked_for_in_content_and_not_in_arguments(tool_engine: Program) -> None:
    answer = await ask(tool_engine, tools=TOOLS, tool_choice=NAMED, stop=['"', "{"], temperature=0, max_tokens=300)
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    said = {"messages": [{"role": "user", "content": "Count: one, two, three, four"}], "temperature": 0}
    (free,) = (await ask(tool_engine, **said, tools=TOOLS, max_tokens=30))["choices"]
    word = free["message"]["content"].split()[2]
    (stopped,) = (await ask(tool_engine, **said, tools=TOOLS, max_tokens=30, stop=word))["choices"]
    assert word not in stopped["message"]["content"]
    assert free["message"]["content"].startswith(stopped["message"]["content"])
    assert stopped["finish_reason"] == "stop"


async def test_calls_and_their_results_go_back_into_the_template(tool_engine: Program) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    history = [
        *WEATHER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "21 degrees"},
    ]
    async with tool_engine.client() as http:
        counted = (await http.post("/tokenize", json={"messages": history})).json()["count"]
        without = (await http.post("/tokenize", json={"messages": [WEATHER[0], history[2]]})).json()["count"]
    assert counted > without + 15
    assert (await ask(tool_engine, messages=history, tools=TOOLS, max_tokens=5))["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0]"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "banana"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"banana": 1}}, "chat_template_kwargs.banana"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "strict": True,
                            "parameters": {"properties": {"a": {"not": {"type": "string"}}}},
                        },
                    }
                ]
            },
            "tools",
        ),
    ],
)
async def test_what_cannot_be_done_with_tools_is_refused_by_name(
    tool_engine: Program, body: dict[str, Any], param: str
) -> None:
    assert (await refused(tool_engine, **body))["param"] == param


async def test_a_model_without_tools_refuses_them(thinking_engine: Program) -> None:
    error = await refused(thinking_engine, tools=TOOLS)
    assert error["param"] == "tools" and "no place for tools" in error["message"]


async def test_thoughts_are_told_apart_and_counted(thinking_engine: Program) -> None:
    answer = await ask(thinking_engine, max_tokens=30, temperature=0)
    message, usage = answer["choices"][0]["message"], answer["usage"]
    assert message["reasoning_content"] and message["content"] == ""
    assert usage["completion_tokens_details"]["reasoning_tokens"] == usage["completion_tokens"]
    events = await stream(thinking_engine, max_tokens=30, temperature=0)
    thoughts = [one["delta"].get("reasoning_content", "") for event in events for one in event["choices"]]
    assert "".join(thoughts) == message["reasoning_content"]


@pytest.mark.parametrize("body", [{"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}])
async def test_thinking_can_be_switched_off(thinking_engine: Program, body: dict[str, Any]) -> None:
    answer = await ask(thinking_engine, max_tokens=20, temperature=0, **body)
    message = answer["choices"][0]["message"]
    assert message["content"] and "reasoning_content" not in message
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


NINE = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
AS_NINE = {"type": "json_schema", "json_schema": {"name": "nine", "schema": NINE}}


async def test_json_is_written_without_thoughts_unless_they_are_asked_for(thinking_engine: Program) -> None:
    answer = await ask(thinking_engine, response_format=AS_NINE, temperature=0)
    message = answer["choices"][0]["message"]
    jsonschema.validate(json.loads(message["content"]), NINE)
    assert "reasoning_content" not in message


@pytest.mark.slow
async def test_json_stands_behind_thoughts_that_were_asked_for(thinking_engine: Program) -> None:
    answer = await ask(
        thinking_engine, response_format=AS_NINE, temperature=1.5, reasoning_effort="low", max_tokens=600
    )
    (choice,) = answer["choices"]
    assert choice["message"]["reasoning_content"]
    if choice["message"]["content"] and choice["finish_reason"] == "stop":
        jsonschema.validate(json.loads(choice["message"]["content"]), NINE)


async def test_a_label_is_read_where_the_answer_begins_and_not_the_thoughts(thinking_engine: Program) -> None:
    async with thinking_engine.client() as http:
        plain = (await http.post("/tokenize", json={"messages": WEATHER})).json()["tokens"]
        shut = (await http.post("/tokenize", json={"content": "<think>\n\n</think>\n\n"})).json()["tokens"]
    assert plain[-len(shut) :] == shut


async def test_a_plain_reply_has_no_fields_of_tools_or_reasoning(tool_engine: Program) -> None:
    answer = await ask(tool_engine, max_tokens=3)
    assert set(answer["choices"][0]["message"]) == {"role", "content", "refusal"}
    assert "completion_tokens_details" not in answer["usage"]


async def test_a_template_that_cannot_be_read_keeps_the_engine_from_starting(
    smollm2_path: Path, tmp_path: Path
) -> None:
    running = start(tmp_path, smollm2_path, "--chat-template", str(tmp_path / "missing"))
    assert running.process.wait(30) == 3
    assert "missing" in running.events()[-1]["reason"] or any("missing" in str(event) for event in running.events())
    end(running)
