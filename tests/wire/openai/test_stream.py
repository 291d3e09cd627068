"""Events go through as bytes, whatever the socket makes of them; only what must be known is read."""

from typing import Any

import orjson
import pytest

from appliance.core import Usage
from appliance.wire.openai.stream import ChatStreamPassthrough
from appliance.wire.sse import EventTooLong
from appliance.wire.usage import read_usage


def event(payload: Any) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def token(text: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}], "usage": None})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})
DONE = b"data: [DONE]\n\n"
WHOLE = token("a") + token("b", "stop") + USAGE + DONE


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_however_the_bytes_arrive_the_same_events_leave(size: int, newline: bytes) -> None:
    sent = WHOLE.replace(b"\n", newline)
    passage = ChatStreamPassthrough(keep_usage=True)
    got = b"".join(passage.feed(sent[start : start + size]) for start in range(0, len(sent), size)) + passage.end()
    assert got == sent
    assert (passage.usage, passage.done, passage.finished_choices) == (Usage(7, 3), True, 1)


def test_the_usage_event_is_read_and_left_out_where_nobody_asked() -> None:
    passage = ChatStreamPassthrough(keep_usage=False)
    assert passage.feed(WHOLE) == token("a") + token("b", "stop") + DONE
    assert passage.usage == Usage(7, 3)


def test_usage_that_comes_with_a_choice_stays_where_it_is() -> None:
    last = event({"choices": [{"finish_reason": "stop"}], "usage": {"prompt_tokens": 1, "completion_tokens": 2}})
    passage = ChatStreamPassthrough(keep_usage=False)
    assert passage.feed(last) == last
    assert passage.usage == Usage(1, 2) and passage.finished_choices == 1


def test_an_event_that_is_not_complete_is_never_passed_on() -> None:
    passage = ChatStreamPassthrough(keep_usage=False)
    assert passage.feed(token("a") + b'data: {"choices": [') == token("a")
    assert passage.end() == b'data: {"choices": [\n\n'


def test_an_error_event_is_kept_back_and_ends_everything() -> None:
    passage = ChatStreamPassthrough(keep_usage=False)
    got = passage.feed(token("a") + event({"error": {"message": "no"}}) + token("b") + DONE)
    assert got == token("a")
    assert passage.error == {"message": "no"} and not passage.done


@pytest.mark.parametrize(
    "text", ['"usage": {"a": 1}', '"error": "x"', "data: [DONE]", '"finish_reason": "stop"', '{"error": {}}\n\n']
)
def test_a_model_that_writes_about_events_is_only_quoted(text: str) -> None:
    passage = ChatStreamPassthrough(keep_usage=False)
    sent = token(text)
    assert passage.feed(sent) == sent
    assert (passage.usage, passage.error, passage.done, passage.finished_choices) == (None, None, False, 0)


def test_comments_and_odd_lines_travel_on() -> None:
    odd = b": keep-alive\n\n" + b"event: ping\ndata: {}\n\n" + b'data: "usage": {broken\n\n'
    assert ChatStreamPassthrough(keep_usage=False).feed(odd) == odd


def test_nothing_follows_done() -> None:
    assert ChatStreamPassthrough(keep_usage=False).feed(DONE + token("more")) == DONE


def test_an_endless_event_is_not_collected_for_ever() -> None:
    passage = ChatStreamPassthrough(keep_usage=False)
    with pytest.raises(EventTooLong):
        for _ in range(100):
            passage.feed(b"x" * 100_000)


@pytest.mark.parametrize(
    ("fields", "usage"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 2}, Usage(5, 2)),
        ({"input_tokens": 5, "output_tokens": 2}, Usage(5, 2)),
        (
            {
                "prompt_tokens": 5,
                "completion_tokens": 2,
                "prompt_tokens_details": {"cached_tokens": 4},
                "completion_tokens_details": {"reasoning_tokens": 1},
            },
            Usage(5, 2, 4, 1),
        ),
        ({"input_tokens": 5, "output_tokens": 0, "input_tokens_details": {"cached_tokens": 3}}, Usage(5, 0, 3)),
        ({"prompt_tokens": 5, "completion_tokens": None, "prompt_tokens_details": None}, Usage(5)),
        ({"prompt_tokens": "5"}, None),
        ({"prompt_tokens": -1}, None),
        ({"prompt_tokens": 10**18}, None),
        ({"prompt_tokens": True}, None),
        ({}, None),
        (None, None),
        ([], None),
    ],
)
def test_token_counts_are_read_under_both_namings_and_never_guessed(fields: Any, usage: Usage | None) -> None:
    assert read_usage(fields) == usage
