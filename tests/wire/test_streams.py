"""Streams of other dialects in any pieces, and what all translations have in common. No sockets."""

from collections.abc import Callable
from typing import Any

import orjson
import pytest

from appliance.errors import RequestError
from appliance.wire.anthropic.outbound import write_message_body
from appliance.wire.anthropic.stream import AnthropicStreamTranslator
from appliance.wire.gemini.outbound import write_content_body
from appliance.wire.gemini.stream import GeminiStreamTranslator
from appliance.wire.sse import EventTooLong
from appliance.wire.streams import ChunkTranslator
from tests.providers.anthropic_api import AnthropicApi
from tests.providers.collected import collected
from tests.providers.gemini_api import GeminiApi
from tests.providers.speech import THINKS_AND_CALLS, TWO_CALLS, Called, Say
from tests.wire.targets import claude, gem, wire_request


def anthropic_stream(say: Say) -> bytes:
    return b"".join(AnthropicApi().events("/messages", {"model": "c"}, say))


def gemini_stream(say: Say) -> bytes:
    return b"".join(GeminiApi().events("/models/gem:streamGenerateContent", {}, say))


def message_passage() -> ChunkTranslator:
    return AnthropicStreamTranslator(wire_request(claude(model="c")))


def content_passage() -> ChunkTranslator:
    return GeminiStreamTranslator(wire_request(gem(model="gem")))


STREAMS: list[tuple[Callable[[Say], bytes], Callable[[], ChunkTranslator]]] = [
    (anthropic_stream, message_passage),
    (gemini_stream, content_passage),
]


def without_time(raw: bytes) -> list[Any]:
    events = [event.removeprefix(b"data: ") for event in raw.split(b"\n\n") if event]
    return [event if event == b"[DONE]" else {**orjson.loads(event), "created": 0} for event in events]


@pytest.mark.parametrize("say", [TWO_CALLS, THINKS_AND_CALLS, Say(text="naïve ✓ 終")])
@pytest.mark.parametrize(("stream", "passage"), STREAMS)
@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_a_stream_may_come_in_any_pieces(
    stream: Callable[[Say], bytes], passage: Callable[[], ChunkTranslator], say: Say, size: int
) -> None:
    raw = stream(say)
    at_once, in_pieces = passage(), passage()
    whole = at_once.feed(raw) + at_once.end()
    parts = [in_pieces.feed(raw[at : at + size]) for at in range(0, len(raw), size)]
    assert without_time(b"".join(parts) + in_pieces.end()) == without_time(whole)
    assert collected(whole).is_done and in_pieces.usage == at_once.usage is not None


@pytest.mark.parametrize(("stream", "passage"), STREAMS)
def test_nothing_is_passed_on_after_the_end_or_an_error(
    stream: Callable[[Say], bytes], passage: Callable[[], ChunkTranslator]
) -> None:
    reading = passage()
    assert reading.feed(b"data: {not json\n\n" + stream(TWO_CALLS)) == b"" and reading.error is not None
    assert reading.feed(stream(TWO_CALLS)) == b"" and reading.end() == b"" and not reading.done


def test_an_event_without_an_end_is_given_up() -> None:
    reading = message_passage()
    with pytest.raises(EventTooLong):
        for _ in range(10):
            reading.feed(b"data: " + b"x" * 1_000_000)


def test_instructions_alone_are_no_question() -> None:
    for write, target in ((write_message_body, claude()), (write_content_body, gem())):
        with pytest.raises(RequestError, match="instructions alone"):
            write(target, {"messages": [{"role": "system", "content": "Be brief."}]})


def test_sound_and_documents_are_carried_over() -> None:
    parts = [
        {"type": "input_audio", "input_audio": {"format": "wav", "data": "AAAA"}},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"}},
    ]
    written = write_content_body(gem(), {"messages": [{"role": "user", "content": parts}]})["contents"][0]["parts"]
    assert [part["inlineData"]["mimeType"] for part in written] == ["audio/wav", "application/pdf"]
    document = write_message_body(claude(), {"messages": [{"role": "user", "content": parts[1:]}]})
    assert document["messages"][0]["content"][0]["title"] == "a.pdf"


def test_a_tool_without_arguments_is_called_with_none() -> None:
    for stream, passage in STREAMS:
        reading = passage()
        raw = stream(Say(calls=(Called("c", "clock", {}),)))
        came = collected(reading.feed(raw) + reading.end())
        assert orjson.loads(came.message["tool_calls"][0]["function"]["arguments"]) == {}
