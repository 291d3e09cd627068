"""What vLLM answers 200 to and should not, and what it says while it is on its way out."""

from typing import Any

import pytest

from appliance.core import Target, UpstreamCall
from appliance.errors import EngineBusy, RejectedReply, Unsupported
from appliance.upstream import client
from appliance.upstream.error_mapping import error_in_success, error_of_status
from appliance.wire.openai import vllm
from appliance.wire.openai.stream import ChatStreamPassthrough

TARGET = Target("onsite/m", "onsite", "openai", "unix:/run/s", "m", frozenset({"chat", "token_logprobs"}))
MESSAGES = [{"role": "user", "content": "yes or no?"}]


def _write(body: dict[str, Any], path: str = "/chat/completions") -> bytes:
    return client.write_request(TARGET, UpstreamCall(path, body), stream=False, salt="s").body


@pytest.mark.parametrize("field", ["guided_choice", "guided_json", "temprature", "chat_template", "kv_transfer_params"])
def test_10_fields_that_it_would_ignore_or_must_not_get_are_refused(field: str) -> None:
    with pytest.raises(Unsupported) as caught:
        _write({"messages": MESSAGES, field: ["yes", "no"]})
    assert caught.value.param == field


def test_10_the_older_name_of_a_field_is_told_its_newer_one() -> None:
    with pytest.raises(Unsupported, match=r"structured_outputs\.choice"):
        _write({"messages": MESSAGES, "guided_choice": ["yes", "no"]})


def test_fields_that_change_no_answer_are_left_out() -> None:
    body = {"messages": MESSAGES, "metadata": {"a": "b"}, "prompt_cache_key": "k", "store": True, "top_k": 3}
    sent = _write(body)
    assert b"top_k" in sent and b"cache_salt" in sent
    assert not any(name in sent for name in (b"metadata", b"prompt_cache_key", b"store"))


def test_other_targets_get_what_was_written() -> None:
    other = Target("p/m", "onsite", "openai", "http://127.0.0.1:1/v1", "m", frozenset({"chat"}), provider="p")
    letter = client.write_request(other, UpstreamCall("/chat/completions", {"mine": 1}), stream=False, salt="s")
    assert b"mine" in letter.body


@pytest.mark.parametrize(
    ("text", "finish", "words"),
    [("yes", "stop", ""), ("ye", "length", "was cut off: raise max_tokens"), ("Yes!", "stop", "none of the 2 choices")],
)
def test_11_a_choice_is_one_of_the_choices(text: str, finish: str, words: str) -> None:
    body = {"structured_outputs": {"choice": ["yes", "no"]}}
    payload = {"choices": [{"message": {"content": text}, "finish_reason": finish}]}
    if not words:
        vllm.check_choices(body, payload)
        return
    with pytest.raises(RejectedReply, match=words):
        vllm.check_choices(body, payload)


DRAINING = b'{"error":{"message":"cannot schedule new futures after shutdown","type":"InternalServerError","code":500}}'
FULL = (
    b'{"error":{"message":"The engine is currently busy and cannot accept new requests. Please try again later or on a '
    b'different instance.","type":"Service Unavailable","param":null,"code":503}}'
)


@pytest.mark.parametrize(("status", "raw"), [(500, DRAINING), (503, FULL)], ids=["4: draining", "12: full"])
def test_what_means_come_back_elsewhere_is_taken_so(status: int, raw: bytes) -> None:
    error = error_of_status(TARGET, status, raw, {}, 0.0)
    assert isinstance(error, EngineBusy) and error.fallback


def test_9_an_error_in_a_stream_that_began_with_200_is_none_of_its_ends() -> None:
    passage = ChatStreamPassthrough(keep_usage=False)
    error = (
        b'{"error":{"message":"EngineCore encountered an issue.","type":"InternalServerError","param":null,"code":500}}'
    )
    whole = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: ' + error + b"\n\ndata: [DONE]\n\n"
    passed = passage.feed(whole)
    assert passed.count(b"data:") == 1 and b"[DONE]" not in passed
    assert passage.error is not None and not passage.done
    assert "EngineCore" in error_in_success(TARGET, passage.error).message
