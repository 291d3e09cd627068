"""Tokens to text, piece by piece: whole characters only, nothing of a stop string, each token beside its text."""

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Note = TypeVar("Note")


class Utf8Stream:
    """Bytes in any pieces to text; a character is given out only when its last byte is there.

    Bytes that are no UTF-8 become U+FFFD, as `bytes.decode(errors="replace")` has it, wherever the pieces were cut.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, piece: bytes) -> str:
        return self._decoder.decode(piece)

    def close(self) -> str:
        """The rest: U+FFFD when the last character never became whole, else nothing."""
        return self._decoder.decode(b"", True)


class StopFinder:
    """Lets text through up to the first stop string, holding back what might still become one.

    "First" is the one whose end comes first in the text (of those, the longest), because that is the only choice
    which does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(dict.fromkeys(stop for stop in stops if stop))
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that may go out now. Empty for ever once a stop string was found."""
        if not self._stops:
            return text
        if self.found is not None:
            return ""
        self._held += text
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if matches:
            _, at, self.found = min(matches)
            safe, self._held = self._held[:at], ""
            return safe
        keep = max(self._partial(stop) for stop in self._stops)
        cut = len(self._held) - keep
        safe, self._held = self._held[:cut], self._held[cut:]
        return safe

    def close(self) -> str:
        """What was held back and became no stop string."""
        rest, self._held = self._held, ""
        return rest

    def _partial(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop` without completing it."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0


@dataclass(frozen=True, slots=True)
class PlacedToken(Generic[Note]):
    """A token's note and where its text begins in the reply, in characters."""

    offset: int
    note: Note


@dataclass(frozen=True, slots=True)
class TextDelta(Generic[Note]):
    """Text that may go out, and the notes of the tokens whose text has begun to go out."""

    text: str
    notes: Sequence[PlacedToken[Note]]


class ReplyText(Generic[Note]):
    """One choice's text from its tokens' bytes, with stop strings, and every token's note released with its text.

    Tokens are released in order. A token that lies wholly in a stop string is never released, nor is one after it.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._utf8 = Utf8Stream()
        self._stop = StopFinder(stops)
        self._decoded_chars = 0
        self._sent_chars = 0
        self._waiting: deque[PlacedToken[Note]] = deque()

    @property
    def stopped(self) -> bool:
        return self._stop.found is not None

    @property
    def stopped_by(self) -> str | None:
        return self._stop.found

    def push(self, piece: bytes, note: Note | None = None) -> TextDelta[Note]:
        if self.stopped:
            return TextDelta("", ())
        if note is not None:
            self._waiting.append(PlacedToken(self._decoded_chars, note))
        text = self._utf8.push(piece)
        self._decoded_chars += len(text)
        return self._sent(self._stop.push(text))

    def close(self) -> TextDelta[Note]:
        """The rest, once no token can follow."""
        if self.stopped:
            return TextDelta("", ())
        out = self._stop.push(self._utf8.close())
        if not self.stopped:
            out += self._stop.close()
        delta = self._sent(out)
        if self.stopped:
            return delta
        notes = (*delta.notes, *self._waiting)
        self._waiting.clear()
        return TextDelta(delta.text, notes)

    def _sent(self, text: str) -> TextDelta[Note]:
        self._sent_chars += len(text)
        notes = []
        while self._waiting and self._waiting[0].offset < self._sent_chars:
            notes.append(self._waiting.popleft())
        return TextDelta(text, notes)
