"""A conversation with tools, by the official SDK, with a real model that was taught to call them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.running import RunningNode, running_node

pytestmark = pytest.mark.slow

MODEL = "qwen2.5-coder-1.5b-instruct"
ORDER: Any = {
    "type": "function",
    "function": {
        "name": "find_order",
        "description": "Look an order up by its number",
        "parameters": {"type": "object", "properties": {"number": {"type": "string"}}, "required": ["number"]},
    },
}
START: list[Any] = [
    {
        "role": "system",
        "content": "You are a support agent. First call find_order. After you have seen its <tool_response>, answer "
        "the customer in one plain sentence, without JSON and without another call.",
    },
    {"role": "user", "content": "Where is my order 4711?"},
]
RESULT = '{"status": "shipped", "carrier": "DHL", "arrives": "Friday"}'


@pytest.fixture(scope="module")
def tool_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    """Needs a gigabyte that no other test does, so it is not pulled: APPLIANCE_TEST_TOOL_MODEL names the file."""
    given = os.environ.get("APPLIANCE_TEST_TOOL_MODEL")
    if not given:
        pytest.skip(f"APPLIANCE_TEST_TOOL_MODEL does not name the GGUF file of {MODEL} (q4_k_m)")
    home = tmp_path_factory.mktemp("tools")
    folder = home / "models" / MODEL
    folder.mkdir(parents=True)
    (folder / "q4_k_m.gguf").symlink_to(Path(given).resolve())
    engine = "[engine]\ncontext_tokens = 4096\nsequences = 2\n"
    with running_node(home, config=engine, arguments=["--model", MODEL], seconds=180) as running:
        yield running


def turn(client: openai.OpenAI, messages: list[Any], *, streamed: bool) -> Any:
    body: dict[str, Any] = {
        "model": "auto",
        "messages": messages,
        "tools": [ORDER],
        "temperature": 0,
        "max_tokens": 100,
    }
    if not streamed:
        return client.chat.completions.create(**body).choices[0]
    with client.chat.completions.stream(**body) as stream:
        for _ in stream:
            pass
        return stream.get_final_completion().choices[0]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_question_becomes_a_call_and_its_result_an_answer(tool_node: RunningNode, streamed: bool) -> None:
    client = openai.OpenAI(base_url=f"{tool_node.url}/v1", api_key="none", max_retries=0)
    asked = turn(client, START, streamed=streamed)
    assert asked.finish_reason == "tool_calls"
    (call,) = asked.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("find_order", '{"number": "4711"}')
    made = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": "find_order", "arguments": call.function.arguments},
            }
        ],
    }
    result = {"role": "tool", "tool_call_id": call.id, "content": RESULT}
    answered = turn(client, [*START, made, result], streamed=streamed)
    assert answered.finish_reason == "stop" and not answered.message.tool_calls
    assert "DHL" in answered.message.content and "Friday" in answered.message.content


def test_a_forced_call_and_what_the_model_cannot_do(tool_node: RunningNode) -> None:
    client = openai.OpenAI(base_url=f"{tool_node.url}/v1", api_key="none", max_retries=0)
    named: Any = {"type": "function", "function": {"name": "find_order"}}
    forced = client.chat.completions.create(
        model="auto", messages=[{"role": "user", "content": "Hi."}], tools=[ORDER], tool_choice=named, max_tokens=60
    )
    calls = forced.choices[0].message.tool_calls
    assert calls is not None
    assert [call.function.name for call in calls if call.type == "function"] == ["find_order"]
    with pytest.raises(openai.BadRequestError, match="cannot do reasoning"):
        client.chat.completions.create(model="auto", messages=START, reasoning_effort="high")
    shown = client.models.retrieve(f"onsite/{MODEL}").model_dump()
    assert "tools" in shown["abilities"] and "reasoning" not in shown["abilities"]


def test_a_model_without_tools_is_not_offered_requests_with_tools(node: RunningNode) -> None:
    client = openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="cannot do tools"):
        client.chat.completions.create(model="auto", messages=START, tools=[ORDER])
