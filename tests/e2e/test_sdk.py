"""The official OpenAI SDK against a node with a real model, unchanged but for the base URL."""

import json

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.running import RunningNode

pytestmark = pytest.mark.slow

EIFFEL: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Where is the Eiffel Tower?"}]


@pytest.fixture
def client(node: RunningNode) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0)


def test_a_chat_is_answered_and_says_where_and_why(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="auto",
        messages=EIFFEL,
        temperature=0,
        max_tokens=32,
    )
    reply = raw.parse()
    assert "Paris" in (reply.choices[0].message.content or "")
    assert reply.usage is not None
    assert reply.usage.completion_tokens > 0
    assert raw.headers["x-appliance-location"] == "onsite"
    assert raw.headers["x-appliance-target"] == "onsite/smollm2-135m-instruct"
    assert raw.headers["x-appliance-reason"]
    assert float(raw.headers["x-appliance-cost-usd"]) > 0
    assert raw.headers["x-appliance-decision"].startswith("dec_")


def test_a_stream_gives_the_same_text_as_a_whole_answer_and_its_usage(client: openai.OpenAI) -> None:
    asked = {"model": "auto", "messages": EIFFEL, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_json_schema_is_kept(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "large": {"type": "boolean"}},
        "required": ["city", "large"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model="auto",
        messages=[{"role": "user", "content": "Describe Paris."}],
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}},
        temperature=0,
    )
    found = json.loads(reply.choices[0].message.content or "")
    assert isinstance(found["city"], str)
    assert isinstance(found["large"], bool)
    assert set(found) == {"city", "large"}


def test_log_probabilities_come_with_every_token(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="auto",
        messages=EIFFEL,
        logprobs=True,
        top_logprobs=3,
        max_tokens=5,
        temperature=0,
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        # Greedy: the chosen one is the most probable.
        assert token.logprob == pytest.approx(max(one.logprob for one in token.top_logprobs))


def test_decisions_give_a_probability_for_every_option(client: openai.OpenAI) -> None:
    reply = client.decisions.create(
        model="auto",
        input="My card was charged twice, please pay it back!",
        questions=[
            {
                "type": "choice",
                "name": "topic",
                "instructions": "What is the message about?",
                "choices": [{"value": "billing"}, {"value": "weather"}],
            },
            {"type": "predicate", "name": "angry", "instructions": "Does the writer complain?"},
        ],
    )
    topic, angry = reply.answers
    assert topic.type == "choice"
    # Which one a model of this size picks is not the point; that it is the most probable one is.
    assert topic.choice == max(topic.probabilities, key=lambda row: row.probability).value
    assert topic.confidence == pytest.approx(max(row.probability for row in topic.probabilities))
    assert sum(row.probability for row in topic.probabilities) == pytest.approx(1.0)
    assert angry.type == "predicate"
    assert 0.0 <= angry.probability <= 1.0


def test_models_are_listed_and_one_can_be_pinned(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == "auto"
    pinned = next(name for name in names if name.startswith("onsite/"))
    raw = client.completions.with_raw_response.create(model=pinned, prompt="2, 4, 6,", max_tokens=4, temperature=0)
    assert raw.headers["x-appliance-target"] == pinned
    assert raw.parse().choices[0].text


def test_an_unknown_model_is_a_404_that_names_what_there_is(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="smollm2-135m-instruct"):
        client.chat.completions.create(model="gpt-99", messages=EIFFEL)


def test_a_prompt_longer_than_the_context_names_both_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"8,?192") as caught:
        client.chat.completions.create(model="auto", messages=[{"role": "user", "content": "many words " * 9000}])
    assert caught.value.code == "context_length_exceeded"
