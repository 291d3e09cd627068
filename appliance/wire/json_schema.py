"""JSON schemas that callers send: checked when the request arrives, used to check the answer. Nothing is fetched."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

import jsonschema
import orjson
from jsonschema.protocols import Validator
from jsonschema.validators import extend as create_checker
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from appliance.core.json_types import JsonSchema
from appliance.errors import RejectedReply, RequestError

MAX_SCHEMA_BYTES = 32_768
"""Checking a schema costs some 6 ms of CPU per KiB, once: the result is kept."""
MAX_SCHEMA_DEPTH = 32
"""Nested containers. The validator recurses several Python frames a level, and the interpreter stops at 1,000."""
MAX_EXPANDED_NODES = 20_000
"""References that fan out double the work at each level; twenty such levels would hold the event loop for minutes."""

_Lookup = Callable[[str], object]
"""What a reference leads to."""

_ENDLESS: Final = frozenset({"object", "array"})
"""Types whose values hold others."""

_UNBOUNDED = re.compile(r"[*+]|\{\d*,\}")
_QUANTIFIED_GROUP = re.compile(r"\)(?:[*+]|\{)")
_MAX_UNBOUNDED = 3


def check_schema(schema: object, path: str) -> JsonSchema:
    """The schema itself when it is one. Raises RequestError with the reason and the place in the schema."""
    if not isinstance(schema, dict):
        raise RequestError(f"{path} is not an object: it must be a JSON schema", param=path)
    text = _dump(schema, path)
    if len(text) > MAX_SCHEMA_BYTES:
        raise RequestError(
            f"{path} is {len(text)} bytes of JSON: a schema may have at most {MAX_SCHEMA_BYTES}", param=path
        )
    reason = _reason_against(text)
    if reason is not None:
        raise RequestError(f"{path} is not a valid JSON schema: {reason}", param=path)
    return schema


def check_value(schema: JsonSchema, value: Any) -> None:
    """Raise RejectedReply where `value` does not match a schema that passed `check_schema`."""
    try:
        error = next(iter(_validator(orjson.dumps(schema)).iter_errors(value)), None)
    except RecursionError:
        raise RejectedReply("the JSON is nested too deeply to be checked against the schema") from None
    if error is not None:
        raise RejectedReply(f"the JSON does not match the schema at {error.json_path}: {error.message[:200]}")


def is_strict_subset(schema: object) -> bool:
    """Whether hosted APIs take the schema with `strict`: every object closed, and all its properties required."""
    if isinstance(schema, list):
        return all(is_strict_subset(item) for item in schema)
    if not isinstance(schema, dict):
        return True
    properties = schema.get("properties")
    if isinstance(properties, dict) or schema.get("type") == "object":
        names = set(properties) if isinstance(properties, dict) else set()
        if schema.get("additionalProperties") is not False or set(schema.get("required", ())) != names:
            return False
    return all(is_strict_subset(value) for key, value in schema.items() if key not in ("enum", "const", "default"))


def _dump(schema: JsonSchema, path: str) -> bytes:
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [child for item in level for child in _children(item) if isinstance(child, dict | list)]
        if not level:
            return orjson.dumps(schema)
    raise RequestError(f"{path} is nested more than {MAX_SCHEMA_DEPTH} levels deep: flatten it", param=path)


def _children(item: Any) -> Iterator[Any]:
    return iter(item.values() if isinstance(item, dict) else item)


@lru_cache(maxsize=256)
def _reason_against(text: bytes) -> str | None:
    """Why the schema in `text` cannot be used, or None. Cached: one schema usually serves many requests."""
    schema = orjson.loads(text)
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
        _check_parts(schema)
        list(_validator(text).iter_errors({}))
    except jsonschema.SchemaError as error:
        return f"{error.message[:200]} (at {error.json_path})"
    except re.error as error:
        return f"pattern {str(error.pattern)[:80]!r} is not a regular expression: {error}"
    except (Unresolvable, ValueError) as error:
        return str(error)[:200]
    except RecursionError:
        return "it refers to itself without end"
    return None


def _check_parts(schema: JsonSchema) -> None:
    """Compile every pattern, resolve every reference, and bound the work that references multiply."""
    stack: list[Any] = [schema]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            if isinstance(item.get("pattern"), str):
                re.compile(item["pattern"])
            if isinstance(item.get("patternProperties"), dict):
                raise ValueError("patternProperties is not supported: name the properties")
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    resource = DRAFT202012.create_resource(schema)
    base = resource.id() or ""
    registry: Registry[Any] = Registry().with_resource(base, resource)
    resolver = registry.resolver(base)

    def lookup(reference: str) -> object:
        return resolver.lookup(reference).contents

    nodes = _expanded_nodes(schema, lookup, {})
    if nodes > MAX_EXPANDED_NODES:
        raise ValueError(f"its references expand to {nodes} parts, at most {MAX_EXPANDED_NODES} are checked")
    if not _has_finite_values(schema, lookup):
        raise ValueError("it needs itself inside itself without end, so no value matches: let a property be left out")


def _expanded_nodes(item: object, lookup: Callable[[str], object], known: dict[str, int]) -> int:
    """How many parts a validator may visit for one value: references count with all that they lead to, each time."""
    if isinstance(item, list):
        return sum(_expanded_nodes(child, lookup, known) for child in item)
    if not isinstance(item, dict):
        return 0
    nodes = 1 + sum(_expanded_nodes(child, lookup, known) for child in item.values())
    reference = item.get("$ref")
    if isinstance(reference, str):
        if reference not in known:
            if not reference.startswith("#"):
                raise ValueError(
                    f"$ref {reference!r} leads outside the schema: only references like #/$defs/NAME are followed"
                )
            known[reference] = 1  # stands for a cycle, which costs a level of the value each time around
            known[reference] = _expanded_nodes(lookup(reference), lookup, known)
        nodes += known[reference]
    return nodes


def _has_finite_values(schema: JsonSchema, lookup: _Lookup) -> bool:
    """False only where every value would have to be endless; whether there is a value at all is not asked.

    References of the schema must all be good ones.
    """
    search = _FiniteSearch(lookup)
    while True:
        before = len(search.ends)
        if search.is_finite(schema):
            return True
        if len(search.ends) == before:
            return False
        search.seen.clear()


class _FiniteSearch:
    """A walk over the schema. A reference counts as endless while it is followed, and for good once it has an end."""

    def __init__(self, lookup: _Lookup) -> None:
        self._lookup = lookup
        self.ends: set[str] = set()
        self.seen: set[str] = set()

    def is_finite(self, schema: object) -> bool:
        if not isinstance(schema, Mapping):
            return True
        if isinstance(schema.get("$ref"), str) and not self._leads_to_an_end(schema["$ref"]):
            return False
        if not all(map(self.is_finite, _list(schema, "allOf"))):
            return False
        for word in ("anyOf", "oneOf"):
            choices = _list(schema, word)
            if choices and not any(map(self.is_finite, choices)):
                return False
        return "enum" in schema or "const" in schema or self._has_a_finite_type(schema)

    def _leads_to_an_end(self, reference: str) -> bool:
        if reference in self.ends:
            return True
        if reference in self.seen:
            return False
        self.seen.add(reference)
        if self.is_finite(self._lookup(reference)):
            self.ends.add(reference)
        return reference in self.ends

    def _has_a_finite_type(self, schema: JsonSchema) -> bool:
        given = schema.get("type")
        types = {given} if isinstance(given, str) else set(given or ())
        if not types or types - _ENDLESS:
            return True
        return any(self._object_ends(schema) if kind == "object" else self._array_ends(schema) for kind in types)

    def _object_ends(self, schema: JsonSchema) -> bool:
        properties, rest = schema.get("properties") or {}, schema.get("additionalProperties", True)
        return all(self.is_finite(properties.get(name, rest)) for name in schema.get("required") or ())

    def _array_ends(self, schema: JsonSchema) -> bool:
        least, first = int(schema.get("minItems") or 0), _list(schema, "prefixItems")
        if not all(map(self.is_finite, first[:least])):
            return False
        return least <= len(first) or self.is_finite(schema.get("items", True))


def _list(schema: JsonSchema, name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []


@lru_cache(maxsize=256)
def _validator(text: bytes) -> Validator:
    # An empty registry: jsonschema's own default would open network connections for foreign references.
    validator: Validator = _Checker(orjson.loads(text), registry=Registry())
    return validator


def _check_pattern(
    validator: Validator, pattern: str, value: object, schema: Any
) -> Iterator[jsonschema.ValidationError]:
    """Check a pattern unless Python's backtracking matcher could need exponential time for it.

    Those are left to the engine, which enforces patterns while it writes and in linear time.
    """
    if not isinstance(value, str) or _QUANTIFIED_GROUP.search(pattern):
        return
    if len(_UNBOUNDED.findall(pattern)) <= _MAX_UNBOUNDED and not re.search(pattern, value):
        yield jsonschema.ValidationError(f"{value[:80]!r} does not match {pattern!r}")


_Checker: Any = create_checker(jsonschema.Draft202012Validator, {"pattern": _check_pattern})  # type: ignore[no-untyped-call]
