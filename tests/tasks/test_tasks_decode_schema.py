"""What models decode under: bounded everywhere, and never wider than what the caller sent."""

from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest

from appliance.tasks.extract.decode_schema import (
    MAX_ITEMS,
    MAX_PROPERTIES,
    MAX_STRING_CHARS,
    NUMBER_BOUND,
    NUMBER_STEP,
    bound_schema,
)

NUMBER = {"minimum": -NUMBER_BOUND, "maximum": NUMBER_BOUND, "multipleOf": NUMBER_STEP}
ANY = {"type": ["string", "number", "boolean", "null"], "maxLength": MAX_STRING_CHARS, **NUMBER}


@pytest.mark.parametrize(
    ("schema", "added"),
    [
        ({"type": "string"}, {"maxLength": MAX_STRING_CHARS}),
        ({"type": "string", "maxLength": 5}, {}),
        ({"type": "string", "minLength": 900}, {"maxLength": 900}),
        ({"type": "string", "pattern": "^a+$"}, {"maxLength": MAX_STRING_CHARS}),
        ({"type": "string", "enum": ["a"]}, {}),
        ({"type": "number"}, NUMBER),
        ({"type": "number", "minimum": 0, "multipleOf": 0.01}, {"maximum": NUMBER_BOUND}),
        ({"type": "number", "exclusiveMinimum": 1e20}, {"multipleOf": NUMBER_STEP}),
        ({"type": "number", "minimum": 1e-12, "maximum": 2e-12}, {}),
        ({"type": "integer"}, {"minimum": -NUMBER_BOUND, "maximum": NUMBER_BOUND}),
        ({"type": ["number", "null"]}, NUMBER),
        ({"type": "array", "items": {"type": "boolean"}}, {"maxItems": MAX_ITEMS}),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 99}, {"maxItems": 99}),
        ({"type": "object", "properties": {"a": {"type": "null"}}}, {"additionalProperties": False}),
        ({"type": "object"}, {"additionalProperties": ANY, "maxProperties": MAX_PROPERTIES}),
        (
            {"type": "object", "properties": {"a": {"const": 1}}, "required": ["b"]},
            {"additionalProperties": ANY, "maxProperties": MAX_PROPERTIES + 1},
        ),
        ({"type": "object", "properties": {"a": {"const": 1}}, "anyOf": [{"required": ["b"]}]}, {}),
        ({"description": "whatever"}, ANY),
        ({"allOf": [{"properties": {}}]}, {}),
        ({"$ref": "#/$defs/a"}, {}),
    ],
)
def test_what_is_open_gets_an_end_and_nothing_else_changes(schema: Mapping[str, Any], added: Mapping[str, Any]) -> None:
    before = repr(schema)
    assert bound_schema(schema) == {**schema, **added}
    assert repr(schema) == before


def test_parts_are_bounded_too() -> None:
    inner, bounded = {"type": "string"}, {"type": "string", "maxLength": MAX_STRING_CHARS}
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "array", "items": inner, "maxItems": 2},
            "b": {"anyOf": [inner, {"type": "null"}]},
            "c": True,
        },
        "$defs": {"d": inner},
        "additionalProperties": inner,
        "maxProperties": 4,
    }
    assert bound_schema(schema) == {
        "type": "object",
        "properties": {
            "a": {"type": "array", "items": bounded, "maxItems": 2},
            "b": {"anyOf": [bounded, {"type": "null"}]},
            "c": ANY,
        },
        "$defs": {"d": bounded},
        "additionalProperties": bounded,
        "maxProperties": 4,
    }


def test_bounded_schemas_are_schemas() -> None:
    for schema in ({"type": "object"}, {"type": "number"}, {}):
        jsonschema.Draft202012Validator.check_schema(bound_schema(schema))
