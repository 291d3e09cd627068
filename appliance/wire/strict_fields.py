"""Reading the fields of a body. Each refusal names the field, the value and what would be right.

The functions read single fields of a body that travels on as it came, and leave the others alone. A body that is
translated cannot carry what its translator does not know, so nothing in it may be overlooked: `StrictFields` remembers
what was looked at, and `finish` refuses the rest.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.errors import RequestError, Unsupported

MAX_MODEL_NAME_CHARS: Final = 256
_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


def show(value: object) -> str:
    """`value` for an error message: short, and never a whole prompt."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def wrong(path: str, value: object, remedy: str) -> RequestError:
    """The error for a field at `path` (dotted, with [indices]) that holds `value`; `remedy` says what it must be."""
    return RequestError(f"{path} is {show(value)}: {remedy}", param=path)


def missing(path: str, remedy: str) -> RequestError:
    return RequestError(f"{path} is missing: {remedy}", param=path)


def read_model(body: JsonObject) -> str:
    """The `model` asked for; "auto" (the policy chooses) when the body names none."""
    model = body.get("model")
    if model is None:
        return "auto"
    if not isinstance(model, str) or not model or len(model) > MAX_MODEL_NAME_CHARS:
        raise wrong("model", model, 'it must be the name of a model (GET /v1/models lists them) or "auto"')
    return model


def read_bool(body: JsonObject, name: str) -> bool:
    return check_bool(body.get(name), name) or False


def read_int(body: JsonObject, name: str, low: int, high: int | None = None) -> int | None:
    return check_int(body.get(name), name, low, high)


def read_number(body: JsonObject, name: str, low: float, high: float) -> float | None:
    value = check_number(body.get(name), name, low, high)
    return None if value is None else float(value)


def read_text(body: JsonObject, name: str) -> str | None:
    return check_text(body.get(name), name)


def read_object(value: object, path: str, what: str) -> JsonObject:
    if not isinstance(value, dict):
        raise wrong(path, value, f"it must be an object ({what})")
    return value


def read_list(value: object, path: str, low: int, high: int, what: str) -> Sequence[Any]:
    """A list with between `low` and `high` items; the refusal gives the number that came."""
    if not isinstance(value, list):
        raise wrong(path, value, f"it must be a list of {low} to {high} {what}")
    if not low <= len(value) <= high:
        raise RequestError(f"{path} has {len(value)} {what}: it must have {low} to {high}", param=path)
    return value


