"""What is told of an extracted object besides its values: where they stand in the text, and their one form.

`evidence`: JSON pointer of each value -> {start, end}, characters of the text, or null. `not_in_text`: pointers of
values that stand nowhere in it; their confidence is 0, so that routes which escalate unsure answers do so.
`normalised`: pointer -> {kind, raw, value, currency, reason}; the object itself then holds the value, and null where
there is none.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from appliance.core.json_types import JsonObject, JsonSchema, MutableJsonObject
from appliance.tasks.extract.evidence import Evidence, Piece, find_evidence, iter_leaves
from appliance.tasks.extract.normalise.amounts import find_currency_near
from appliance.tasks.extract.normalise.field_hints import FieldHint, FieldSpec, find_hint, read_field_specs, strip_hints
from appliance.tasks.extract.normalise.normalised_value import NormalisedValue
from appliance.wire.strict_fields import read_bool


@dataclass(frozen=True, slots=True)
class Annotations:
    """What a request wants told. `schema` is the caller's; `asked` the one that the model is given."""

    schema: JsonSchema
    asked: JsonSchema
    wanted: FieldSpec
    evidence: bool

    @property
    def normalises(self) -> bool:
        return self.asked != self.schema


def read_annotations(body: JsonObject, schema: JsonSchema) -> Annotations:
    """Raises RequestError for `normalise`, `evidence` or a hint that cannot be understood."""
    wanted = read_field_specs(body.get("normalise"))
    return Annotations(schema, strip_hints(schema, wanted), wanted, read_bool(body, "evidence"))


def lower_confidence(
    confidence: Mapping[str, float] | None, found: JsonObject, asked: JsonSchema, piece: Piece
) -> Mapping[str, float] | None:
    """Confidences with 0 for what is not in the text, whatever the model thought of it."""
    missing = find_evidence(found, asked, lambda pointer: piece).missing
    return {**(confidence or {}), **dict.fromkeys(missing, 0.0)} if missing else confidence


def annotate_object(
    found: JsonObject, annotations: Annotations, piece_of: Callable[[str], Piece]
) -> tuple[JsonObject, JsonObject]:
    """The object with its values in their one form, and the fields of the response that say more of it."""
    if not (annotations.evidence or annotations.normalises):
        return found, {}
    seen = find_evidence(found, annotations.asked, piece_of)
    more: MutableJsonObject = {}
    if annotations.evidence:
        more["evidence"] = {
            pointer: None if place is None else {"start": place[0], "end": place[1]}
            for pointer, place in seen.places.items()
        }
        more["not_in_text"] = list(seen.missing)
    if annotations.normalises:
        found, more["normalised"] = _normalised(found, annotations, seen, piece_of)
    return found, more


def _normalised(
    found: JsonObject, annotations: Annotations, seen: Evidence, piece_of: Callable[[str], Piece]
) -> tuple[JsonObject, JsonObject]:
    changed = copy.deepcopy(dict(found))
    rows: MutableJsonObject = {}
    for pointer, value, rules in list(iter_leaves(found, annotations.schema, annotations.schema, "")):
        hint = find_hint(rules, annotations.wanted)
        if hint is None or not isinstance(value, str):
            continue
        form = hint.read(value)
        place = seen.places.get(pointer)
        row = dict(form.told())
        if form.kind == "amount" and form.currency is None and place is not None:
            offset, text = piece_of(pointer)
            row["currency"] = find_currency_near(text, place[0] - offset, place[1] - offset)
        rows[pointer] = row
        _put(changed, pointer, _value(form, hint))
    return changed, rows


def _value(form: NormalisedValue, hint: FieldHint) -> Any:
    if form.value is None or not hint.as_number:
        return form.value
    number = Decimal(form.value)
    return int(number) if number == number.to_integral_value() else float(number)


def _put(root: Any, pointer: str, value: Any) -> None:
    *way, last = (key.replace("~1", "/").replace("~0", "~") for key in pointer.split("/")[1:])
    for key in way:
        root = root[int(key)] if isinstance(root, list) else root[key]
    root[int(last) if isinstance(root, list) else last] = value
