"""Whatever a body holds, it is written, refused by a field's name, or the caller's mistake: nothing else is raised."""

import contextlib
import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import orjson
import pytest

from appliance.core import UpstreamCall
from appliance.errors import BackendError, RequestError
from appliance.tasks import chat
from appliance.upstream import client
from appliance.wire.registry import find_outbound
from tests.providers.reached import SPOKEN, Spoken, api_of, row_of, target_of
from tests.providers.speech import THINKS_AND_CALLS
from tests.wire.test_outbound import CLOCK, PNG, WEATHER

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3.5, 1e308, "", "x", "auto", "none", "high", [], [1], ["x"], [{}], [[]], {},
    {"x": 1},
    {"type": "text"}, {"type": "text", "text": "x"}, {"type": "function", "function": {"name": "weather"}},
    {"type": "image_url", "image_url": 5}, {"type": "file", "file": "x"}, {"type": "input_audio", "input_audio": "x"},
)  # fmt: skip

ASK = [{"role": "user", "content": "Hi"}]

SEEDS: tuple[dict[str, Any], ...] = (
    {
        "model": "auto",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {
                "role": "assistant",
                "content": "Let me see.",
                "reasoning_content": "hm",
                "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "c2ln"}],
                "extra_content": {"google": {"thought_signature": "c2ln"}},
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "weather", "arguments": "{}"},
                        "extra_content": {"google": {"thought_signature": "c2ln"}},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "12", "is_error": False, "cache_control": None},
        ],
        "tools": [WEATHER, CLOCK],
        "tool_choice": {"type": "function", "function": {"name": "clock"}},
        "reasoning_effort": "low",
        "max_tokens": 4000,
        "user": "u",
    },
    {
        "model": "auto",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}", "detail": "low"}},
                    {"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA", "filename": "a"}},
                ],
            }
        ],
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        "stop": ["END"],
        "metadata": {"user_id": "u"},
        "service_tier": "default",
        "extra_body": {"google": {"thinking_config": {"thinking_budget": 1}}},
        "thinking": {"type": "enabled", "budget_tokens": 2000},
        "stream": True,
        "stream_options": {"include_usage": True},
        "seed": 1,
        "temperature": 1,
    },
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def mutated(body: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    body = copy.deepcopy(body)
    for _ in range(chance.randint(1, 3)):
        if not body:
            break
        *way, last = chance.choice(list(places(body)))
        holder: Any = body
        for key in way:
            holder = holder[key]
        if chance.random() < 0.2:
            del holder[last]
        else:
            holder[last] = copy.deepcopy(chance.choice(ODD))
    return body


@pytest.mark.parametrize("spoken", SPOKEN)
def test_no_body_that_the_front_door_lets_in_breaks_a_dialect(spoken: Spoken) -> None:
    chance = random.Random(5)
    target = target_of(row_of(spoken, "https://host.example.org/v1"))
    ends = {"written": 0, "refused": 0}
    while sum(ends.values()) < 800:
        body = mutated(chance.choice(SEEDS), chance)
        try:
            _, (call,) = chat.read_chat_request(body)
        except RequestError:
            continue
        try:
            for one in call.outgoing(target):
                client.write_request(target, UpstreamCall(one.path, one.body), stream=call.stream, salt="s")
            ends["written"] += 1
        except RequestError as error:
            assert error.param is None or isinstance(error.param, str)
            ends["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error} for {body!r}") from error
    assert min(ends.values()) > 20 or spoken == "openai"


def replies(spoken: Spoken) -> tuple[dict[str, Any], bytes]:
    """A whole reply and the stream of the same, with all that there can be."""
    api, path = api_of(spoken), "/responses" if spoken == "responses" else "/chat/completions"
    if spoken == "gemini":
        path = "/models/big-model:generateContent"
    say = replace(THINKS_AND_CALLS, text="It rains.")
    body = {"model": "big-model"}
    return orjson.loads(api.whole(path, body, say)), b"".join(api.events(path, body, say))


@pytest.mark.parametrize("spoken", ["responses", "anthropic", "gemini"])
def test_no_reply_breaks_more_than_itself(spoken: Spoken) -> None:
    chance = random.Random(7)
    target = target_of(row_of(spoken, "https://host.example.org/v1"))
    letter = client.write_request(target, UpstreamCall("/chat/completions", {"messages": ASK}), stream=True, salt="s")
    whole, stream = replies(spoken)
    events = stream.replace(b"\r\n", b"\n").split(b"\n\n")
    broken = 0
    for _ in range(400):
        with contextlib.suppress(BackendError):
            payload, usage = client._read_reply(letter, mutated(whole, chance))
            assert payload["choices"] and usage.prompt_tokens >= 0
        passage = find_outbound(target, letter.outgoing).translate_stream(letter)
        for event in events:
            name, _, data = event.rpartition(b"data: ")
            if data.startswith(b"{") and chance.random() < 0.3:
                event = name + b"data: " + orjson.dumps(mutated(orjson.loads(data), chance))
            passage.feed(event + b"\n\n")
        passage.end()
        broken += passage.error is not None
    assert broken