def check_text(value: object, path: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise wrong(path, value, "it must be a string")
    return value


def check_bool(value: object, path: str) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise wrong(path, value, "it must be true or false")
    return value


def check_int(value: object, path: str, low: int, high: int | None = None) -> int | None:
    if value is None:
        return None
    if type(value) is not int or value < low or (high is not None and value > high):
        upto = f" of at least {low}" if high is None else f" from {low} to {high}"
        raise wrong(path, value, f"it must be a whole number{upto}")
    return value


def check_number(value: object, path: str, low: float, high: float) -> float | None:
    """A whole number stays one."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise wrong(path, value, f"it must be a number from {low:g} to {high:g}")
    return value


def check_tool_name(value: object, path: str) -> str:
    if not isinstance(value, str) or not _TOOL_NAME.fullmatch(value):
        raise wrong(path, value, "it must be a name of 1 to 128 letters, digits, _ or -")
    return value


def refuse_other_contract(body: JsonObject, here: str, field: str, others: Mapping[str, str]) -> None:
    """Refuse a body that was meant for another endpoint, and say for which.

    `field` is what bodies for `here` carry; `others` maps the fields of other endpoints' bodies to those endpoints.
    """
    if field in body:
        return
    for other, endpoint in others.items():
        if other in body:
            raise RequestError(
                f"this body has {other!r}, which belongs to {endpoint}; {here} takes {field!r}: "
                f"send it to {endpoint} or rename the field",
                param=other,
            )
    raise missing(field, f"{here} needs it")


class StrictFields:
    """One object of a body, at `path` (empty: the body itself). With `snake`, `someName` may be written `some_name`."""

    __slots__ = ("_given", "_seen", "_snake", "path")

    def __init__(self, given: object, path: str = "", *, snake: bool = False) -> None:
        if not isinstance(given, dict):
            raise wrong(path or "the body", given, "it must be an object")
        self._given: JsonObject = camel_fields(given, path) if snake else given
        self._snake = snake
        self._seen: set[str] = set()
        self.path = path

    def at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def get(self, name: str) -> Any:
        self._seen.add(name)
        return self._given.get(name)

    def wrong(self, name: str, remedy: str) -> RequestError:
        return wrong(self.at(name), self._given.get(name), remedy)

    def text(self, name: str) -> str | None:
        return check_text(self.get(name), self.at(name))

    def required_text(self, name: str) -> str:
        value = self.text(name)
        if value is None:
            raise missing(self.at(name), "it must be a string")
        return value

    def one_of(self, name: str, allowed: Collection[str]) -> str | None:
        value = self.get(name)
        if value is not None and (not isinstance(value, str) or value not in allowed):
            raise self.wrong(name, f"it must be one of {', '.join(allowed)}")
        return value

    def flag(self, name: str) -> bool | None:
        return check_bool(self.get(name), self.at(name))

    def whole(self, name: str, low: int, high: int | None = None) -> int | None:
        value = self.get(name)
        if type(value) is float and value.is_integer():
            value = int(value)  # JSON has one kind of number
        return check_int(value, self.at(name), low, high)

    def number(self, name: str, low: float, high: float) -> float | None:
        return check_number(self.get(name), self.at(name), low, high)

    def object(self, name: str) -> "StrictFields | None":
        value = self.get(name)
        return None if value is None else StrictFields(value, self.at(name), snake=self._snake)

    def mapping(self, name: str) -> JsonObject | None:
        """An object whose fields are the caller's own (a schema, arguments)."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "it must be an object")
        return value

    def rows(self, name: str, low: int, high: int, what: str) -> Sequence[Any] | None:
        value = self.get(name)
        return None if value is None else read_list(value, self.at(name), low, high, what)

    def texts(self, name: str, high: int) -> list[str]:
        """A list of strings that are not empty; [] where the field is left out."""
        rows = list(self.rows(name, 0, high, "strings") or ())
        for index, row in enumerate(rows):
            if not isinstance(row, str) or not row:
                raise wrong(f"{self.at(name)}[{index}]", row, "it must be a string that is not empty")
        return rows

    def refuse(self, name: str, why: str, *, allowed: Collection[Any] = ()) -> None:
        """Raise Unsupported where the field asks for something; null and the `allowed` values ask for nothing."""
        value = self.get(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in allowed):
            raise Unsupported(f"{self.at(name)} is not supported here: {why}", param=self.at(name))

    def accept(self, *names: str) -> None:
        """Fields that change nothing in the answer."""
        self._seen.update(names)

    def finish(self) -> None:
        """Raise for the first field that was not read. A null asks for nothing."""
        for name, value in self._given.items():
            if name not in self._seen and value is not None:
                self._refuse_unread(name, value)

    def _refuse_unread(self, name: str, value: Any) -> None:
        place = self.at(name)[:200]
        raise RequestError(f"{place} is not a field that is known here: leave it out", param=place)


def camel_fields(given: JsonObject, path: str) -> MutableJsonObject:
    """Both spellings are allowed, as in every API of that family, but not of one field at once."""
    made: MutableJsonObject = {}
    for name, value in given.items():
        camel = camel_name(name)
        if camel in made:
            place = f"{path}.{camel}" if path else camel
            raise RequestError(f"{place} is given twice, in two spellings: leave one out", param=place)
        made[camel] = value
    return made


def camel_name(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(word[:1].upper() + word[1:] for word in rest) if rest and head else name
