"""What a schema says of the forms of its values, and the schema that a model is asked under.

`x-normalise` beside a property's type says what it is: `"date"`, `"datetime"`, `"amount"`, `"number"`, or an object
{kind, locale, date_order, decimal, currency}, or for terms {kind: "term", values: {name: [other names]}}; false leaves
it alone. `format: date` and `date-time`, and `enum`, count as hints where the request says `normalise`. A model is
asked for such values as they are written in the text, since it copies better than it computes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from appliance.core.json_types import JsonObject, JsonSchema, MutableJsonObject
from appliance.tasks.extract.normalise.amounts import read_amount
from appliance.tasks.extract.normalise.dates import read_date
from appliance.tasks.extract.normalise.locale import CUSTOMS, read_locale
from appliance.tasks.extract.normalise.normalised_value import ANY, KINDS, Kind, LocaleRules, NormalisedValue
from appliance.tasks.extract.normalise.vocabulary import read_term
from appliance.wire.strict_fields import wrong

HINT: Final = "x-normalise"
_FORMATS: Final[Mapping[str, Kind]] = {"date": "date", "date-time": "datetime"}
_DROPPED: Final = frozenset({HINT, "format", "pattern", "enum", "const", "minimum", "maximum", "exclusiveMinimum",
                             "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "type"})  # fmt: skip
_MAPS: Final = ("properties", "$defs", "definitions")
_LISTS: Final = ("anyOf", "oneOf", "allOf", "prefixItems")


@dataclass(frozen=True, slots=True)
class FieldHint:
    kind: Kind
    customs: LocaleRules
    terms: Mapping[str, Sequence[str]]
    as_number: bool
    """Whether the schema wants a JSON number rather than text."""
    may_be_null: bool

    def read(self, raw: str) -> NormalisedValue:
        if self.kind == "date" or self.kind == "datetime":
            return read_date(raw, self.customs, self.kind)
        if self.kind == "amount" or self.kind == "number":
            return read_amount(raw, self.customs, self.kind)
        return read_term(raw, self.terms)


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """What is to be brought into one form: customs of the whole request, and whether formats count as hints."""

    customs: LocaleRules = ANY
    by_format: bool = False


def read_field_specs(value: object) -> FieldSpec:
    """A request's `normalise`: true, or an object of customs. Raises RequestError."""
    if value is None or value is False:
        return FieldSpec()
    if value is True:
        return FieldSpec(by_format=True)
    if not isinstance(value, dict):
        raise wrong("normalise", value, f"it must be true, false or an object of {', '.join(CUSTOMS)}")
    return FieldSpec(read_locale(value, "normalise", ANY), by_format=True)


def find_hint(schema: JsonSchema, wanted: FieldSpec, path: str = "schema") -> FieldHint | None:
    """What a property's schema asks for. Raises RequestError for a hint that cannot be understood."""
    given = schema.get(HINT)
    if given is False or (given is None and not wanted.by_format):
        return None
    kind, terms = _kind_of(schema, given, path)
    if kind is None:
        return None
    hinted = (
        {key: value for key, value in given.items() if key not in ("kind", "values")} if isinstance(given, dict) else {}
    )
    customs = read_locale(hinted, f"{path}.{HINT}", wanted.customs)
    types = schema.get("type")
    kinds = types if isinstance(types, list) else [types]
    return FieldHint(kind, customs, terms, bool({"number", "integer"} & set(kinds)), "null" in kinds)


def strip_hints(schema: JsonSchema, wanted: FieldSpec, path: str = "schema") -> MutableJsonObject:
    """The schema with every value that is to be brought into one form asked for as text, and without hints."""
    hint = find_hint(schema, wanted, path)
    if hint is not None:
        kept = {key: value for key, value in schema.items() if key not in _DROPPED}
        return {"type": ["string", "null"] if hint.may_be_null else "string", **kept}
    return _each(schema, lambda inner, place: strip_hints(inner, wanted, f"{path}{place}"))


def has_hints(schema: JsonSchema, wanted: FieldSpec, path: str = "schema") -> bool:
    return strip_hints(schema, wanted, path) != schema


def _each(schema: JsonSchema, change: Callable[[JsonObject, str], Any]) -> MutableJsonObject:
    """The schema with each schema right below it changed."""
    changed = {key: value for key, value in schema.items() if key != HINT}
    for key, value in changed.items():
        if key in _MAPS and isinstance(value, dict):
            changed[key] = {
                name: change(inner, f".{key}.{name}") if isinstance(inner, dict) else inner
                for name, inner in value.items()
            }
        elif key in _LISTS and isinstance(value, list):
            changed[key] = [
                change(inner, f".{key}[{place}]") if isinstance(inner, dict) else inner
                for place, inner in enumerate(value)
            ]
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            changed[key] = change(value, f".{key}")
    return changed


def _kind_of(schema: JsonSchema, given: Any, path: str) -> tuple[Kind | None, Mapping[str, Sequence[str]]]:
    name = given.get("kind") if isinstance(given, dict) else given
    if given is None or given is True:
        name = _FORMATS.get(str(schema.get("format")))
        if name is None and given is True:
            raise wrong(f"{path}.{HINT}", given, f"say what it is: {', '.join(KINDS)}")
    elif name not in KINDS:
        raise wrong(f"{path}.{HINT}", given, f"it must be one of {', '.join(KINDS)}, or an object with such a kind")
    terms = _terms(schema, given, path) if name == "term" else {}
    return name, terms


def _terms(schema: JsonSchema, given: Any, path: str) -> Mapping[str, Sequence[str]]:
    place = f"{path}.{HINT}.values"
    values = given.get("values") if isinstance(given, dict) else None
    if values is None:
        values = schema.get("enum")
    if isinstance(values, list) and values and all(isinstance(one, str) for one in values if one is not None):
        return {one: () for one in values if one is not None}
    if isinstance(values, dict) and values:
        for name, others in values.items():
            if not isinstance(others, list) or not all(isinstance(one, str) for one in others):
                raise wrong(f"{place}.{name}", others, "it must be a list of other names")
        return values
    raise wrong(place, values, "give the terms: {name: [other names]}, or a list of names, or an enum")
