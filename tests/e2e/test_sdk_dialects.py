"""The official SDKs of three dialects against a node with a real model, unchanged but for the base URL."""

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.google_sdk import genai, types
from tests.running import RunningNode

pytestmark = pytest.mark.slow

EIFFEL = "Where is the Eiffel Tower?"
SAY: Any = [{"role": "user", "content": EIFFEL}]


@pytest.fixture
def claude(node: RunningNode) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=node.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def gpt(node: RunningNode) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def gemini(node: RunningNode) -> Iterator[genai.Client]:
    client = genai.Client(api_key="none", http_options=types.HttpOptions(base_url=node.url))
    yield client
    client.close()


def test_anthropic_answers_streams_and_counts_with_the_models_own_tokenizer(claude: anthropic.Anthropic) -> None:
    asked: Any = {"model": "auto", "max_tokens": 24, "messages": SAY, "extra_body": {"temperature": 0}}
    raw = claude.messages.with_raw_response.create(**asked)
    whole = raw.parse()
    assert whole.content[0].type == "text" and "Paris" in whole.content[0].text
    assert raw.headers["x-appliance-target"] == "onsite/smollm2-135m-instruct"
    with claude.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    assert streamed.content[0].type == "text" and streamed.content[0].text == whole.content[0].text
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    counted = claude.messages.with_raw_response.count_tokens(model="auto", messages=SAY)
    assert counted.headers["x-appliance-count"] == "tokenizer"
    used = whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert counted.parse().input_tokens == used


def test_anthropic_is_told_which_stop_sequence_it_was(claude: anthropic.Anthropic) -> None:
    done = claude.messages.create(
        model="auto", max_tokens=24, messages=SAY, stop_sequences=["Paris"], extra_body={"temperature": 0}
    )
    assert (done.stop_reason, done.stop_sequence) == ("stop_sequence", "Paris")


def test_responses_answer_and_stream(gpt: openai.OpenAI) -> None:
    asked: Any = {"model": "auto", "input": EIFFEL, "max_output_tokens": 80, "temperature": 0}
    whole = gpt.responses.create(**asked)
    assert "Paris" in whole.output_text
    with gpt.responses.stream(**asked) as stream:
        streamed = stream.get_final_response()
    assert streamed.output_text == whole.output_text
    counted = gpt.responses.input_tokens.count(model="auto", input=EIFFEL)
    assert whole.usage is not None and counted.input_tokens == whole.usage.input_tokens


def test_gemini_answers_and_streams(gemini: genai.Client) -> None:
    config = types.GenerateContentConfig(temperature=0, max_output_tokens=24)
    whole = gemini.models.generate_content(model="auto", contents=EIFFEL, config=config)
    assert "Paris" in (whole.text or "")
    pieces = gemini.models.generate_content_stream(model="auto", contents=EIFFEL, config=config)
    assert "".join(piece.text or "" for piece in pieces) == whole.text
    counted = gemini.models.count_tokens(model="auto", contents=EIFFEL)
    assert whole.usage_metadata is not None and counted.total_tokens == whole.usage_metadata.prompt_token_count


def test_an_answer_of_a_schema_is_valid_in_every_dialect(claude: anthropic.Anthropic, gemini: genai.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    }
    done = claude.messages.create(
        model="auto", max_tokens=60, messages=SAY, output_config={"format": {"type": "json_schema", "schema": schema}}
    )
    assert done.content[0].type == "text" and done.content[0].text.startswith("{")
    config = types.GenerateContentConfig(
        response_mime_type="application/json", response_json_schema=schema, max_output_tokens=60
    )
    parsed = gemini.models.generate_content(model="auto", contents=EIFFEL, config=config).parsed
    assert isinstance(parsed, dict) and set(parsed) == {"city"}


def test_errors_name_what_there_is(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="smollm2-135m-instruct"):
        claude.messages.create(model="claude-99", max_tokens=5, messages=SAY)
