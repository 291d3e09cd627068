"""Calls as Python writes them: `[name(key=value, ...), ...]`."""

import ast
import json

from appliance.llamacpp.tools.cursor import (
    MalformedReply,
    ReplyCursor,
    Step,
    TruncatedReply,
    is_value,
    parse_json,
    write_json,
)
from appliance.llamacpp.tools.formats import MAX_NAME_CHARS, ToolSyntax


def read_pythonic_calls(cursor: ReplyCursor, syntax: ToolSyntax) -> Step[None]:
    if not syntax.bare:
        yield from cursor.skip()
        yield from cursor.take("[")
    before = cursor.calls
    while True:
        sign = yield from cursor.skip()
        if sign == "]" and cursor.calls > before:
            cursor.position += 1
            break
        if sign == "," and cursor.calls > before:
            cursor.position += 1
            continue
        yield from _pythonic_call(cursor)
    if syntax.section_close:
        yield from cursor.skip_optional(syntax.section_close)


def _pythonic_call(cursor: ReplyCursor) -> Step[None]:
    name = yield from _word(cursor, ".-")
    if (yield from cursor.peek()) != "(":
        raise MalformedReply("no call") if (yield from cursor.peek()) else TruncatedReply
    cursor.position += 1
    cursor.open_call(name)
    first = True
    while (sign := (yield from cursor.skip())) != ")":
        if sign == "," and not first:
            cursor.position += 1
            continue
        key = yield from _word(cursor)
        yield from cursor.skip()
        yield from cursor.take("=")
        value = yield from _literal(cursor)
        cursor.arguments(("{" if first else ", ") + write_json(key) + ": " + value)
        first = False
    cursor.position += 1
    cursor.arguments("{}" if first else "}")
    cursor.close_call()


def _word(cursor: ReplyCursor, more: str = "") -> Step[str]:
    start = cursor.position
    while (sign := (yield from cursor.peek())) and (sign.isalnum() or sign == "_" or sign in more):
        cursor.position += 1
    word = cursor.text[start : cursor.position]
    if not sign:
        raise TruncatedReply
    if not word or len(word) > MAX_NAME_CHARS or not (word[0].isalpha() or word[0] == "_"):
        raise MalformedReply("a name was expected")
    return word


def _literal(cursor: ReplyCursor) -> Step[str]:
    """A Python or JSON literal up to the comma or bracket that ends it, as JSON."""
    yield from cursor.skip()
    start, depth, quote = cursor.position, 0, ""
    while sign := (yield from cursor.peek()):
        if quote:
            if sign == "\\":
                cursor.position += 1
                if not (yield from cursor.peek()):
                    raise TruncatedReply
            elif sign == quote:
                quote = ""
        elif sign in "'\"":
            quote = sign
        elif sign in "[{(":
            depth += 1
        elif depth == 0 and sign in ",)":
            return _aswrite_json(cursor.text[start : cursor.position].strip())
        elif sign in "]})":
            depth -= 1
        cursor.position += 1
    raise TruncatedReply


def _aswrite_json(text: str) -> str:
    if is_value(parse_json(text)):
        return text
    try:
        return json.dumps(ast.literal_eval(text), ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise MalformedReply(f"no literal: {text:.80}") from error
