"""What a value came to in its one form, and what callers may say to settle what texts leave open."""

from dataclasses import dataclass
from typing import Any, Final, Literal

from appliance.core.json_types import JsonObject, MutableJsonObject

Kind = Literal["date", "datetime", "amount", "number", "term"]
KINDS: Final[tuple[Kind, ...]] = ("date", "datetime", "amount", "number", "term")
DateOrder = Literal["DMY", "MDY", "YMD"]
DATE_ORDERS: Final[tuple[DateOrder, ...]] = ("DMY", "MDY", "YMD")


@dataclass(frozen=True, slots=True)
class LocaleRules:
    """How a text's author writes, as far as somebody says so. None: it is left to the text, or is left open."""

    date_order: DateOrder | None = None
    decimal: str | None = None
    """The sign before decimals: a point or a comma."""
    currency: str | None = None
    """ISO 4217; of amounts that name none."""


ANY: Final = LocaleRules()


@dataclass(frozen=True, slots=True)
class NormalisedValue:
    kind: Kind
    raw: str
    """As written."""
    value: Any = None
    """ISO 8601 text, a decimal number as text, or a term; None where it cannot be told."""
    currency: str | None = None
    """ISO 4217; of amounts."""
    reason: str | None = None
    """Why there is no value, or what was assumed for it."""

    def told(self) -> JsonObject:
        row: MutableJsonObject = {"kind": self.kind, "raw": self.raw, "value": self.value}
        if self.kind == "amount":
            row["currency"] = self.currency
        if self.reason is not None:
            row["reason"] = self.reason
        return row
