"""Readers of one section of calls, one for each kind of syntax. Each begins behind the marker that opened it."""

import ast
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from appliance.llamacpp.tools.formats import DEEPSEEK_CALL_END, WRAPPERS, ToolSyntax
from appliance.llamacpp.tools.source import MalformedReply, ReplyCursor, Step, TruncatedReply, is_value, parse_json

Schemas = Mapping[str, Mapping[str, Any]]
"""The parameters' JSON schema of every tool that was offered, by name."""

_NAME_KEYS: Final = frozenset({"name", "tool_name"})
_ARGUMENT_KEYS: Final = frozenset({"arguments", "parameters", "args"})
_SPACE: Final = " \t\r\n"
_MAX_NAME: Final = 256


def read_section(source: ReplyCursor, syntax: ToolSyntax, opened_by: str, schemas: Schemas) -> Step[None]:
    """All calls of one section. Raises Malformed or Cut; `source.call_open` tells whether a call was under way."""
    match syntax.kind:
        case "json":
            yield from _json_calls(source, syntax)
        case "named":
            yield from _named_calls(source, syntax)
        case "tagged":
            yield from _tagged_call(source, syntax, opened_by, schemas)
        case _:
            yield from _pythonic_calls(source, syntax)


# {"name": ..., "arguments": ...}, alone or in a list


def _json_calls(source: ReplyCursor, syntax: ToolSyntax) -> Step[None]:
    closing = syntax.section_close or syntax.call_close.lstrip("}").strip()
    listed = False
    before = source.calls
    while (sign := (yield from source.skip())) != "]":
        called = source.calls > before
        if sign == "{":
            yield from _json_call(source)
        elif sign == "[" and not listed and not called:
            listed = True
            source.position += 1
        elif sign in (",", ";") and called and (listed or syntax.bare):
            source.position += 1
        elif called and not listed:
            break
        else:
            raise MalformedReply("a call was expected") if sign else TruncatedReply
    if listed:
        yield from source.take("]")
        yield from source.skip()
    elif source.calls == before:
        raise MalformedReply("a call was expected")
    if closing:
        yield from source.starts(closing)


def read_loose(source: ReplyCursor, wrapper: str, schemas: Schemas) -> Step[None]:
    """A call's JSON that may follow a wrapper or a brace. Raises Malformed where it is another text."""
    if wrapper != "{":
        yield from source.skip()
        yield from source.take("{")
    yield from source.skip(_SPACE + "{")
    yield from _keyword(source, '"name"')
    name = yield from source.collect_json()
    if not isinstance(name, str) or name not in schemas:
        raise MalformedReply("no tool of that name")
    yield from source.skip()
    yield from source.take(",")
    yield from source.skip()
    yield from _keyword(source, '"arguments"', '"parameters"')
    if (yield from source.skip()) != "{":
        raise MalformedReply("no arguments")
    source.open_call(name)
    yield from source.json(source.arguments)
    source.close_call()


def read_loose_end(source: ReplyCursor) -> Step[None]:
    """What may stand behind such a call: braces, commas and the end of its wrapper."""
    while (sign := (yield from source.skip(_SPACE + "},]"))) in ("`", "<"):
        start = source.position
        if sign == "<" and not (yield from source.starts("</")):
            return
        word = ""
        while (sign := (yield from source.peek())) and (sign.isalnum() or sign in "_`"):
            word += sign
            source.position += 1
        if word == "```" or (sign == ">" and f"<{word}>" in (*WRAPPERS, "<tool_call>")):
            source.position += 1 if sign == ">" else 0
            continue
        source.position = start
        return


def _keyword(source: ReplyCursor, *words: str) -> Step[None]:
    key = yield from _key(source)
    if f'"{key}"' not in words:
        raise MalformedReply("another key")
    yield from source.skip()


def _optional(source: ReplyCursor, closing: str) -> Step[None]:
    """The closing marker, with white space before it, if it stands there."""
    start = source.position
    yield from source.skip()
    if not (yield from source.starts(closing)):
        source.position = start


def _json_call(source: ReplyCursor) -> Step[None]:
    start = source.position
    try:
        yield from _json_object(source)
    except (MalformedReply, TruncatedReply):
        if not source.call_open:
            source.position = start
        raise


