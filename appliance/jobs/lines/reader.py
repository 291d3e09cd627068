"""Reading a JSONL file of requests: a line at a time, each checked by itself, and every mistake with its line number.

A mistake costs the line it is in and no other. Nothing here holds more than one line, and of one that is too long only
as much as may be read.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import orjson

from appliance.core.json_types import MutableJsonObject
from appliance.jobs.models import BadLine, BatchLine, BatchProblem

MAX_CUSTOM_ID_CHARS: Final = 512
_PIECE_BYTES: Final = 1_048_576
_BOM: Final = b"\xef\xbb\xbf"
_DETERMINISTIC_ENDPOINTS: Final = frozenset({"/v1/embeddings", "/v1/decisions", "/v1/systemone", "/v1/extract"})
"""They have no sampling options: vectors and label scores are computed, extractions are decoded greedily."""


@dataclass(frozen=True, slots=True)
class RawLine:
    """`data` is None where the line is longer than may be read; `length` counts its end of line too."""

    number: int
    offset: int
    length: int
    data: bytes | None


def scan_lines(file: BinaryIO, max_line_bytes: int) -> Iterator[RawLine]:
    """Every line with something in it, from the file's position on, which is the beginning of line 1."""
    number, offset = 0, file.tell()
    while first := file.readline(max_line_bytes + 1):
        number, piece = number + 1, first
        length, is_long = len(piece), len(piece.rstrip(b"\r\n")) > max_line_bytes
        while not piece.endswith(b"\n") and (piece := file.readline(_PIECE_BYTES)):
            length, is_long = length + len(piece), is_long or bool(piece.rstrip(b"\r\n"))
        data = first.removeprefix(_BOM).strip(b" \t\r\n")
        if is_long:
            yield RawLine(number, offset, length, None)
        elif data:
            yield RawLine(number, offset, length, data)
        offset += length


def read_line_at(file: BinaryIO, number: int, offset: int, length: int) -> RawLine:
    """A line that was seen before, from where it was then."""
    file.seek(offset)
    return RawLine(number, offset, length, file.read(length).removeprefix(_BOM).strip(b" \t\r\n"))


def parse_line(raw: RawLine, endpoint: str) -> BatchLine | BadLine:
    """The request in a line. Whether its body is a good one shows when it is asked."""
    if raw.data is None:
        return _bad(raw, None, "line_too_long", f"the line has {raw.length} bytes, more than a line may have here")
    try:
        raw.data.decode()
    except UnicodeDecodeError as error:
        return _bad(raw, None, "invalid_encoding", f"byte {error.start + 1} of the line is not UTF-8: save it as UTF-8")
    try:
        value = orjson.loads(raw.data)
    except orjson.JSONDecodeError as error:
        return _bad(raw, None, "invalid_json_line", f"the line is not valid JSON: {error}")
    if not isinstance(value, dict):
        return _bad(raw, None, "invalid_json_line", f"the line is a JSON {type(value).__name__}: it must be an object")
    return _check_request(raw, value, endpoint)


def _check_request(raw: RawLine, value: MutableJsonObject, endpoint: str) -> BatchLine | BadLine:
    custom_id, method, url, body = (value.get(name) for name in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        found = "is missing" if custom_id is None else f"is {str(custom_id)[:80]!r}"
        text = f"custom_id {found}: give every line a text of 1 to {MAX_CUSTOM_ID_CHARS} characters of its own"
        return _bad(raw, None, "missing_required_parameter", text, "custom_id")
    if method != "POST":
        return _bad(raw, custom_id, "invalid_method", f"method is {str(method)[:20]!r}: only POST is done", "method")
    if url != endpoint:
        text = f"url is {str(url)[:80]!r}, and the batch was made for {endpoint}: make a batch for each endpoint"
        return _bad(raw, custom_id, "mismatched_endpoint", text, "url")
    if not isinstance(body, dict):
        return _bad(raw, custom_id, "missing_required_parameter", "body is missing or no JSON object", "body")
    if value.get("headers"):
        text = "a line has no headers: what binds or tags it is said where the batch is made"
        return _bad(raw, custom_id, "unsupported_parameter", text, "headers")
    if body.get("stream"):
        text = "a line of a batch cannot be streamed: leave stream out"
        return _bad(raw, custom_id, "unsupported_parameter", text, "body.stream")
    try:
        digest = _digest(url, body)
    except orjson.JSONEncodeError:  # what is read may be nested deeper than what is written
        text = "the body is nested too deeply: flatten it"
        return _bad(raw, custom_id, "invalid_json_line", text, "body")
    return BatchLine(raw.number, raw.offset, raw.length, custom_id, url, body, digest)


def _digest(url: str, body: MutableJsonObject) -> bytes:
    """The same for the same request, whatever the order of its fields."""
    said = url.encode() + b"\n" + orjson.dumps(body, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(said, digest_size=16).digest()


def _bad(raw: RawLine, custom_id: str | None, code: str, message: str, param: str | None = None) -> BadLine:
    return BadLine(raw.number, raw.offset, raw.length, custom_id, BatchProblem(code, message, raw.number, param))


def is_deterministic(line: BatchLine) -> bool:
    """Whether asking the same again would give the same answer, so that identical lines may share one.

    What samples does not: its author wants several answers. A seed does not change that: hosted targets take it as a
    hint or not at all.
    """
    if line.url in _DETERMINISTIC_ENDPOINTS:
        return True
    body = line.body
    if any(body.get(name) not in (None, 1) for name in ("n", "best_of")):
        return False
    return _is_number(body.get("temperature"), 0) or _is_number(body.get("top_k"), 1)


def _is_number(value: Any, wanted: int) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == wanted


class DuplicateTracker:
    """Sees every line of a file once, and knows the custom ids and the deterministic requests it has seen before."""

    def __init__(self) -> None:
        self._names: dict[bytes, int] = {}
        self._first: dict[bytes, int] = {}

    def check_line(self, line: BatchLine) -> BadLine | int | None:
        """A mistake where the line's custom_id was used before, the first line whose answer it shares, or None."""
        name = hashlib.blake2b(line.custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        earlier = self._names.setdefault(name, line.number)
        if earlier != line.number:
            text = f"custom_id {line.custom_id[:80]!r} is that of line {earlier} too: give every line its own"
            problem = BatchProblem("duplicate_custom_id", text, line.number, "custom_id")
            return BadLine(line.number, line.offset, line.length, line.custom_id, problem)
        if not is_deterministic(line):
            return None
        first = self._first.setdefault(line.digest, line.number)
        return None if first == line.number else first
