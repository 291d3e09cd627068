"""One choice's tokens as text and, where its model calls tools or thinks aloud, as the parts of a message."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from appliance.llamacpp.chat.reply_text import PlacedToken, ReplyText, StopFinder
from appliance.llamacpp.engine_protocol import TokenEvent
from appliance.llamacpp.tools.cursor import ContentDelta, Event, ReasoningDelta
from appliance.llamacpp.tools.parser import ReplySyntaxes, ToolReplyParser


class ReplyPieces(Protocol):
    """What is needed of `Model` to turn tokens into bytes."""

    def piece(self, token: int, *, special: bool = False) -> bytes: ...


@dataclass(frozen=True, slots=True)
class MessagePart:
    """What one step of a choice brought. `events` only where a reader is at work, and then no `text`."""

    text: str = ""
    tokens: Sequence[PlacedToken[TokenEvent]] = ()
    events: Sequence[Event] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens or self.events)


class ReplyParser(Protocol):
    """One choice's way from tokens to what its caller gets."""

    completion_tokens: int
    reasoning_tokens: int

    @property
    def stopped(self) -> bool:
        """A stop string was found: nothing more comes."""

    @property
    def stopped_by(self) -> str | None:
        """Which one it was."""

    @property
    def called(self) -> bool:
        """A tool was called."""

    def push(self, events: Sequence[TokenEvent]) -> MessagePart: ...

    def close(self, *, truncated: bool) -> MessagePart:
        """The rest; `truncated` where the reply was ended by its length."""


class PlainReplyParser:
    """Text is text."""

    called = False
    reasoning_tokens = 0

    def __init__(self, pieces: ReplyPieces, stops: Sequence[str]) -> None:
        self._pieces = pieces
        self._text: ReplyText[TokenEvent] = ReplyText(stops)
        self.completion_tokens = 0

    @property
    def stopped(self) -> bool:
        return self._text.stopped

    @property
    def stopped_by(self) -> str | None:
        return self._text.stopped_by

    def push(self, events: Sequence[TokenEvent]) -> MessagePart:
        text: list[str] = []
        tokens: list[PlacedToken[TokenEvent]] = []
        for event in events:
            self.completion_tokens += 1
            step = self._text.push(self._pieces.piece(event.token), event if event.logprob is not None else None)
            text.append(step.text)
            tokens.extend(step.notes)
            if self._text.stopped:
                break
        return MessagePart("".join(text), tokens)

    def close(self, *, truncated: bool) -> MessagePart:
        rest = self._text.close()
        return MessagePart(rest.text, rest.notes)


class MessageReplyParser:
    """Text is reasoning, content and calls. Stop strings and log probabilities are those of the content alone."""

    def __init__(self, pieces: ReplyPieces, stops: Sequence[str], syntaxes: ReplySyntaxes) -> None:
        self._pieces, self._shown = pieces, syntaxes.shown
        self._text: ReplyText[TokenEvent] = ReplyText()
        self._stop = StopFinder(stops)
        self._held_chars = 0
        self._reading = ToolReplyParser(syntaxes)
        self._waiting: deque[PlacedToken[TokenEvent]] = deque()
        self.completion_tokens = 0
        self.reasoning_tokens = 0

    @property
    def stopped(self) -> bool:
        return self._stop.found is not None

    @property
    def stopped_by(self) -> str | None:
        return self._stop.found

    @property
    def called(self) -> bool:
        return self._reading.calls > 0

    def push(self, events: Sequence[TokenEvent]) -> MessagePart:
        step = _Step()
        for event in events:
            self.completion_tokens += 1
            piece = self._pieces.piece(event.token, special=event.token in self._shown)
            delta = self._text.push(piece, event if event.logprob is not None else None)
            self._waiting.extend(delta.notes)
            thinking = self._reading.thinking
            found = self._reading.push(delta.text)
            self.reasoning_tokens += thinking or any(isinstance(one, ReasoningDelta) for one in found)
            self._sort(found, step)
            if self.stopped:
                break
        return step.part()

    def close(self, *, truncated: bool) -> MessagePart:
        step = _Step()
        delta = self._text.close()
        self._waiting.extend(delta.notes)
        self._sort(self._reading.push(delta.text), step)
        self._sort(self._reading.close(truncated=truncated), step)
        self._release(step)
        return step.part()

    def _sort(self, events: Sequence[Event], step: "_Step") -> None:
        for event in events:
            if self.stopped:
                return
            if not isinstance(event, ContentDelta):
                self._release(step)
                step.add(event)
                continue
            begin = event.start - self._held_chars
            out = self._stop.push(event.text)
            self._held_chars += len(event.text) - len(out)
            if out:
                step.add(ContentDelta(out, begin))
            self._place(begin, begin + len(out), step)

    def _release(self, step: "_Step") -> None:
        """What was held back and became no stop string."""
        rest = self._stop.close()
        self._held_chars = 0
        if rest:
            step.add(ContentDelta(rest, 0))

    def _place(self, begin: int, end: int, step: "_Step") -> None:
        """Notes of tokens within the content go with it, those before it stood in markup."""
        while self._waiting and self._waiting[0].offset < end:
            note = self._waiting.popleft()
            if note.offset >= begin:
                step.tokens.append(note)


@dataclass(slots=True)
class _Step:
    events: list[Event] = field(default_factory=list)
    tokens: list[PlacedToken[TokenEvent]] = field(default_factory=list)

    def add(self, event: Event) -> None:
        last = self.events[-1] if self.events else None
        if isinstance(event, ContentDelta) and isinstance(last, ContentDelta):
            self.events[-1] = ContentDelta(last.text + event.text, last.start)
        elif isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            self.events[-1] = ReasoningDelta(last.text + event.text)
        else:
            self.events.append(event)

    def part(self) -> MessagePart:
        return MessagePart("", self.tokens, self.events)
