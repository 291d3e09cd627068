"""The schema a model decodes under: the caller's own, with an end put to everything that it leaves open.

Small models do not find the end of what a schema leaves without one: digits after the point, keys nobody named, the
same line again and again. Only limits are added here, so what is written under this schema matches the caller's too,
and it is the caller's that answers are checked against.
"""

from typing import Any

from appliance.core.json_types import JsonSchema, MutableJsonObject

MAX_STRING_CHARS = 200
"""For strings without maxLength: addresses, titles, a sentence or two."""
MAX_ITEMS = 32
"""For lists without maxItems."""
MAX_PROPERTIES = 16
"""For objects whose keys the schema does not name."""
NUMBER_BOUND = 10**15
"""Whole numbers of this size are still exact as JSON's usual 64-bit floats."""
NUMBER_STEP = 1e-9
"""Numbers get at most nine decimals."""

# Parts of allOf, not and if mean something only together with others, so they stay as they are.
_LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "prefixItems")
_MAPS_OF_SCHEMAS = ("properties", "$defs", "definitions")
_COMBINING = frozenset({"$ref", "anyOf", "oneOf", "allOf", "not", "if", "dependentSchemas"})
_REMARKS = frozenset({"title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly"})
_SCALARS = ("string", "number", "boolean", "null")


def bound_schema(schema: JsonSchema) -> MutableJsonObject:
    """`schema` (one that passed `check_schema`) with every string, number, list and object bounded."""
    bounded = {key: _parts(key, value) for key, value in schema.items()}
    if schema.keys() <= _REMARKS:
        return bounded | bound_schema({"type": list(_SCALARS)})
    kinds = _kinds(schema)
    if "string" in kinds:
        bounded.setdefault("maxLength", max(MAX_STRING_CHARS, _whole(schema.get("minLength"))))
    if kinds & {"number", "integer"}:
        _bound_number(bounded, kinds)
    if "array" in kinds:
        bounded.setdefault("maxItems", max(MAX_ITEMS, _whole(schema.get("minItems"))))
    if "object" in kinds and not schema.keys() & _COMBINING:
        _bound_object(bounded)
    return bounded


def _parts(key: str, value: Any) -> Any:
    """A keyword's value, with the schemas in it bounded."""
    if key in _LISTS_OF_SCHEMAS and isinstance(value, list):
        return [_inner(item) for item in value]
    if key in _MAPS_OF_SCHEMAS and isinstance(value, dict):
        return {name: _inner(item) for name, item in value.items()}
    return _inner(value) if key == "items" else value


def _inner(item: Any) -> Any:
    """True allows anything, and is bounded as {} is."""
    return bound_schema({} if item is True else item) if item is not False else item


def _kinds(schema: JsonSchema) -> frozenset[str]:
    """The types a schema speaks of; none where other keywords settle the value, or where it allows anything."""
    if "enum" in schema or "const" in schema:
        return frozenset()
    given = schema.get("type")
    if isinstance(given, str):
        return frozenset({given})
    if isinstance(given, list):
        return frozenset(given)
    return frozenset()


def _bound_number(bounded: MutableJsonObject, kinds: frozenset[str]) -> None:
    lows = [bounded[key] for key in ("minimum", "exclusiveMinimum") if _is_number(bounded.get(key))]
    highs = [bounded[key] for key in ("maximum", "exclusiveMaximum") if _is_number(bounded.get(key))]
    if not lows and all(high > -NUMBER_BOUND for high in highs):
        bounded["minimum"] = -NUMBER_BOUND
    if not highs and all(low < NUMBER_BOUND for low in lows):
        bounded["maximum"] = NUMBER_BOUND
    if "number" in kinds and "multipleOf" not in bounded and all(_has_short_decimals(edge) for edge in (*lows, *highs)):
        bounded["multipleOf"] = NUMBER_STEP


def _has_short_decimals(edge: float) -> bool:
    """Whether the step can be put beside this limit: one between two steps might leave no number at all."""
    return float(edge) == round(float(edge), 9)


def _bound_object(bounded: MutableJsonObject) -> None:
    names = bounded.get("properties") or {}
    others = bounded.get("additionalProperties", True)
    if others is True and names and set(bounded.get("required", ())) <= names.keys():
        others = False
    bounded["additionalProperties"] = others = _inner(others)
    if others is not False and "maxProperties" not in bounded:
        bounded["maxProperties"] = len(names) + max(MAX_PROPERTIES, _whole(bounded.get("minProperties")))


def _whole(value: object) -> int:
    return value if type(value) is int else 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
