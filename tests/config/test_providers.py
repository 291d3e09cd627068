"""Providers as rows: what each kind does differently, and how a mistake in a row is told."""

from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from appliance.config import NodeConfig, list_provider_targets
from appliance.config.providers import KINDS, find_provider_kind
from appliance.core import PLAIN, Price, Target, UpstreamCall
from appliance.errors import Unsupported
from appliance.upstream import client

CHAT = "/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def target_of(model: dict[str, Any] | None = None, **row: Any) -> Target:
    models = [{"name": "m", "input_usd": 1.0, "output_usd": 4.0, **(model or {})}]
    config = NodeConfig.model_validate_json(orjson.dumps({"providers": [{"name": "p", "models": models, **row}]}))
    return list_provider_targets(config)[0]


def sent(target: Target, body: dict[str, Any], path: str = CHAT, *, stream: bool = False) -> dict[str, Any]:
    letter = client.write_request(target, UpstreamCall(path, {**ASK, **body}), stream=stream, salt="s")
    return orjson.loads(letter.body)  # type: ignore[no-any-return]


def path_of(target: Target, path: str = CHAT, *, stream: bool = False) -> str:
    return client.write_request(target, UpstreamCall(path, ASK), stream=stream, salt="s").path


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("https://api.openai.com/v1", "openai"),
        ("https://my.openai.azure.com/openai/v1", "azure"),
        ("https://my.services.ai.azure.com/openai/v1", "azure"),
        ("https://api.anthropic.com/v1", "anthropic"),
        ("https://generativelanguage.googleapis.com/v1beta", "gemini"),
        ("https://generativelanguage.googleapis.com/v1beta/openai", "gemini_openai"),
        ("https://api.groq.com/openai/v1", "groq"),
        ("https://openrouter.ai/api/v1", "openrouter"),
        ("https://example.org/v1", "compatible"),
        ("https://api.openai.com.example.org/v1", "compatible"),
    ],
)
def test_a_provider_is_known_by_its_address(address: str, kind: str) -> None:
    assert find_provider_kind(None, None, address) == kind


def test_a_dialect_that_is_said_counts_more_than_the_address() -> None:
    assert find_provider_kind(None, "openai", "https://api.anthropic.com/v1") == "compatible"
    assert find_provider_kind(None, "anthropic", "https://llm.example.org/v1") == "anthropic"
    with pytest.raises(ValueError, match="speaks the 'anthropic' dialect"):
        find_provider_kind("anthropic", "openai", "")


