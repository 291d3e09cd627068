"""What a chat becomes for Gemini, and what its answers become. No sockets."""

from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from appliance.errors import BackendGarbage, RejectedReply, RequestError, Unsupported
from appliance.wire.gemini.outbound import write_content_body
from appliance.wire.gemini.reply import read_gemini_reply
from appliance.wire.gemini.stream import GeminiStreamTranslator
from tests.providers.gemini_api import GeminiApi
from tests.providers.speech import TWO_CALLS
from tests.wire.targets import ASKED, CALL, gem, wire_request


def test_calls_without_ids_get_one_and_results_find_their_tool() -> None:
    api = GeminiApi()
    api.gives_ids = False
    raw = api.whole("/models/gem:generateContent", {}, TWO_CALLS)
    payload, _ = read_gemini_reply(wire_request(gem()), orjson.loads(raw))
    message = payload["choices"][0]["message"]
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 2
    results = [
        {"role": "tool", "tool_call_id": one, "content": text} for one, text in zip(ids, ("{}", "x"), strict=True)
    ]
    contents = write_content_body(gem(), {"messages": [ASKED, message, *results]})["contents"]
    answers = [part["functionResponse"] for part in contents[2]["parts"]]
    assert [(one["name"], one["response"]) for one in answers] == [
        ("weather", {"output": {}}),
        ("clock", {"output": "x"}),
    ]


def test_a_result_of_no_call_is_the_callers_mistake() -> None:
    with pytest.raises(RequestError, match="no call before it"):
        write_content_body(gem(), {"messages": [ASKED, {"role": "tool", "tool_call_id": "x", "content": "y"}]})


def test_calls_that_another_model_made_are_marked_as_unsigned_for_one_that_thinks() -> None:
    past = {"messages": [ASKED, {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "c2"}]}]}
    first, second = write_content_body(gem(abilities=frozenset({"chat", "reasoning"})), past)["contents"][1]["parts"]
    assert first["thoughtSignature"] == "skip_thought_signature_validator" and "thoughtSignature" not in second
    first, _ = write_content_body(gem(), past)["contents"][1]["parts"]
    assert "thoughtSignature" not in first


@pytest.mark.parametrize("reason", ["MALFORMED_FUNCTION_CALL", "OTHER", "A_NEW_ONE"])
def test_an_answer_that_did_not_come_about_is_none(reason: str) -> None:
    candidate: Mapping[str, Any] = {"finishReason": reason, "content": {"parts": []}}
    with pytest.raises(RejectedReply, match=reason):
        read_gemini_reply(wire_request(gem()), {"candidates": [candidate]})
    reading = GeminiStreamTranslator(wire_request(gem(model="gem")))
    reading.feed(b"data: " + orjson.dumps({"candidates": [candidate]}) + b"\n\n")
    assert reason in str(reading.error)


@pytest.mark.parametrize("payload", [{}, {"candidates": []}, {"candidates": [1]}, {"candidates": "x"}])
def test_a_reply_without_candidates_is_garbage_unless_it_is_blocked(payload: dict[str, Any]) -> None:
    if payload.get("candidates") == []:
        payload = {**payload, "promptFeedback": {"blockReason": "SAFETY"}}
        assert read_gemini_reply(wire_request(gem()), payload)[0]["choices"][0]["finish_reason"] == "content_filter"
        return
    with pytest.raises(BackendGarbage):
        read_gemini_reply(wire_request(gem()), payload)


def test_log_probabilities_have_openais_shape() -> None:
    tops = [{"candidates": [{"token": "Ja", "logProbability": -0.1}, {"token": "No", "logProbability": -2.3}]}]
    result = {"chosenCandidates": [{"token": "Ja", "logProbability": -0.1}], "topCandidates": tops}
    candidate = {"finishReason": "STOP", "content": {"parts": [{"text": "Ja"}]}, "logprobsResult": result}
    payload, _ = read_gemini_reply(wire_request(gem()), {"candidates": [candidate]})
    (row,) = payload["choices"][0]["logprobs"]["content"]
    assert (row["token"], row["logprob"], row["bytes"]) == ("Ja", -0.1, [74, 97])
    assert [top["token"] for top in row["top_logprobs"]] == ["Ja", "No"]


def test_googles_own_settings_have_their_usual_place() -> None:
    google = {"thinking_config": {"thinking_budget": 5, "include_thoughts": True}, "cached_content": "cachedContents/1"}
    body = write_content_body(gem(), {"messages": [ASKED], "extra_body": {"google": google}})
    assert body["generationConfig"]["thinkingConfig"] == {"thinkingBudget": 5, "includeThoughts": True}
    assert body["cachedContent"] == "cachedContents/1"
    with pytest.raises(Unsupported) as caught:
        write_content_body(gem(), {"messages": [ASKED], "extra_body": {"google": {"other": 1}}})
    assert caught.value.param == "extra_body.google.other"
