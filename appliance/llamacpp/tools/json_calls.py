"""Calls as JSON: `{"name": ..., "arguments": ...}`, alone, in a list or without a marker, and `NAME{...}`."""

from typing import Final

from appliance.llamacpp.tools.cursor import MalformedReply, ReplyCursor, Step, TruncatedReply, parse_json
from appliance.llamacpp.tools.formats import DEEPSEEK_CALL_END, MAX_NAME_CHARS, WRAPPERS, ToolSchemas, ToolSyntax

_NAME_KEYS: Final = frozenset({"name", "tool_name"})
_ARGUMENT_KEYS: Final = frozenset({"arguments", "parameters", "args"})
_SPACE: Final = " \t\r\n"


def read_json_calls(cursor: ReplyCursor, syntax: ToolSyntax) -> Step[None]:
    closing = syntax.section_close or syntax.call_close.lstrip("}").strip()
    listed = False
    before = cursor.calls
    while (sign := (yield from cursor.skip())) != "]":
        called = cursor.calls > before
        if sign == "{":
            yield from _json_call(cursor)
        elif sign == "[" and not listed and not called:
            listed = True
            cursor.position += 1
        elif sign in (",", ";") and called and (listed or syntax.bare):
            cursor.position += 1
        elif called and not listed:
            break
        else:
            raise MalformedReply("a call was expected") if sign else TruncatedReply
    if listed:
        yield from cursor.take("]")
        yield from cursor.skip()
    elif cursor.calls == before:
        raise MalformedReply("a call was expected")
    if closing:
        yield from cursor.starts(closing)


def read_unmarked_call(cursor: ReplyCursor, wrapper: str, schemas: ToolSchemas) -> Step[None]:
    """A call's JSON that may follow a wrapper or a brace. Raises MalformedReply where it is another text."""
    if wrapper != "{":
        yield from cursor.skip()
        yield from cursor.take("{")
    yield from cursor.skip(_SPACE + "{")
    yield from _keyword(cursor, '"name"')
    name = yield from cursor.collect_json()
    if not isinstance(name, str) or name not in schemas:
        raise MalformedReply("no tool of that name")
    yield from cursor.skip()
    yield from cursor.take(",")
    yield from cursor.skip()
    yield from _keyword(cursor, '"arguments"', '"parameters"')
    if (yield from cursor.skip()) != "{":
        raise MalformedReply("no arguments")
    cursor.open_call(name)
    yield from cursor.json(cursor.arguments)
    cursor.close_call()


def read_end_of_unmarked_call(cursor: ReplyCursor) -> Step[None]:
    """What may stand behind such a call: braces, commas and the end of its wrapper."""
    while (sign := (yield from cursor.skip(_SPACE + "},]"))) in ("`", "<"):
        start = cursor.position
        if sign == "<" and not (yield from cursor.starts("</")):
            return
        word = ""
        while (sign := (yield from cursor.peek())) and (sign.isalnum() or sign in "_`"):
            word += sign
            cursor.position += 1
        if word == "```" or (sign == ">" and f"<{word}>" in (*WRAPPERS, "<tool_call>")):
            cursor.position += 1 if sign == ">" else 0
            continue
        cursor.position = start
        return


def _keyword(cursor: ReplyCursor, *words: str) -> Step[None]:
    key = yield from _key(cursor)
    if f'"{key}"' not in words:
        raise MalformedReply("another key")
    yield from cursor.skip()


def _json_call(cursor: ReplyCursor) -> Step[None]:
    start = cursor.position
    try:
        yield from _json_object(cursor)
    except (MalformedReply, TruncatedReply):
        if not cursor.call_open:
            cursor.position = start
        raise


def _json_object(cursor: ReplyCursor) -> Step[None]:
    cursor.position += 1
    name = held = ""
    while (sign := (yield from cursor.skip())) != "}":
        if sign == ",":
            cursor.position += 1
            continue
        key = yield from _key(cursor)
        if key in _NAME_KEYS and not name:
            value = yield from cursor.collect_json()
            if not isinstance(value, str) or not value:
                raise MalformedReply("a name that is no text")
            name = value
            cursor.open_call(name)
            cursor.arguments(held)
        elif key in _ARGUMENT_KEYS:
            held = yield from _arguments(cursor, streamed=bool(name))
        else:
            yield from cursor.json(_ignored)
    cursor.position += 1
    if not name:
        raise MalformedReply("a call without a name")
    cursor.close_call()


def _key(cursor: ReplyCursor) -> Step[str]:
    sign = yield from cursor.peek()
    if not sign:
        raise TruncatedReply
    if sign != '"':
        raise MalformedReply("a key was expected")
    key = yield from cursor.collect_json()
    if (yield from cursor.skip()) != ":":
        raise MalformedReply("a colon is missing") if (yield from cursor.peek()) else TruncatedReply
    cursor.position += 1
    return str(key)


def _arguments(cursor: ReplyCursor, *, streamed: bool) -> Step[str]:
    """Arguments, passed on at once where the name is known; a string is taken for the JSON that it holds."""
    sign = yield from cursor.skip()
    if sign == "{" and streamed:
        yield from cursor.json(cursor.arguments)
        return ""
    parts: list[str] = []
    yield from cursor.json(parts.append)
    text = "".join(parts)
    value = parse_json(text)
    if isinstance(value, str):
        text = value
    elif value is None:
        text = "{}"
    if streamed:
        cursor.arguments(text)
        return ""
    return text


def _ignored(text: str) -> None:
    """Keys beside name and arguments, such as an id of the model's own."""


def read_named_calls(cursor: ReplyCursor, syntax: ToolSyntax) -> Step[None]:
    if not syntax.section_open:
        if (yield from cursor.skip()) == "[":
            yield from read_json_calls(cursor, syntax)  # models of the family that still write a list
        else:
            yield from _named_call(cursor, "[CALL_ID]", "[ARGS]")
        return
    before, _, separator = syntax.call_open.partition("{name}")
    opening, _, _ = before.partition("function")
    fenced = "```" in separator
    while True:
        yield from cursor.skip()
        if (yield from cursor.starts(syntax.section_close)):
            return
        if not (yield from cursor.starts(opening)):
            if cursor.ended and cursor.calls:
                return
            raise MalformedReply("a call was expected") if (yield from cursor.peek()) else TruncatedReply
        if fenced:
            yield from cursor.take(before.removeprefix(opening))
            yield from _named_call(cursor, "\n```json\n")
        else:
            yield from _named_call(cursor, separator)
        yield from cursor.skip()
        yield from cursor.starts("```")
        yield from cursor.skip()
        yield from cursor.starts(DEEPSEEK_CALL_END)


def _named_call(cursor: ReplyCursor, *separators: str) -> Step[None]:
    name, separator = yield from cursor.collect_until((*separators, "{"))
    if separator == "[CALL_ID]":
        _, separator = yield from cursor.collect_until(("[ARGS]", "{"))
    if separator == "{":
        cursor.position -= 1
    if len(name) > MAX_NAME_CHARS:
        raise MalformedReply("too long a name")
    cursor.open_call(name.strip().partition("\n")[0])
    yield from cursor.json(cursor.arguments)
    cursor.close_call()
