"""Long texts are cut where paragraphs end, and what the pieces give becomes one object."""

import random
from itertools import pairwise

import pytest

from appliance.tasks.extract.chunks import TextChunk, merge_chunks, split_spans
from appliance.wire.usage import estimate_tokens

PROSE = "\n\n".join(f"Paragraph {n}. " + "Some words of it. " * 12 for n in range(40))


def test_a_text_that_fits_is_one_piece() -> None:
    assert split_spans("short", 128) == ((0, 5),)


@pytest.mark.parametrize("text", [PROSE, PROSE.replace("\n\n", " "), "x" * 9_000, "漢字" * 2_000, "a b " * 3_000])
def test_pieces_cover_the_text_overlap_and_fit(text: str) -> None:
    found = split_spans(text, 200)
    assert found[0][0] == 0 and found[-1][1] == len(text)
    for (start, stop), (following, end) in pairwise(found):
        assert start < following < stop < end
    assert all(estimate_tokens(text[start:stop]) <= 210 for start, stop in found)


def test_pieces_end_with_paragraphs_where_there_are_any() -> None:
    found = split_spans(PROSE, 200)
    assert all(PROSE[:stop].endswith("\n\n") for _, stop in found[:-1])


def test_any_text_is_cut_without_end_or_gap() -> None:
    rng = random.Random(3)
    for _ in range(200):
        text = "".join(rng.choices(["a", " ", "\n", "\n\n", ". ", "ü", "word"], k=rng.randint(1, 600)))
        found = split_spans(text, rng.randint(1, 60))
        assert found[0][0] == 0 and found[-1][1] == len(text)
        assert all(one[0] < other[0] <= one[1] for one, other in pairwise(found))


def test_the_most_confident_value_that_is_not_empty_wins() -> None:
    parts = [
        TextChunk((0, 10), {"a": "", "b": "x", "c": 1}, {"/a": 0.99, "/b": 0.2, "/c": 0.5}),
        TextChunk((8, 20), {"a": "yes", "b": "y", "c": 2}, {"/a": 0.1, "/b": 0.9, "/c": 0.5}),
    ]
    merged = merge_chunks(parts)
    assert merged.object == {"a": "yes", "b": "y", "c": 1}
    assert merged.confidence == {"/a": 0.1, "/b": 0.9, "/c": 0.5}
    assert merged.evidence == {"/a": (8, 20), "/b": (8, 20), "/c": (0, 10)}


def test_without_confidence_the_first_value_wins_and_none_is_made_up() -> None:
    merged = merge_chunks(
        [
            TextChunk((0, 5), {"a": None}, None),
            TextChunk((4, 9), {"a": "x"}, None),
            TextChunk((8, 12), {"a": "y"}, None),
        ]
    )
    assert merged.object == {"a": "x"} and merged.confidence is None


def test_lists_are_joined_and_their_items_keep_their_own_confidence() -> None:
    first = TextChunk((0, 5), {"l": [{"k": 1}]}, {"/l/0/k": 0.5})
    second = TextChunk(
        (4, 9), {"l": [{"k": 1}, {"k": 2}], "a/b": {"c": True}}, {"/l/0/k": 0.9, "/l/1/k": 0.7, "/a~1b/c": 0.4}
    )
    merged = merge_chunks([first, second])
    assert merged.object == {"l": [{"k": 1}, {"k": 2}], "a/b": {"c": True}}
    assert merged.confidence == {"/l/0/k": 0.5, "/l/1/k": 0.7, "/a~1b/c": 0.4}
