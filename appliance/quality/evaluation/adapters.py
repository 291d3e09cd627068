"""Adapters: data that says how a row of a dataset is asked about, and what its right answer is."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Final, Literal, get_args

from appliance.core.json_types import JsonObject
from appliance.errors import ConfigError

RowKind = Literal["decision", "extraction"]
GoldForm = Literal["label", "object", "entities", "answers"]
ANSWER: Final = "answer"
"""The field of rows whose right answers are a list."""
_PLACE: Final = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Adapter:
    name: str
    kind: RowKind
    fields: tuple[str, ...]
    """Which a row must have."""
    text: str
    gold: str
    form: GoldForm
    prompt: str = ""
    keys: tuple[str, ...] = ()
    """All that right answers may use; empty: anything."""
    schema: JsonObject | None = None

    @property
    def own_prompts(self) -> bool:
        """Whether every row is asked something else."""
        return bool(_PLACE.search(self.prompt))

    def suits(self, row: JsonObject) -> bool:
        if any(name not in row for name in self.fields):
            return False
        given = row.get(self.gold)
        if self.form == "label":
            return isinstance(given, str)
        if self.form == "object":
            return isinstance(given, dict) and (not self.keys or given.keys() <= set(self.keys))
        if not isinstance(given, list):
            return False
        if self.form == "answers":
            return bool(given) and all(isinstance(one, str) for one in given)
        return all(isinstance(one, dict) and {"type", "text"} <= one.keys() for one in given) and (
            not self.keys or {one["type"] for one in given} <= set(self.keys)
        )

    def asked(self, row: JsonObject) -> str:
        return _PLACE.sub(lambda match: str(row.get(match[1], "")), self.prompt)

    def right(self, row: JsonObject) -> Mapping[str, Sequence[str]]:
        """Field -> right values. Of `answers` any is right, of `entities` all are; a decision's field is its label."""
        given = row[self.gold]
        if self.form == "label":
            return {self.gold: (given,)}
        if self.form == "answers":
            return {ANSWER: tuple(given)}
        if self.form == "entities":
            found: dict[str, list[str]] = {}
            for one in given:
                found.setdefault(one["type"], []).append(str(one["text"]))
            return {kind: tuple(dict.fromkeys(texts)) for kind, texts in found.items()}
        return {name: (str(value),) for name, value in given.items() if value not in (None, "")}

    def example(self, row: JsonObject) -> JsonObject:
        """The row as an example to show to a model."""
        if self.kind == "decision":
            return {"input": row[self.text], "label": row[self.gold]}
        right = self.right(row)
        properties = (self.schema or {}).get("properties", {})
        found = {
            name: list(right.get(name, ())) if rule.get("type") == "array" else next(iter(right.get(name, ())), None)
            for name, rule in properties.items()
        }
        return {"text": row[self.text], "object": {name: value for name, value in found.items() if value is not None
                                                   or "null" in properties[name].get("type", ())}}  # fmt: skip


def load_adapters(path: Path | None = None) -> Sequence[Adapter]:
    """Those of a file, or the ones that come along. Raises ConfigError."""
    place = str(path or "adapters.toml")
    try:
        text = (files(__package__) / "adapters.toml").read_text() if path is None else path.read_text()
        rows = tomllib.loads(text)["adapters"]
        return [_adapter(row) for row in rows]
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=place) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"holds no adapters ({error!r})", file=place) from error


def _adapter(row: JsonObject) -> Adapter:
    known = {field.name for field in fields(Adapter)}
    if unknown := row.keys() - known:
        raise ValueError(f"{sorted(unknown)[0]} is not known: an adapter has {', '.join(sorted(known))}")
    listed = {name: tuple(row[name]) for name in ("fields", "keys") if name in row}
    adapter = Adapter(**{**row, **listed})
    if adapter.kind not in get_args(RowKind) or adapter.form not in get_args(GoldForm):
        raise ValueError(f"{adapter.name}: kind is decision or extraction, form one of {', '.join(get_args(GoldForm))}")
    if (adapter.kind == "extraction") != (adapter.schema is not None):
        raise ValueError(f"{adapter.name}: an extraction has a schema, a decision has none")
    return adapter
