"""Token counts keep their meaning in every dialect."""

from typing import Any

import pytest

from appliance.core import Usage
from appliance.wire.anthropic.reply import ANTHROPIC_USAGE, write_anthropic_usage
from appliance.wire.gemini.reply import GEMINI_USAGE, write_gemini_usage
from appliance.wire.registry import INBOUND
from appliance.wire.usage import MAX_TOKEN_COUNT, read_usage, write_responses_usage, write_usage

ALL = Usage(100, 50, cached_tokens=20, reasoning_tokens=10, cache_write_tokens=30)


@pytest.mark.parametrize(
    ("write", "read", "lost"),
    [
        (write_usage, read_usage, {}),
        (write_responses_usage, read_usage, {}),
        (write_anthropic_usage, ANTHROPIC_USAGE.read, {"reasoning_tokens": 0}),
        (write_gemini_usage, GEMINI_USAGE.read, {"cache_write_tokens": 0}),
    ],
)
def test_what_is_written_is_read_again_but_for_what_the_dialect_does_not_count(
    write: Any, read: Any, lost: dict[str, int]
) -> None:
    assert read(write(ALL)) == Usage(**{**{name: getattr(ALL, name) for name in ALL.__slots__}, **lost})


@pytest.mark.parametrize("count", [None, -1, True, "7", 1.5, MAX_TOKEN_COUNT + 1])
def test_a_count_that_makes_no_sense_is_none(count: Any) -> None:
    assert read_usage({"prompt_tokens": count}) is None
    assert read_usage({"prompt_tokens": 7, "completion_tokens": count}) == Usage(7)


def test_a_response_reports_what_was_written_to_the_cache() -> None:
    reply = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "usage": write_usage(ALL)}
    details = INBOUND["responses"].write_reply(reply, {})["usage"]["input_tokens_details"]
    assert details == {"cached_tokens": 20, "cache_write_tokens": 30}
