"""A JSON schema as Anthropic's structured output takes it: nothing wider, and what it does not know put into words.

Anthropic constrains by a part of JSON schema only, and wants every object closed. A closed object is valid under an
open one's schema; the keywords that are put into words are checked on the answer.
"""

from collections.abc import Mapping
from typing import Any, Final

from appliance.core.json_types import MutableJsonObject
from appliance.wire.chat_ir import json_text

_KNOWN: Final = frozenset(
    {
        "$defs",
        "$ref",
        "additionalProperties",
        "allOf",
        "anyOf",
        "const",
        "default",
        "definitions",
        "description",
        "enum",
        "items",
        "properties",
        "required",
        "title",
        "type",
    }
)
_FORMATS: Final = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid"}
)
_SILENT: Final = frozenset({"$schema", "$id", "$comment", "examples"})
"""They constrain nothing."""


def narrow_schema(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    written: MutableJsonObject = {}
    in_words = []
    for name, value in schema.items():
        if name in ("properties", "$defs", "definitions") and isinstance(value, Mapping):
            written[name] = {key: narrow_schema(part) for key, part in value.items()}
        elif name in ("anyOf", "allOf", "oneOf") and isinstance(value, list):
            written["anyOf" if name == "oneOf" else name] = [narrow_schema(part) for part in value]
        elif name == "items":
            written[name] = narrow_schema(value)
        elif name in _KNOWN or _is_known_value(name, value):
            written[name] = value
        elif name not in _SILENT:
            in_words.append(f"{name}: {json_text(value)}")
    if in_words:
        said = written.get("description")
        written["description"] = " ".join(part for part in (said, "{" + ", ".join(in_words) + "}") if part)
    if _is_object(written):
        written["additionalProperties"] = False
    return written


def _is_known_value(name: str, value: Any) -> bool:
    return (name == "format" and str(value) in _FORMATS) or (name == "minItems" and value in (0, 1))


def _is_object(schema: MutableJsonObject) -> bool:
    kind = schema.get("type")
    return (
        kind == "object" or (isinstance(kind, list) and "object" in kind) or ("properties" in schema and kind is None)
    )
