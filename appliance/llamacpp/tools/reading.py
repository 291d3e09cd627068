"""Reads one reply as it comes: what is reasoning, what is content, what are calls and their arguments."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from appliance.core import ReasoningFormat, ToolFormat
from appliance.errors import ApplianceError
from appliance.llamacpp.tools.formats import SYNTAXES, THINKING, WRAPPERS, ToolSyntax
from appliance.llamacpp.tools.harmony import read_harmony
from appliance.llamacpp.tools.source import Event, MalformedReply, ReplyCursor, Step, TruncatedReply
from appliance.llamacpp.tools.syntaxes import read_loose, read_loose_end, read_section

_WHITE: Final = " \t\r\n"


class ToolCallBroken(ApplianceError):
    """The model wrote a call whose arguments are no JSON, after its name had been passed on."""

    code = "tool_call_broken"


@dataclass(frozen=True, slots=True)
class ReplySyntaxes:
    """How the replies of one call are to be read."""

    tools: ToolFormat | None = None
    """None where no tools were offered: then a model's markup is text like any other."""
    reasoning: ReasoningFormat | None = None
    thinking_open: bool = False
    """The prompt ends inside the reasoning."""
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Parameters of the tools that were offered, by name."""
    shown: frozenset[int] = frozenset()
    """Control tokens whose text the reader must see."""


class ToolReplyParser:
    """One reply. The events of all its pieces together are the same however it was cut."""

    def __init__(self, read_as: ReplySyntaxes) -> None:
        self._source = ReplyCursor()
        self._as = read_as
        self._reasoned = False
        self._unread = -1
        self._marked = False
        """What is unread began with the format's own marker, so half of it is no text for anybody."""
        self.thinking = read_as.thinking_open
        """What is being read is reasoning, as far as is known. Harmony's channels tell by their events."""
        self._steps = self._reply()
        self._done = next(self._steps, self) is self

    @property
    def calls(self) -> int:
        """Calls that were read, complete or not."""
        return self._source.calls + self._source.call_open

    def push(self, text: str) -> Sequence[Event]:
        """Raises CallBroken."""
        self._source.text += text
        return self._events()

    def close(self, *, cut: bool) -> Sequence[Event]:
        """The rest. `cut`: the reply was ended by its length, so a call may be unfinished. Raises CallBroken."""
        source = self._source
        source.ended = True
        events = self._events()
        if source.call_open and not cut:
            raise _broken("it ends before its arguments do")
        if self._unread >= 0 and not source.calls and not source.call_open and not (cut and self._marked):
            source.content(self._unread, len(source.text))
        if not source.calls:
            source.flush_space()
        return [*events, *self._taken()]

    def _events(self) -> Sequence[Event]:
        source = self._source
        if not self._done:
            try:
                self._done = next(self._steps, self) is self
            except MalformedReply as problem:
                raise _broken(str(problem)) from problem
        if self._done and self._unread < 0 and source.position < len(source.text):
            source.content(source.position, len(source.text))
            source.position = len(source.text)
        return self._taken()

    def _taken(self) -> Sequence[Event]:
        events, self._source.events = self._source.events, []
        return events

    def _reply(self) -> Step[None]:
        source = self._source
        if "harmony" in (self._as.reasoning, self._as.tools):
            with suppress(TruncatedReply):
                yield from read_harmony(source)
            source.position = len(source.text)
            return
        if self._as.reasoning is not None:
            yield from self._reasoning(*THINKING[self._as.reasoning])
        if self._as.tools is not None:
            yield from self._with_calls(SYNTAXES[self._as.tools])

    def _reasoning(self, opens: str, shuts: str) -> Step[None]:
        source = self._source
        if not self._as.thinking_open:
            start = source.position
            yield from source.skip()
            begins = False
            with suppress(TruncatedReply):
                begins = yield from source.starts(opens)
            if not begins:
                source.position = start
                return
        self.thinking = True
        pending: list[str] = []

        def give(begin: int, stop: int) -> None:
            """White space at either end belongs to the markers."""
            text = source.text[begin:stop]
            if not self._reasoned:
                text = text.lstrip(_WHITE)
            kept = text.rstrip(_WHITE)
            if kept:
                source.reasoning("".join(pending) + kept)
                pending.clear()
                self._reasoned = True
            pending.append(text[len(kept) :])

        yield from source.until((shuts,), give)
        self.thinking = False
        yield from source.skip()

    def _with_calls(self, syntax: ToolSyntax) -> Step[None]:
        source = self._source
        if syntax.bare:
            start = source.position
            sign = yield from source.skip()
            if sign == syntax.bare:
                source.position += 1 if syntax.kind == "pythonic" else 0
                yield from self._section(syntax, "", start)
            else:
                source.position = start
        loose = (*WRAPPERS, "{") if syntax.loose else ()
        while marker := (yield from source.until((*syntax.triggers, *loose), source.content)):
            start = source.position - len(marker)
            if marker in loose:
                yield from self._loose(marker, start)
            else:
                yield from self._section(syntax, marker, start)

    def _loose(self, wrapper: str, start: int) -> Step[None]:
        """A call without its marker, or text. Nothing is kept back longer than it could be a call."""
        source = self._source
        behind = source.position
        try:
            yield from read_loose(source, wrapper, self._as.schemas)
        except MalformedReply:
            if source.call_open:
                raise
            source.position = behind
            source.content(start, behind)
        except TruncatedReply:
            self._unread = start
            source.position = len(source.text)
        else:
            with suppress(TruncatedReply):
                yield from read_loose_end(source)

    def _section(self, syntax: ToolSyntax, marker: str, start: int) -> Step[None]:
        """Calls, or, where it turns out that there are none, the text as it stands."""
        source = self._source
        before = source.calls
        if marker.endswith("["):
            source.position -= 1
        try:
            yield from read_section(source, syntax, marker, self._as.schemas)
        except MalformedReply:
            if source.call_open:
                raise
            if source.calls == before:
                source.position = max(source.position, start + len(marker))
                source.content(start, source.position)
        except TruncatedReply:
            self._unread = start if source.calls == before else source.position
            self._marked = bool(marker)
            source.position = len(source.text)


def _broken(reason: str) -> ToolCallBroken:
    return ToolCallBroken(f"the model wrote a tool call that cannot be read: {reason}; ask again", status=502)
