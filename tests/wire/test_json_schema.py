"""Schemas from callers: checked on arrival, never fetched from elsewhere, never able to hold the event loop."""

import time
from typing import Any

import pytest

from appliance.errors import RejectedReply, RequestError
from appliance.tasks.extract.token_budget import MAX_TOKENS, MIN_TOKENS, estimate_output_tokens
from appliance.wire.json_schema import check_schema, check_value, is_strict_subset


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def fan_out(levels: int) -> dict[str, Any]:
    rest: dict[str, Any] = {f"l{n}": {"allOf": [{"$ref": f"#/$defs/l{n + 1}"}] * 2} for n in range(levels)}
    return {"type": "object", "properties": {"x": {"$ref": "#/$defs/l0"}}, "$defs": {**rest, f"l{levels}": {}}}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (5, "not an object"),
        (True, "not an object"),
        ({"type": "objct"}, "'objct'"),
        ({"type": "object", "properties": {"a": {"minimum": "low"}}}, "$.properties.a.minimum"),
        ({"type": "object", "properties": {"a": {"pattern": "("}}}, "regex"),
        ({"$ref": "#"}, "without end"),
        ({"$ref": "http://example.com/schema.json"}, "leads outside"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "#/$defs/none".removeprefix("#")),
        ({"patternProperties": {"a": {}}}, "name the properties"),
        (nested(20), "32 levels"),
        (fan_out(30), "expand"),
        ({"description": "x" * 40_000}, "bytes"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_with_its_reason(schema: Any, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_schema(schema, "schema")
    assert caught.value.param == "schema"
    assert words in caught.value.message


def test_a_schema_that_refers_to_itself_can_be_used() -> None:
    tree = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}}, "required": ["kids"]}
    check_schema(tree, "schema")
    check_value(tree, {"kids": [{"kids": []}]})
    with pytest.raises(RejectedReply, match="kids"):
        check_value(tree, {"kids": [{}]})


def test_references_are_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *_: pytest.fail("a schema made us open a connection"))
    with pytest.raises(RequestError):
        check_schema({"properties": {"a": {"$ref": "https://example.com/a"}}}, "schema")


def test_a_pattern_is_checked() -> None:
    schema = {"type": "object", "properties": {"day": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\d$"}}}
    check_value(schema, {"day": "2026-11-20"})
    with pytest.raises(RejectedReply, match="2026"):
        check_value(schema, {"day": "20.11.2026"})


@pytest.mark.parametrize("pattern", [r"^(a+)+$", r"^(a|a)*$", r"^(a{1,9}){2,}$", "a*a*a*a*a*a*a*b"])
def test_a_pattern_that_takes_exponential_time_does_not_hold_the_loop(pattern: str) -> None:
    started = time.perf_counter()
    check_value({"properties": {"x": {"pattern": pattern}}}, {"x": "a" * 60 + "!"})
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    ("schema", "strict"),
    [
        ({"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": False}, True),
        ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, False),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": False}, False),
        ({"type": "object"}, False),
        ({"type": "array", "items": {"type": "object", "properties": {}}}, False),
        ({"type": "string", "enum": [{"type": "object"}]}, True),
    ],
)
def test_strict_is_only_asked_of_hosted_targets_for_schemas_they_take(schema: dict[str, Any], strict: bool) -> None:
    assert is_strict_subset(schema) is strict


def test_an_answers_bound_follows_its_schema() -> None:
    flag = {"type": "object", "properties": {"ok": {"type": "boolean"}}}
    fields = {f"field_{n}": {"type": "string"} for n in range(8)}
    assert estimate_output_tokens(flag) == MIN_TOKENS
    assert MIN_TOKENS < estimate_output_tokens({"type": "object", "properties": fields}) < MAX_TOKENS
    many = {
        "type": "object",
        "properties": {"rows": {"type": "array", "maxItems": 10**12, "items": {"type": "object"}}},
    }
    assert estimate_output_tokens(many) == MAX_TOKENS


def test_sizing_a_schema_with_references_that_fan_out_ends() -> None:
    fan = {f"f{n}": {"$ref": "#"} for n in range(30)}
    assert estimate_output_tokens({"type": "object", "properties": fan}) >= MIN_TOKENS


ME = {"$ref": "#"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": ME}, "required": ["a"]},
        {"type": "array", "items": ME, "minItems": 1},
        {"type": "array", "prefixItems": [{"type": "null"}, ME], "minItems": 2},
        {"type": "object", "required": ["a"], "additionalProperties": ME},
        {"type": "object", "properties": {"a": {"anyOf": [ME, {"allOf": [ME]}]}}, "required": ["a"]},
        {
            "$ref": "#/$defs/a",
            "$defs": {
                "a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/b"}}, "required": ["b"]},
                "b": {"type": ["object", "array"], "minItems": 1, "items": {"$ref": "#/$defs/a"}, "required": ["x"],
                      "properties": {"x": {"$ref": "#/$defs/a"}}},
            },
        },
    ],
)  # fmt: skip
def test_a_schema_that_only_endless_values_match_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="without end"):
        check_schema(schema, "schema")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": ME}},
        {"type": "object", "properties": {"a": {"anyOf": [ME, {"type": "null"}]}}, "required": ["a"]},
        {"type": "array", "items": ME},
        {"properties": {"a": ME}, "required": ["a"]},
        {"type": ["object", "null"], "properties": {"a": ME}, "required": ["a"]},
        {
            "type": "object",
            "properties": {"left": {"$ref": "#/$defs/tree"}},
            "required": ["left"],
            "$defs": {
                "tree": {"oneOf": [{"$ref": "#/$defs/node"}, {"type": "string"}]},
                "node": {"type": "object", "properties": {"l": {"$ref": "#/$defs/tree"}}, "required": ["l"]},
            },
        },
    ],
)
def test_a_schema_that_may_refer_to_itself_and_ends_is_taken(schema: dict[str, Any]) -> None:
    assert check_schema(schema, "schema") == schema
