"""Text comes back whole however its bytes were cut, and stop strings never show."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from appliance.llamacpp.chat.reply_text import ReplyText, StopFinder, Utf8Stream

# Few letters make stop strings meet; the wide ones make characters that are cut.
LETTERS = st.text(alphabet="abc é漢😀", max_size=40)
STOPS = st.lists(st.text(alphabet="abc é漢😀", min_size=1, max_size=4), max_size=4)


def cut(data: bytes, edges: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(edge % (len(data) + 1) for edge in edges)})
    return [data[start:stop] for start, stop in pairwise(places)]


def reply(pieces: list[bytes], stops: list[str]) -> tuple[str, list[tuple[int, int]], bool]:
    text: ReplyText[int] = ReplyText(stops)
    out, notes = "", []
    for number, piece in enumerate(pieces):
        delta = text.push(piece, number)
        out += delta.text
        notes += [(placed.note, placed.offset) for placed in delta.notes]
    delta = text.close()
    return out + delta.text, notes + [(placed.note, placed.offset) for placed in delta.notes], text.stopped


@given(st.binary(max_size=60), st.lists(st.integers(0, 60)))
def test_any_cut_of_any_bytes_gives_what_decoding_them_at_once_gives(data: bytes, edges: list[int]) -> None:
    stream = Utf8Stream()
    text = "".join(stream.push(piece) for piece in cut(data, edges)) + stream.close()
    assert text == data.decode("utf-8", "replace")


@given(LETTERS, st.lists(st.integers(0, 200)))
def test_no_character_is_ever_given_out_in_halves(text: str, edges: list[int]) -> None:
    stream = Utf8Stream()
    so_far = ""
    for piece in cut(text.encode(), edges):
        so_far += stream.push(piece)
        assert text.startswith(so_far)
    assert so_far + stream.close() == text


@given(LETTERS, STOPS, st.lists(st.integers(0, 200)))
def test_a_stop_string_is_found_at_the_same_place_however_the_text_was_cut(
    text: str, stops: list[str], edges: list[int]
) -> None:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    out, _, stopped = reply(cut(text.encode(), edges), stops)
    assert out == expected
    assert stopped == bool(ends)


@given(LETTERS, STOPS, st.lists(st.integers(0, 200)))
def test_tokens_leave_in_order_with_their_text_and_only_those_that_begin_in_it(
    text: str, stops: list[str], edges: list[int]
) -> None:
    pieces = cut(text.encode(), edges)
    out, notes, stopped = reply(pieces, stops)
    numbers = [number for number, _ in notes]
    assert numbers == list(range(len(numbers)))
    if stopped:
        assert all(offset < len(out) for _, offset in notes)
    else:
        assert len(numbers) == len(pieces)


def test_what_might_become_a_stop_string_is_held_back_and_let_go_when_it_does_not() -> None:
    stop = StopFinder(["###END"])
    assert stop.push("one #") == "one "
    assert stop.push("##E") == ""
    assert stop.push("NT") == "###ENT"
    assert stop.push("x##") == "x"
    assert stop.close() == "##"
    assert stop.found is None


def test_a_stop_string_that_ends_first_wins_over_a_longer_one_that_begins_first() -> None:
    stop = StopFinder(["abc", "b"])
    assert stop.push("abc") == "a"
    assert stop.found == "b"


def test_nothing_comes_after_a_stop_string() -> None:
    text: ReplyText[int] = ReplyText(["."])
    assert text.push(b"Yes. No", 0).text == "Yes"
    assert text.push(b" and more", 1).text == ""
    assert text.close().text == ""
