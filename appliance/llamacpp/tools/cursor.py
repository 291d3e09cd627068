"""The text of one reply while it arrives, and the steps that its readers are made of.

A step is a generator that yields whenever it needs more text and returns what it found. What it finds depends on the
characters alone, never on how they were cut into pieces.
"""

import json
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

Found = TypeVar("Found")
Step = Generator[None, None, Found]
Sink = Callable[[str], None]

MAX_NESTING: Final = 256
_SPACE: Final = " \t\r\n"
_OUTSIDE: Final = re.compile(r'[^"{}\[\]]+|["{}\[\]]')
_INSIDE: Final = re.compile(r'[^"\\]+|["\\]')
_SCALAR_ENDS: Final = frozenset(",}]<;)" + _SPACE)


class MalformedReply(Exception):
    """What stands here is no call in the expected form."""


class TruncatedReply(Exception):
    """The reply ended inside a call."""


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Text for the user. `start` is where it stands in the reply, in characters."""

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArgumentsDelta:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


Event = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallArgumentsDelta


class ReplyCursor:
    """The reply so far, how far it has been read, and what was found in it. Replies are bounded by the context."""

    def __init__(self) -> None:
        self.text = ""
        self.position = 0
        self.ended = False
        self.events: list[Event] = []
        self.calls = 0
        self.call_open = False
        """A call's name is out and its arguments are not complete."""
        self._space_from = -1
        self._arguments: list[str] = []

    # What is found

    def content(self, start: int, stop: int) -> None:
        """Give out a part of the reply; the white space at its end waits until it is known what follows."""
        begin = self._space_from if self._space_from >= 0 else start
        kept = self.text[start:stop].rstrip(_SPACE)
        if not kept:
            if stop > start:
                self._space_from = begin
            return
        end = start + len(kept)
        self._add(ContentDelta(self.text[begin:end], begin))
        self._space_from = end if end < stop else -1

    def flush_space(self) -> None:
        """The white space that waited is content after all."""
        if self._space_from >= 0:
            self._add(ContentDelta(self.text[self._space_from : self.position], self._space_from))
        self._space_from = -1

    def drop_space(self) -> None:
        self._space_from = -1

    def reasoning(self, text: str) -> None:
        if text:
            self._add(ReasoningDelta(text))

    def open_call(self, name: str) -> None:
        if not name:
            raise MalformedReply("a call without a name")
        self.drop_space()
        self._add(ToolCallStart(self.calls, name))
        self.call_open, self._arguments = True, []

    def arguments(self, text: str) -> None:
        if text:
            self._arguments.append(text)
            self._add(ToolCallArgumentsDelta(self.calls, text))

    def close_call(self) -> None:
        """Raises MalformedReply unless the arguments are a JSON object."""
        written = "".join(self._arguments)
        if not written.strip():
            self.arguments("{}")
        elif not isinstance(parse_json(written), dict):
            raise MalformedReply(f"arguments that are no JSON object: {written:.80}")
        self.calls += 1
        self.call_open = False

    def _add(self, event: Event) -> None:
        self.events.append(event)

    # Steps

    def more(self) -> Step[None]:
        """Wait for more text. Raises TruncatedReply where none can come."""
        if self.ended:
            raise TruncatedReply
        yield

    def peek(self) -> Step[str]:
        """The next character, left where it is; empty at the end."""
        while self.position >= len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.position]

    def skip(self, signs: str = _SPACE) -> Step[str]:
        """Pass over `signs`, and peek at what follows."""
        while True:
            sign = yield from self.peek()
            if not sign or sign not in signs:
                return sign
            self.position += 1

    def starts(self, literal: str) -> Step[bool]:
        """Whether `literal` stands next; taken if it does. Raises TruncatedReply where the reply ends within it."""
        while True:
            at = self.text[self.position : self.position + len(literal)]
            if at == literal:
                self.position += len(literal)
                return True
            if not literal.startswith(at) or (self.ended and not at):
                return False
            yield from self.more()

    def take(self, literal: str) -> Step[None]:
        if not (yield from self.starts(literal)):
            raise MalformedReply(f"{literal!r} is missing") if (yield from self.peek()) else TruncatedReply

    def skip_optional(self, closing: str) -> Step[None]:
        """The closing marker, with white space before it, if it stands there."""
        start = self.position
        yield from self.skip()
        if not (yield from self.starts(closing)):
            self.position = start

    def until(self, markers: Sequence[str], give: Callable[[int, int], None], *, inside: bool = False) -> Step[str]:
        """Pass all text before the first of `markers` to `give` (as start and stop) and take the marker.

        Empty where the reply ends without one; half a marker at its end is text, unless it is the end of what the
        marker would close (`inside`).
        """
        while True:
            found = [(at, -len(one), one) for one in markers if (at := self.text.find(one, self.position)) >= 0]
            held = _held(self.text, self.position, markers) if inside or not self.ended else 0
            stop = len(self.text) - held
            if found and min(found)[0] < stop:
                at, _, marker = min(found)
                if at > self.position:
                    give(self.position, at)
                self.position = at + len(marker)
                return marker
            if stop > self.position:
                give(self.position, stop)
                self.position = stop
            if self.ended:
                return ""
            yield

    def collect_until(self, markers: Sequence[str]) -> Step[tuple[str, str]]:
        """The text before the first of `markers`, and that marker. Raises TruncatedReply where it ends before."""
        parts: list[str] = []
        marker = yield from self.until(markers, lambda start, stop: parts.append(self.text[start:stop]))
        if not marker:
            raise TruncatedReply
        return "".join(parts), marker

    def json(self, sink: Sink) -> Step[None]:
        """Pass one JSON value to `sink` as it comes."""
        first = yield from self.skip()
        if not first:
            raise TruncatedReply
        if first in "{[":
            yield from self._nested(sink)
        elif first == '"':
            yield from self._quoted(sink)
        else:
            yield from self._scalar(sink)

    def collect_json(self) -> Step[Any]:
        """One JSON value. Raises MalformedReply where it is none."""
        parts: list[str] = []
        yield from self.json(parts.append)
        value = parse_json("".join(parts))
        if value is _NOTHING:
            raise MalformedReply("no JSON")
        return value

    def _nested(self, sink: Sink) -> Step[None]:
        depth, inside = 0, False
        while True:
            start = self.position
            while self.position < len(self.text):
                match = (_INSIDE if inside else _OUTSIDE).match(self.text, self.position)
                assert match is not None, "every character is matched"
                token = match.group()
                if token == "\\":
                    if self.position + 2 > len(self.text):
                        break
                    self.position += 2
                    continue
                self.position = match.end()
                if token == '"':
                    inside = not inside
                elif not inside and token in "{}[]" and len(token) == 1:
                    depth += 1 if token in "{[" else -1
                    if depth > MAX_NESTING:
                        raise MalformedReply("nested too deeply")
                    if depth == 0:
                        sink(self.text[start : self.position])
                        return
            sink(self.text[start : self.position])
            yield from self.more()

    def _quoted(self, sink: Sink) -> Step[None]:
        start, scan = self.position, self.position + 1
        while True:
            while scan < len(self.text):
                if self.text[scan] == '"':
                    self.position = scan + 1
                    sink(self.text[start : self.position])
                    return
                scan += 2 if self.text[scan] == "\\" else 1
            yield from self.more()

    def _scalar(self, sink: Sink) -> Step[None]:
        start = self.position
        while (sign := (yield from self.peek())) and sign not in _SCALAR_ENDS:
            self.position += 1
        if not sign:
            raise TruncatedReply
        sink(self.text[start : self.position])


_NOTHING: Final = object()


def parse_json(text: str) -> Any:
    """The JSON value, or a value that equals nothing else."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return _NOTHING


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def write_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def is_value(found: Any) -> bool:
    return found is not _NOTHING


def _held(text: str, start: int, markers: Sequence[str]) -> int:
    """How many characters at the end may still become a marker."""
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text) - start), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    return longest
