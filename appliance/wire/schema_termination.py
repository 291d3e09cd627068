"""Whether any finite value can match a schema: one that needs itself inside itself has none, and no model ends."""

from collections.abc import Callable, Mapping
from typing import Any, Final

Lookup = Callable[[str], object]
"""What a reference leads to."""

_ENDLESS: Final = frozenset({"object", "array"})
"""Types whose values hold others."""


def has_finite_values(schema: Mapping[str, Any], lookup: Lookup) -> bool:
    """False only where every value would have to be endless; whether there is a value at all is not asked.

    References of the schema must all be good ones.
    """
    search = _Search(lookup)
    while True:
        before = len(search.ends)
        if search.is_finite(schema):
            return True
        if len(search.ends) == before:
            return False
        search.seen.clear()


class _Search:
    """A walk over the schema. A reference counts as endless while it is followed, and for good once it has an end."""

    def __init__(self, lookup: Lookup) -> None:
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

    def _has_a_finite_type(self, schema: Mapping[str, Any]) -> bool:
        given = schema.get("type")
        types = {given} if isinstance(given, str) else set(given or ())
        if not types or types - _ENDLESS:
            return True
        return any(self._object_ends(schema) if kind == "object" else self._array_ends(schema) for kind in types)

    def _object_ends(self, schema: Mapping[str, Any]) -> bool:
        properties, rest = schema.get("properties") or {}, schema.get("additionalProperties", True)
        return all(self.is_finite(properties.get(name, rest)) for name in schema.get("required") or ())

    def _array_ends(self, schema: Mapping[str, Any]) -> bool:
        least, first = int(schema.get("minItems") or 0), _list(schema, "prefixItems")
        if not all(map(self.is_finite, first[:least])):
            return False
        return least <= len(first) or self.is_finite(schema.get("items", True))


def _list(schema: Mapping[str, Any], name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []
