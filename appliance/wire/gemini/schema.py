"""Gemini's `Schema`, a part of OpenAPI's with types in capitals, as a JSON schema."""

from collections.abc import Mapping
from typing import Any, Final

from appliance.core.json_types import JsonObject, JsonSchema, MutableJsonObject
from appliance.errors import RequestError, Unsupported
from appliance.wire.strict_fields import camel_fields, wrong

_AS_THEY_ARE: Final = frozenset(
    {
        "title",
        "description",
        "enum",
        "required",
        "pattern",
        "minimum",
        "maximum",
        "default",
        "format",
        "$ref",
        "ref",
        "example",
    }
)
_NAMES: Final = {"ref": "$ref", "defs": "$defs", "example": "examples"}
_COUNTS: Final = frozenset({"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"})
_TYPES: Final = frozenset({"string", "number", "integer", "boolean", "array", "object", "null"})
MAX_DEPTH: Final = 32


def convert_schema(given: object, path: str, depth: int = 0) -> JsonSchema:
    """Raises RequestError or Unsupported naming the field that is wrong."""
    if not isinstance(given, dict):
        raise wrong(path, given, "it must be an object")
    if depth > MAX_DEPTH:
        raise RequestError(f"{path} is nested more than {MAX_DEPTH} levels deep: flatten it", param=path)
    made: MutableJsonObject = {}
    given = camel_fields(given, path)
    for name, value in given.items():
        if value is not None:
            _convert(made, name, value, f"{path}.{name}", depth)
    order = given.get("propertyOrdering")
    if isinstance(order, list) and isinstance(made.get("properties"), dict):
        made["properties"] = _ordered(made["properties"], order)
    if given.get("nullable") is True:
        return _nullable(made)
    return made


def _convert(made: MutableJsonObject, name: str, value: Any, path: str, depth: int) -> None:
    if name in _AS_THEY_ARE:
        made[_NAMES.get(name, name)] = [value] if name == "example" else value
    elif name in ("defs", "$defs", "properties"):
        made[_NAMES.get(name, name)] = _each(value, path, depth)
    elif name == "type":
        made.update(_type(value, path))
    elif name in ("items", "additionalProperties") and not isinstance(value, bool):
        made[name] = convert_schema(value, path, depth + 1)
    elif name == "additionalProperties":
        made[name] = value
    elif name == "anyOf":
        made[name] = _several(value, path, depth)
    elif name in _COUNTS:
        made[name] = _count(value, path)
    elif name not in ("nullable", "propertyOrdering"):
        raise Unsupported(f"{path[:200]} is not a field of schemas that is known here: leave it out", param=path[:200])


def _several(value: Any, path: str, depth: int) -> list[Any]:
    if not isinstance(value, list):
        raise wrong(path, value, "it must be a list of schemas")
    return [convert_schema(one, f"{path}[{index}]", depth + 1) for index, one in enumerate(value)]


def _each(value: Any, path: str, depth: int) -> JsonObject:
    if not isinstance(value, dict):
        raise wrong(path, value, "it must be an object of schemas")
    return {name: convert_schema(one, f"{path}.{name}", depth + 1) for name, one in value.items()}


def _type(value: Any, path: str) -> Mapping[str, str]:
    if not isinstance(value, str) or (value.lower() not in _TYPES and value != "TYPE_UNSPECIFIED"):
        raise wrong(path, value, f"it must be one of {', '.join(sorted(_TYPES)).upper()}")
    return {} if value == "TYPE_UNSPECIFIED" else {"type": value.lower()}


def _count(value: Any, path: str) -> int:
    """64-bit numbers are written as strings in this family of APIs."""
    if isinstance(value, str) and value.isdecimal() and len(value) <= 18:
        return int(value)
    if type(value) is not int or value < 0:
        raise wrong(path, value, "it must be a whole number of at least 0")
    return value


def _ordered(properties: JsonObject, order: list[Any]) -> JsonObject:
    """Objects are written in the order of their schema's properties."""
    first = [name for name in order if isinstance(name, str) and name in properties]
    return {name: properties[name] for name in dict.fromkeys([*first, *properties])}


def _nullable(schema: JsonSchema) -> JsonObject:
    kind = schema.get("type")
    if isinstance(kind, str) and "enum" not in schema:
        return {**schema, "type": [kind, "null"]}
    return {"anyOf": [schema, {"type": "null"}]}