def _json_object(source: ReplyCursor) -> Step[None]:
    source.position += 1
    name = held = ""
    while (sign := (yield from source.skip())) != "}":
        if sign == ",":
            source.position += 1
            continue
        key = yield from _key(source)
        if key in _NAME_KEYS and not name:
            value = yield from source.collect_json()
            if not isinstance(value, str) or not value:
                raise MalformedReply("a name that is no text")
            name = value
            source.open_call(name)
            source.arguments(held)
        elif key in _ARGUMENT_KEYS:
            held = yield from _arguments(source, streamed=bool(name))
        else:
            yield from source.json(_ignored)
    source.position += 1
    if not name:
        raise MalformedReply("a call without a name")
    source.close_call()


def _key(source: ReplyCursor) -> Step[str]:
    sign = yield from source.peek()
    if not sign:
        raise TruncatedReply
    if sign != '"':
        raise MalformedReply("a key was expected")
    key = yield from source.collect_json()
    if (yield from source.skip()) != ":":
        raise MalformedReply("a colon is missing") if (yield from source.peek()) else TruncatedReply
    source.position += 1
    return str(key)


def _arguments(source: ReplyCursor, *, streamed: bool) -> Step[str]:
    """Arguments, passed on at once where the name is known; a string is taken for the JSON that it holds."""
    sign = yield from source.skip()
    if sign == "{" and streamed:
        yield from source.json(source.arguments)
        return ""
    parts: list[str] = []
    yield from source.json(parts.append)
    text = "".join(parts)
    value = parse_json(text)
    if isinstance(value, str):
        text = value
    elif value is None:
        text = "{}"
    if streamed:
        source.arguments(text)
        return ""
    return text


def _ignored(text: str) -> None:
    """Keys beside name and arguments, such as an id of the model's own."""


# NAME<separator>{...}


def _named_calls(source: ReplyCursor, syntax: ToolSyntax) -> Step[None]:
    if not syntax.section_open:
        if (yield from source.skip()) == "[":
            yield from _json_calls(source, syntax)  # models of the family that still write a list
        else:
            yield from _named_call(source, "[CALL_ID]", "[ARGS]")
        return
    before, _, separator = syntax.call_open.partition("{name}")
    opening, _, _ = before.partition("function")
    fenced = "```" in separator
    while True:
        yield from source.skip()
        if (yield from source.starts(syntax.section_close)):
            return
        if not (yield from source.starts(opening)):
            if source.ended and source.calls:
                return
            raise MalformedReply("a call was expected") if (yield from source.peek()) else TruncatedReply
        if fenced:
            yield from source.take(before.removeprefix(opening))
            yield from _named_call(source, "\n```json\n")
        else:
            yield from _named_call(source, separator)
        yield from source.skip()
        yield from source.starts("```")
        yield from source.skip()
        yield from source.starts(DEEPSEEK_CALL_END)


def _named_call(source: ReplyCursor, *separators: str) -> Step[None]:
    name, separator = yield from source.collect_until((*separators, "{"))
    if separator == "[CALL_ID]":
        _, separator = yield from source.collect_until(("[ARGS]", "{"))
    if separator == "{":
        source.position -= 1
    if len(name) > _MAX_NAME:
        raise MalformedReply("too long a name")
    source.open_call(name.strip().partition("\n")[0])
    yield from source.json(source.arguments)
    source.close_call()


# <parameter=KEY>VALUE</parameter>


def _tagged_call(source: ReplyCursor, syntax: ToolSyntax, opened_by: str, schemas: Schemas) -> Step[None]:
    ends: tuple[str, ...] = ("</arg_value>",)
    if "<function=" in syntax.call_open:
        if opened_by != "<function=":
            yield from source.skip()
            yield from source.take("<function=")
        name, _ = yield from source.collect_until((">",))
        key_opens, key_shuts, value_opens, closes = "<parameter=", ">", "", "</function>"
        ends = ("\n</parameter>", "</parameter>")
    else:
        name, mark = yield from source.collect_until(("\n", "<arg_key>", "</tool_call>"))
        source.position -= len(mark) if mark != "\n" else 0
        key_opens, key_shuts, value_opens, closes = "<arg_key>", "</arg_key>", "<arg_value>", "</tool_call>"
    name = name.strip()
    if len(name) > _MAX_NAME:
        raise MalformedReply("too long a name")
    source.open_call(name)
    properties = schemas.get(name, {}).get("properties")
    first = True
    while True:
        yield from source.skip()
        if (yield from source.starts(closes)):
            break
        yield from source.take(key_opens)
        key, _ = yield from source.collect_until((key_shuts,))
        if value_opens:
            yield from source.skip()
            yield from source.take(value_opens)
        else:
            yield from source.starts("\n")
        source.arguments(("{" if first else ", ") + _json(key.strip()) + ": ")
        schema = properties.get(key.strip(), {}) if isinstance(properties, Mapping) else {}
        yield from _tagged_value(source, schema, ends)
        first = False
    source.arguments("{}" if first else "}")
    source.close_call()
    if closes == "</function>":
        yield from _optional(source, "</tool_call>")


