"""Calls whose arguments stand in tags: `<function=NAME><parameter=KEY>VALUE</parameter></function>` and the like."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from appliance.core.json_types import JsonSchema
from appliance.llamacpp.tools.cursor import (
    MalformedReply,
    ReplyCursor,
    Step,
    TruncatedReply,
    is_value,
    parse_json,
    write_json,
)
from appliance.llamacpp.tools.formats import MAX_NAME_CHARS, ToolSchemas, ToolSyntax


def read_tagged_call(cursor: ReplyCursor, syntax: ToolSyntax, opened_by: str, schemas: ToolSchemas) -> Step[None]:
    ends: tuple[str, ...] = ("</arg_value>",)
    if "<function=" in syntax.call_open:
        if opened_by != "<function=":
            yield from cursor.skip()
            yield from cursor.take("<function=")
        name, _ = yield from cursor.collect_until((">",))
        key_opens, key_shuts, value_opens, closes = "<parameter=", ">", "", "</function>"
        ends = ("\n</parameter>", "</parameter>")
    else:
        name, mark = yield from cursor.collect_until(("\n", "<arg_key>", "</tool_call>"))
        cursor.position -= len(mark) if mark != "\n" else 0
        key_opens, key_shuts, value_opens, closes = "<arg_key>", "</arg_key>", "<arg_value>", "</tool_call>"
    name = name.strip()
    if len(name) > MAX_NAME_CHARS:
        raise MalformedReply("too long a name")
    cursor.open_call(name)
    properties = schemas.get(name, {}).get("properties")
    first = True
    while True:
        yield from cursor.skip()
        if (yield from cursor.starts(closes)):
            break
        yield from cursor.take(key_opens)
        key, _ = yield from cursor.collect_until((key_shuts,))
        if value_opens:
            yield from cursor.skip()
            yield from cursor.take(value_opens)
        else:
            yield from cursor.starts("\n")
        cursor.arguments(("{" if first else ", ") + write_json(key.strip()) + ": ")
        schema = properties.get(key.strip(), {}) if isinstance(properties, Mapping) else {}
        yield from _tagged_value(cursor, schema, ends)
        first = False
    cursor.arguments("{}" if first else "}")
    cursor.close_call()
    if closes == "</function>":
        yield from cursor.skip_optional("</tool_call>")


def _tagged_value(cursor: ReplyCursor, schema: Any, ends: tuple[str, ...]) -> Step[None]:
    if _types(schema) == {"string"}:
        cursor.arguments('"')
        marker = yield from cursor.until(
            ends, lambda start, stop: cursor.arguments(write_json(cursor.text[start:stop])[1:-1]), inside=True
        )
        if not marker:
            raise TruncatedReply
        cursor.arguments('"')
        return
    text, _ = yield from cursor.collect_until(ends)
    value = parse_json(text.strip())
    plain = not is_value(value) or ("string" in _types(schema) and not _fits(value, schema))
    cursor.arguments(write_json(text) if plain else text.strip())


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


def _listed(schema: JsonSchema, key: str) -> list[Any]:
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
