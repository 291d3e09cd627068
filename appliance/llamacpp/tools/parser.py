"""Reads one reply as it comes: what is reasoning, what is content, what are calls and their arguments."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from appliance.core import ReasoningFormat, ToolFormat
from appliance.errors import ApplianceError
from appliance.llamacpp.tools.cursor import Event, MalformedReply, ReplyCursor, Step, TruncatedReply
from appliance.llamacpp.tools.formats import SYNTAXES, THINKING, WRAPPERS, ToolSchemas, ToolSyntax
from appliance.llamacpp.tools.harmony import read_harmony
from appliance.llamacpp.tools.json_calls import (
    read_end_of_unmarked_call,
    read_json_calls,
    read_named_calls,
    read_unmarked_call,
)
from appliance.llamacpp.tools.pythonic_calls import read_pythonic_calls
from appliance.llamacpp.tools.tagged_calls import read_tagged_call

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
    schemas: ToolSchemas = field(default_factory=dict)
    """Parameters of the tools that were offered, by name."""
    shown: frozenset[int] = frozenset()
    """Control tokens whose text the reader must see."""


class ToolReplyParser:
    """One reply. The events of all its pieces together are the same however it was cut."""

    def __init__(self, syntaxes: ReplySyntaxes) -> None:
        self._cursor = ReplyCursor()
        self._syntaxes = syntaxes
        self._reasoned = False
        self._unread = -1
        self._marked = False
        """What is unread began with the format's own marker, so half of it is no text."""
        self.thinking = syntaxes.thinking_open
        """What is being read is reasoning, as far as is known. Harmony's channels say it by their events."""
        self._steps = self._reply()
        self._done = next(self._steps, self) is self

    @property
    def calls(self) -> int:
        """Calls that were read, complete or not."""
        return self._cursor.calls + self._cursor.call_open

    def push(self, text: str) -> Sequence[Event]:
        """Raises ToolCallBroken."""
        self._cursor.text += text
        return self._events()

    def close(self, *, truncated: bool) -> Sequence[Event]:
        """The rest. `truncated`: the reply was ended by its length, so a call may be unfinished.

        Raises ToolCallBroken.
        """
        cursor = self._cursor
        cursor.ended = True
        events = self._events()
        if cursor.call_open and not truncated:
            raise _broken("it ends before its arguments do")
        if self._unread >= 0 and not cursor.calls and not cursor.call_open and not (truncated and self._marked):
            cursor.content(self._unread, len(cursor.text))
        if not cursor.calls:
            cursor.flush_space()
        return [*events, *self._taken()]

    def _events(self) -> Sequence[Event]:
        cursor = self._cursor
        if not self._done:
            try:
                self._done = next(self._steps, self) is self
            except MalformedReply as problem:
                raise _broken(str(problem)) from problem
        if self._done and self._unread < 0 and cursor.position < len(cursor.text):
            cursor.content(cursor.position, len(cursor.text))
            cursor.position = len(cursor.text)
        return self._taken()

    def _taken(self) -> Sequence[Event]:
        events, self._cursor.events = self._cursor.events, []
        return events

    def _reply(self) -> Step[None]:
        cursor = self._cursor
        if "harmony" in (self._syntaxes.reasoning, self._syntaxes.tools):
            with suppress(TruncatedReply):
                yield from read_harmony(cursor)
            cursor.position = len(cursor.text)
            return
        if self._syntaxes.reasoning is not None:
            yield from self._reasoning(*THINKING[self._syntaxes.reasoning])
        if self._syntaxes.tools is not None:
            yield from self._with_calls(SYNTAXES[self._syntaxes.tools])

    def _reasoning(self, opens: str, shuts: str) -> Step[None]:
        cursor = self._cursor
        if not self._syntaxes.thinking_open:
            start = cursor.position
            yield from cursor.skip()
            begins = False
            with suppress(TruncatedReply):
                begins = yield from cursor.starts(opens)
            if not begins:
                cursor.position = start
                return
        self.thinking = True
        pending: list[str] = []

        def give(begin: int, stop: int) -> None:
            """White space at either end belongs to the markers."""
            text = cursor.text[begin:stop]
            if not self._reasoned:
                text = text.lstrip(_WHITE)
            kept = text.rstrip(_WHITE)
            if kept:
                cursor.reasoning("".join(pending) + kept)
                pending.clear()
                self._reasoned = True
            pending.append(text[len(kept) :])

        yield from cursor.until((shuts,), give)
        self.thinking = False
        yield from cursor.skip()

    def _with_calls(self, syntax: ToolSyntax) -> Step[None]:
        cursor = self._cursor
        if syntax.bare:
            start = cursor.position
            sign = yield from cursor.skip()
            if sign == syntax.bare:
                cursor.position += 1 if syntax.kind == "pythonic" else 0
                yield from self._section(syntax, "", start)
            else:
                cursor.position = start
        unmarked = (*WRAPPERS, "{") if syntax.loose else ()
        while marker := (yield from cursor.until((*syntax.triggers, *unmarked), cursor.content)):
            start = cursor.position - len(marker)
            if marker in unmarked:
                yield from self._unmarked_call(marker, start)
            else:
                yield from self._section(syntax, marker, start)

    def _unmarked_call(self, wrapper: str, start: int) -> Step[None]:
        """A call without its marker, or text. Nothing is kept back longer than it could be a call."""
        cursor = self._cursor
        behind = cursor.position
        try:
            yield from read_unmarked_call(cursor, wrapper, self._syntaxes.schemas)
        except MalformedReply:
            if cursor.call_open:
                raise
            cursor.position = behind
            cursor.content(start, behind)
        except TruncatedReply:
            self._unread = start
            cursor.position = len(cursor.text)
        else:
            with suppress(TruncatedReply):
                yield from read_end_of_unmarked_call(cursor)

    def _section(self, syntax: ToolSyntax, marker: str, start: int) -> Step[None]:
        """Calls, or, where it turns out that there are none, the text as it stands."""
        cursor = self._cursor
        before = cursor.calls
        if marker.endswith("["):
            cursor.position -= 1
        try:
            yield from self._read_calls(syntax, marker)
        except MalformedReply:
            if cursor.call_open:
                raise
            if cursor.calls == before:
                cursor.position = max(cursor.position, start + len(marker))
                cursor.content(start, cursor.position)
        except TruncatedReply:
            self._unread = start if cursor.calls == before else cursor.position
            self._marked = bool(marker)
            cursor.position = len(cursor.text)

    def _read_calls(self, syntax: ToolSyntax, marker: str) -> Step[None]:
        """All calls of one section. Raises MalformedReply or TruncatedReply."""
        match syntax.kind:
            case "json":
                yield from read_json_calls(self._cursor, syntax)
            case "named":
                yield from read_named_calls(self._cursor, syntax)
            case "tagged":
                yield from read_tagged_call(self._cursor, syntax, marker, self._syntaxes.schemas)
            case _:
                yield from read_pythonic_calls(self._cursor, syntax)


def _broken(reason: str) -> ToolCallBroken:
    return ToolCallBroken(f"the model wrote a tool call that cannot be read: {reason}; ask again", status=502)