def _tagged_value(source: ReplyCursor, schema: Any, ends: tuple[str, ...]) -> Step[None]:
    if _types(schema) == {"string"}:
        source.arguments('"')
        marker = yield from source.until(
            ends, lambda start, stop: source.arguments(_json(source.text[start:stop])[1:-1]), inside=True
        )
        if not marker:
            raise TruncatedReply
        source.arguments('"')
        return
    text, _ = yield from source.collect_until(ends)
    value = parse_json(text.strip())
    plain = not is_value(value) or ("string" in _types(schema) and not _fits(value, schema))
    source.arguments(_json(text) if plain else text.strip())


def _types(schema: Any) -> set[str]:
    """The JSON types that a schema names; empty where it names none."""
    if not isinstance(schema, Mapping):
        return set()
    given = schema.get("type")
    types = {given} if isinstance(given, str) else {one for one in given or () if isinstance(one, str)}
    for choice in (*_listed(schema, "anyOf"), *_listed(schema, "oneOf")):
        types |= _types(choice)
    if not types and (values := _listed(schema, "enum")) and all(isinstance(value, str) for value in values):
        return {"string"}
    return types


def _listed(schema: Mapping[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


_TYPES: Final[Mapping[str, Callable[[Any], bool]]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def _fits(value: Any, schema: Any) -> bool:
    """Whether a value is of one of the types that stand beside "string"."""
    return any(_TYPES[name](value) for name in _types(schema) if name in _TYPES)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# name(key=value, ...)


def _pythonic_calls(source: ReplyCursor, syntax: ToolSyntax) -> Step[None]:
    if not syntax.bare:
        yield from source.skip()
        yield from source.take("[")
    before = source.calls
    while True:
        sign = yield from source.skip()
        if sign == "]" and source.calls > before:
            source.position += 1
            break
        if sign == "," and source.calls > before:
            source.position += 1
            continue
        yield from _pythonic_call(source)
    if syntax.section_close:
        yield from _optional(source, syntax.section_close)


def _pythonic_call(source: ReplyCursor) -> Step[None]:
    name = yield from _word(source, ".-")
    if (yield from source.peek()) != "(":
        raise MalformedReply("no call") if (yield from source.peek()) else TruncatedReply
    source.position += 1
    source.open_call(name)
    first = True
    while (sign := (yield from source.skip())) != ")":
        if sign == "," and not first:
            source.position += 1
            continue
        key = yield from _word(source)
        yield from source.skip()
        yield from source.take("=")
        value = yield from _literal(source)
        source.arguments(("{" if first else ", ") + _json(key) + ": " + value)
        first = False
    source.position += 1
    source.arguments("{}" if first else "}")
    source.close_call()


def _word(source: ReplyCursor, more: str = "") -> Step[str]:
    start = source.position
    while (sign := (yield from source.peek())) and (sign.isalnum() or sign == "_" or sign in more):
        source.position += 1
    word = source.text[start : source.position]
    if not sign:
        raise TruncatedReply
    if not word or len(word) > _MAX_NAME or not (word[0].isalpha() or word[0] == "_"):
        raise MalformedReply("a name was expected")
    return word


def _literal(source: ReplyCursor) -> Step[str]:
    """A Python or JSON literal up to the comma or bracket that ends it, as JSON."""
    yield from source.skip()
    start, depth, quote = source.position, 0, ""
    while sign := (yield from source.peek()):
        if quote:
            if sign == "\\":
                source.position += 1
                if not (yield from source.peek()):
                    raise TruncatedReply
            elif sign == quote:
                quote = ""
        elif sign in "'\"":
            quote = sign
        elif sign in "[{(":
            depth += 1
        elif depth == 0 and sign in ",)":
            return _as_json(source.text[start : source.position].strip())
        elif sign in "]})":
            depth -= 1
        source.position += 1
    raise TruncatedReply


def _as_json(text: str) -> str:
    if is_value(parse_json(text)):
        return text
    try:
        return json.dumps(ast.literal_eval(text), ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise MalformedReply(f"no literal: {text:.80}") from error
