"""Lines of a file: each checked by itself, mistakes with their line number, none longer than may be."""

import io
import json

import pytest

from appliance.jobs.lines.reader import DuplicateTracker, is_deterministic, parse_line, read_line_at, scan_lines
from appliance.jobs.models import BadLine, BatchLine
from tests.jobs.office import CHAT, line


def checked(data: bytes, most: int = 10_000) -> list[BatchLine | BadLine]:
    return [parse_line(raw, CHAT) for raw in scan_lines(io.BytesIO(data), most)]


def problem(text: str | bytes) -> tuple[str, str]:
    found = checked(text if isinstance(text, bytes) else text.encode())[0]
    assert isinstance(found, BadLine)
    assert found.problem.line == found.number == 1
    return found.problem.code, found.problem.message


def test_a_good_file_gives_its_lines_with_their_places() -> None:
    data = f"{line(1)}\n\n  \n{line(2)}\r\n{line(3)}".encode()
    found = checked(data)
    assert [one.number for one in found] == [1, 4, 5]
    for one in found:
        assert isinstance(one, BatchLine)
        again = parse_line(read_line_at(io.BytesIO(data), one.number, one.offset, one.length), CHAT)
        assert again == one


def test_a_byte_order_mark_is_no_mistake() -> None:
    (found,) = checked(b"\xef\xbb\xbf" + line(1).encode())
    assert isinstance(found, BatchLine)
    assert isinstance(
        parse_line(read_line_at(io.BytesIO(b"\xef\xbb\xbf" + line(1).encode()), 1, 0, found.length), CHAT), BatchLine
    )


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("{broken", "invalid_json_line", "not valid JSON"),
        ("[1]", "invalid_json_line", "JSON list"),
        (b'{"custom_id": "\xff"}', "invalid_encoding", "byte 16"),
        (line(1, custom_id=None), "missing_required_parameter", "custom_id is missing"),
        (line(1, custom_id=""), "missing_required_parameter", "custom_id"),
        (line(1, custom_id="x" * 513), "missing_required_parameter", "512"),
        (line(1, method="GET"), "invalid_method", "'GET'"),
        (line(1, url="/v1/embeddings"), "mismatched_endpoint", "/v1/embeddings"),
        (line(1, body=[]), "missing_required_parameter", "body"),
        (line(1, body={"stream": True}), "unsupported_parameter", "stream"),
        (line(1, headers={"x-appliance-residency": "onsite"}), "unsupported_parameter", "headers"),
        (line(1).replace('"body": {', '"body": {"deep": ' + "[" * 300 + "]" * 300 + ", "), "invalid_json_line", "deep"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(text: str | bytes, code: str, words: str) -> None:
    found, message = problem(text)
    assert found == code
    assert words in message


def test_a_line_that_is_too_long_is_skipped_without_being_held() -> None:
    class Counting(io.BytesIO):
        most = 0

        def readline(self, size: int | None = -1) -> bytes:
            piece = super().readline(-1 if size is None else size)
            self.most = max(self.most, len(piece))
            return piece

    file = Counting(line(1).encode() + b"\n" + b"x" * 50_000_000 + b"\n" + line(3).encode())
    found = [parse_line(raw, CHAT) for raw in scan_lines(file, 1_000)]
    assert [type(one) for one in found] == [BatchLine, BadLine, BatchLine]
    assert isinstance(found[1], BadLine)
    assert found[1].problem.code == "line_too_long"
    assert "50000001 bytes" in found[1].problem.message
    assert file.most <= 1_048_576


def test_a_line_as_long_as_allowed_is_read_whatever_ends_it() -> None:
    text = line(1).encode()
    for ending in (b"", b"\n", b"\r\n"):
        assert isinstance(checked(text + ending, len(text))[0], BatchLine)
        assert isinstance(checked(text + ending, len(text) - 1)[0], BadLine)


def test_a_custom_id_that_was_used_before_names_both_lines() -> None:
    tracker = DuplicateTracker()
    one, two = (
        found for found in checked(f"{line(1)}\n{line(2, custom_id='c1')}".encode()) if isinstance(found, BatchLine)
    )
    assert tracker.check_line(one) is None
    again = tracker.check_line(two)
    assert isinstance(again, BadLine)
    assert again.problem.code == "duplicate_custom_id"
    assert "line 1" in again.problem.message
    assert again.problem.line == 2


def test_the_same_request_in_another_spelling_is_a_duplicate() -> None:
    first = json.dumps({"custom_id": "a", "method": "POST", "url": CHAT, "body": {"top_k": 1, "y": [1, 2]}})
    second = json.dumps({"custom_id": "b", "method": "POST", "url": CHAT, "body": {"y": [1, 2], "top_k": 1}})
    third = json.dumps({"custom_id": "c", "method": "POST", "url": CHAT, "body": {"y": [2, 1], "top_k": 1}})
    tracker = DuplicateTracker()
    found = [one for one in checked("\n".join((first, second, third)).encode()) if isinstance(one, BatchLine)]
    assert [tracker.check_line(one) for one in found] == [None, 1, None]


@pytest.mark.parametrize(
    ("url", "body", "shared"),
    [
        (CHAT, {}, False),
        (CHAT, {"temperature": 0.7}, False),
        (CHAT, {"temperature": 1, "seed": 7}, False),
        (CHAT, {"temperature": 0}, True),
        (CHAT, {"temperature": 0.0, "n": 1}, True),
        (CHAT, {"temperature": 0, "n": 2}, False),
        (CHAT, {"temperature": False}, False),
        (CHAT, {"temperature": None, "top_k": 1}, True),
        ("/v1/completions", {"temperature": 0, "best_of": 3}, False),
        ("/v1/messages", {"top_k": 1, "max_tokens": 5}, True),
        ("/v1/messages", {"top_k": 40}, False),
        ("/v1/responses", {"temperature": 0}, True),
        ("/v1/responses", {}, False),
        ("/v1/embeddings", {}, True),
        ("/v1/decisions", {}, True),
        ("/v1/systemone", {}, True),
        ("/v1/extract", {}, True),
        ("/v1/unknown", {}, False),
    ],
)
def test_only_deterministic_requests_share_an_answer(url: str, body: dict[str, object], shared: bool) -> None:
    tracker = DuplicateTracker()
    found = [BatchLine(number, 0, 0, f"c{number}", url, body, b"same") for number in (1, 2)]
    assert is_deterministic(found[0]) is shared
    assert [tracker.check_line(one) for one in found] == [None, 1 if shared else None]
