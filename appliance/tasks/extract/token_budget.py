"""How many tokens an object of a schema takes: what admission reckons with, and where an answer is cut off."""

from typing import Any

from appliance.core.json_types import JsonSchema
from appliance.wire.usage import estimate_tokens

STRING_TOKENS = 64
"""For strings without maxLength: names, addresses, a sentence."""
NUMBER_TOKENS = 12
LONGEST_NUMBER_TOKENS = 28
"""Sign, sixteen digits, point and nine decimals: see `decoding`."""
LIST_ITEMS = 8
"""For lists without maxItems."""
MIN_TOKENS = 64
MAX_TOKENS = 1_024
"""Small models do not stay right over longer objects, and a context of 2,048 tokens must hold the text as well."""
CUT_OFF_TOKENS = 4_096


def estimate_output_tokens(schema: JsonSchema) -> int:
    """Enough tokens for most objects of the schema, between MIN_TOKENS and MAX_TOKENS."""
    return max(MIN_TOKENS, min(MAX_TOKENS, _Sizer(schema).tokens(schema)))


def limit_output_tokens(schema: JsonSchema) -> int:
    """Enough for every object of a schema that bounds everything, with each letter a token of its own.

    At most CUT_OFF_TOKENS: beyond that an answer may be cut off, and is then refused.
    """
    return max(
        estimate_output_tokens(schema), min(CUT_OFF_TOKENS, _Sizer(schema, characters_per_token=1).tokens(schema))
    )


class _Sizer:
    def __init__(self, root: JsonSchema, characters_per_token: int = 3) -> None:
        self._root = root
        self._characters_per_token = characters_per_token
        self._known: dict[str, int] = {}
        """By reference: each is sized once, or references that fan out would take for ever."""

    def tokens(self, schema: Any) -> int:
        if not isinstance(schema, dict):
            return STRING_TOKENS
        if isinstance(schema.get("$ref"), str):
            return self._referenced(schema["$ref"])
        for key in ("anyOf", "oneOf", "allOf"):
            if isinstance(schema.get(key), list) and schema[key]:
                return max(self.tokens(option) for option in schema[key])
        if "const" in schema or isinstance(schema.get("enum"), list):
            values = schema.get("enum", [schema.get("const")])
            return max((estimate_tokens(str(value)) for value in values), default=0) + 4
        return self._by_type(schema)

    def _referenced(self, reference: str) -> int:
        if reference not in self._known:
            self._known[reference] = 0  # a cycle's inner turns count nothing
            self._known[reference] = self.tokens(_resolved(reference, self._root))
        return self._known[reference]

    def _by_type(self, schema: JsonSchema) -> int:
        properties = schema.get("properties")
        if isinstance(properties, dict):
            return 4 + sum(estimate_tokens(name) + 6 + self.tokens(inner) for name, inner in properties.items())
        if "items" in schema:
            most = schema.get("maxItems")
            items = min(most, MAX_TOKENS) if type(most) is int else LIST_ITEMS
            return 4 + items * (2 + self.tokens(schema["items"]))
        if schema.get("type") in ("number", "integer", "boolean", "null"):
            return NUMBER_TOKENS if self._characters_per_token > 1 else LONGEST_NUMBER_TOKENS
        longest = schema.get("maxLength")
        if type(longest) is not int:
            return STRING_TOKENS
        return min(max(1, longest // self._characters_per_token), CUT_OFF_TOKENS)


def _resolved(reference: str, root: JsonSchema) -> Any:
    """The part of the schema that a `#/...` reference names; None for other references."""
    place: Any = root
    for key in reference.removeprefix("#").strip("/").split("/"):
        place = place.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(place, dict) else None
    return place
