"""Bytes of a stream become whole events, whatever the socket makes of them."""

import pytest

from appliance.wire.sse import MAX_EVENT_BYTES, EventTooLong, SseReader, read_events, write_event

FIRST, SECOND = b'event: a\ndata: {"x":1}\n\n', b'data: {"y":\ndata: 2}\n\n'


def test_a_block_of_whole_events_passes_without_a_copy() -> None:
    reader = SseReader()
    block = FIRST + SECOND
    assert reader.feed(block) is block and reader.end() == b""


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_an_event_is_given_when_its_blank_line_came(newline: bytes) -> None:
    first, second = FIRST.replace(b"\n", newline), SECOND.replace(b"\n", newline)
    for cut in range(1, len(second)):
        reader = SseReader()
        assert reader.feed(first + second[:cut]) == first
        assert reader.feed(second[cut:] + b"data: rest") == second
        assert reader.end() == b"data: rest"


def test_an_event_without_an_end_is_given_up() -> None:
    reader = SseReader()
    with pytest.raises(EventTooLong):
        for _ in range(MAX_EVENT_BYTES // 1_000_000 + 1):
            reader.feed(b"x" * 1_000_000)


def test_the_data_of_an_event_may_have_several_lines_and_comments_have_none() -> None:
    assert list(read_events(FIRST + b": ping\n\n" + SECOND)) == [b'{"x":1}', b'{"y":\n2}']


def test_what_is_written_is_read_again() -> None:
    assert list(read_events(write_event({"x": 1}) + write_event({"x": 2}, "named"))) == [b'{"x":1}', b'{"x":2}']