def test_a_known_provider_needs_no_address_and_an_unknown_one_does() -> None:
    assert target_of(kind="groq").address == "https://api.groq.com/openai/v1"
    with pytest.raises(ValidationError, match="base_url is missing"):
        target_of(kind="vllm")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"base_url": "https://host/v1/chat/completions"}, "leave that off"),
        ({"dialect": "anthropic", "base_url": "https://host/v1/messages"}, "leave that off"),
        ({"dialect": "anthropic", "base_url": "https://api.anthropic.com"}, "must end with the API's version"),
        ({"dialect": "gemini", "base_url": "https://host/gemini"}, "must end with the API's version"),
        ({"kind": "azure", "base_url": "https://my.openai.azure.com"}, "/openai/v1"),
        ({"kind": "azure", "base_url": "https://my.openai.azure.com/openai"}, "needs api_version"),
        ({"kind": "groq", "api_version": "2024-10-21"}, "has no api_version"),
        ({"kind": "openai", "headers": {"Authorization": "Bearer x"}}, "key_env or key_file"),
        ({"kind": "openai", "headers": {"x-a": "line\nbreak"}}, "no header of plain text"),
        ({"kind": "nobody"}, "kind"),
    ],
)
def test_a_mistake_in_a_row_is_told_with_its_remedy(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        target_of(**row)


@pytest.mark.parametrize(
    ("kind", "ability"), [("anthropic", "logprobs"), ("gemini", "embeddings"), ("groq", "logprobs")]
)
def test_a_model_is_not_said_to_do_what_its_api_cannot(kind: str, ability: str) -> None:
    with pytest.raises(ValidationError, match=f"cannot do {ability} by the API of '{kind}'"):
        target_of({"abilities": ["chat", ability]}, kind=kind)


def test_a_compatible_provider_is_given_the_body_as_it_is() -> None:
    target = target_of(base_url="https://example.org/v1")
    assert target.wire is PLAIN
    body = {"top_k": 3, "max_tokens": 5, "seed": 1, "brand_new": {"x": 1}}
    assert sent(target, body) == {**ASK, **body, "model": "m"}


def test_azure_names_the_deployment_in_the_path_or_has_a_version_path() -> None:
    old = target_of(base_url="https://my.openai.azure.com/openai", api_version="2024-10-21")
    assert path_of(old) == "/deployments/m/chat/completions?api-version=2024-10-21"
    assert path_of(old, "/embeddings") == "/deployments/m/embeddings?api-version=2024-10-21"
    new = target_of(base_url="https://my.openai.azure.com/openai/v1")
    assert path_of(new) == CHAT and new.wire.key_header == "api-key"
    assert path_of(target_of({"api": "responses"}, base_url="https://my.openai.azure.com/openai/v1")) == "/responses"


def test_a_models_name_cannot_leave_its_place_in_the_path() -> None:
    old = target_of({"name": "../x?y=1#z"}, base_url="https://my.openai.azure.com/openai", api_version="1")
    assert path_of(old) == "/deployments/..%2Fx%3Fy%3D1%23z/chat/completions?api-version=1"
    gemini = target_of({"name": "models/gem-3?x"}, kind="gemini")
    assert path_of(gemini, stream=True) == "/models/gem-3%3Fx:streamGenerateContent?alt=sse"


def test_the_limit_has_each_providers_name() -> None:
    for kind, name in (("openai", "max_completion_tokens"), ("mistral", "max_tokens"), ("together", "max_tokens")):
        for given in ("max_tokens", "max_completion_tokens"):
            body = sent(target_of(kind=kind), {given: 5})
            assert {key: value for key, value in body.items() if key.startswith("max_")} == {name: 5}
    assert sent(target_of(kind="openai"), {"max_tokens": 5, "prompt": "x"}, "/completions")["max_tokens"] == 5


def test_mistral_has_its_own_name_for_the_seed_and_no_stream_options() -> None:
    body = sent(target_of(kind="mistral"), {"seed": 4, "stream_options": {"include_usage": True}}, stream=True)
    assert body["random_seed"] == 4 and "seed" not in body and "stream_options" not in body and body["stream"] is True


def test_what_a_provider_does_not_take_is_refused_unless_it_says_nothing() -> None:
    groq = target_of(kind="groq")
    assert "n" not in sent(groq, {"n": 1, "logprobs": False})
    for name, value in (("n", 2), ("logprobs", True), ("logit_bias", {"1": 1}), ("top_k", 3)):
        with pytest.raises(Unsupported) as caught:
            sent(groq, {name: value})
        assert caught.value.param == name


def test_an_operator_may_have_fields_left_out_or_refused() -> None:
    claude = target_of({"leaves_out": ["temperature"], "refuses": ["stop"]}, kind="anthropic")
    assert "temperature" not in sent(claude, {"temperature": 0})
    with pytest.raises(Unsupported, match="stop"):
        sent(claude, {"stop": "x"})
    with pytest.raises(Unsupported, match="top_p"):
        sent(claude, {"top_p": 0.5})


def test_an_older_version_of_anthropics_api_takes_a_temperature_up_to_1() -> None:
    older = target_of(kind="anthropic", api_version="2023-06-01")
    assert dict(older.wire.headers)["anthropic-version"] == "2023-06-01"
    body = sent(older, {"temperature": 0.3, "top_k": 5})
    assert (body["temperature"], body["top_k"]) == (0.3, 5)
    with pytest.raises(Unsupported, match="temperature"):
        sent(older, {"temperature": 1.5})


def test_another_models_reasoning_stays_here_where_it_is_not_understood() -> None:
    call = {"id": "c", "type": "function", "function": {}, "extra_content": {"google": {"thought_signature": "s"}}}
    past = {"role": "assistant", "reasoning_content": "r", "thinking_blocks": [], "tool_calls": [call]}
    given = {"messages": [*ASK["messages"], past]}
    plain = {"role": "assistant", "tool_calls": [{name: call[name] for name in ("id", "type", "function")}]}
    assert sent(target_of(kind="openai"), given)["messages"][1] == plain
    kept = sent(target_of(kind="gemini_openai"), given)["messages"][1]
    assert kept == {"role": "assistant", "tool_calls": [call]}
    assert sent(target_of(kind="appliance", base_url="https://node.example.org/v1"), given)["messages"][1] == past
    assert past["reasoning_content"] == "r", "the caller's body is not touched"


@pytest.mark.parametrize(("thinking", "effort"), [("effort", "high"), ("budget", "high")])
def test_how_much_is_thought_is_said_by_word_or_by_budget(thinking: str, effort: str) -> None:
    model = {"thinking": thinking, "abilities": ["chat", "reasoning"]}
    claude = sent(target_of(model, kind="anthropic"), {"reasoning_effort": effort})
    gemini = sent(target_of(model, kind="gemini"), {"reasoning_effort": effort})["generationConfig"]["thinkingConfig"]
    if thinking == "effort":
        assert claude["thinking"]["type"] == "adaptive" and claude["output_config"] == {"effort": "high"}
        assert gemini == {"includeThoughts": True, "thinkingLevel": "HIGH"}
    else:
        assert claude["thinking"] == {"type": "enabled", "budget_tokens": 24576}
        assert claude["max_tokens"] == 24576 + 8192, "what is thought counts towards the limit"
        assert gemini == {"includeThoughts": True, "thinkingBudget": 24576}


def test_a_budget_leaves_room_for_an_answer_or_is_refused() -> None:
    claude = target_of({"thinking": "budget", "abilities": ["chat", "reasoning"]}, kind="anthropic")
    assert sent(claude, {"reasoning_effort": "high", "max_tokens": 4000})["thinking"]["budget_tokens"] == 2000
    with pytest.raises(Unsupported, match="2048 tokens at least"):
        sent(claude, {"reasoning_effort": "high", "max_tokens": 500})
    plain = target_of(kind="anthropic")
    with pytest.raises(Unsupported, match="abilities do not name reasoning"):
        sent(plain, {"reasoning_effort": "high"})
    assert "thinking" not in sent(plain, {"reasoning_effort": "none"})


def test_a_limit_is_always_sent_where_the_dialect_wants_one() -> None:
    assert sent(target_of(kind="anthropic"), {})["max_tokens"] == 8192
    assert sent(target_of({"max_output_tokens": 500}, kind="anthropic"), {})["max_tokens"] == 500
    assert "generationConfig" not in sent(target_of(kind="gemini"), {})


def test_prices_know_what_a_cache_costs() -> None:
    assert target_of(base_url="https://example.org/v1").price == Price(1.0, 4.0)
    assert target_of(kind="anthropic").price == Price(1.0, 4.0, None, 1.25, 2.0)
    given = target_of({"cache_write_usd": 3.0, "cached_input_usd": 0.1}, kind="anthropic").price
    assert given is not None and given.cache_write_long_usd is not None
    assert (given.cached_input_usd, given.cache_write_usd, round(given.cache_write_long_usd, 6)) == (0.1, 3.0, 4.8)


def test_extra_headers_go_along() -> None:
    target = target_of(kind="openrouter", headers={"X-Title": "ours"})
    assert client.write_request(target, UpstreamCall(CHAT, ASK), stream=False, salt="s").headers == {"X-Title": "ours"}


def test_every_kind_is_sound() -> None:
    for name, kind in KINDS.items():
        assert "chat" in kind.abilities and kind.long_to_short >= 1 <= kind.cache_write, name
        assert kind.base_url is None or find_provider_kind(None, None, kind.base_url) == name
