"""Bodies in other dialects than OpenAI's chat: every field is read, accepted as without effect, or refused by name.

A body that is translated cannot carry what its translator does not know, so nothing in it may be overlooked:
`StrictFields` remembers what was looked at, and `done` refuses the rest.
"""

import base64
import binascii
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from appliance.errors import RequestError, Unsupported
from appliance.wire.body_fields import missing, wrong

_MEDIA_TYPE: Final = re.compile(r"[a-z0-9.+-]{1,40}/[a-z0-9.+-]{1,80}")
TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class StrictFields:
    """One object of a body, at `path` (empty: the body itself). With `snake`, `someName` may be written `some_name`."""

    __slots__ = ("_given", "_seen", "_snake", "path")

    def __init__(self, given: object, path: str = "", *, snake: bool = False) -> None:
        if not isinstance(given, dict):
            raise wrong(path or "the body", given, "it must be an object")
        self._given = camel_fields(given, path) if snake else given
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
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "it must be a string")
        return value

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
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "it must be true or false")
        return value

    def whole(self, name: str, low: int, high: int | None = None) -> int | None:
        value = self.get(name)
        if type(value) is float and value.is_integer():
            value = int(value)  # JSON has one kind of number
        if value is not None and (type(value) is not int or value < low or (high is not None and value > high)):
            upto = f" of at least {low}" if high is None else f" from {low} to {high}"
            raise self.wrong(name, f"it must be a whole number{upto}")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        value: float | None = self.get(name)
        if value is not None and (type(value) not in (int, float) or not low <= value <= high):
            raise self.wrong(name, f"it must be a number from {low:g} to {high:g}")
        return value

    def object(self, name: str) -> "StrictFields | None":
        value = self.get(name)
        return None if value is None else StrictFields(value, self.at(name), snake=self._snake)

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        """An object whose fields are the caller's own (a schema, arguments)."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "it must be an object")
        return value

    def rows(self, name: str, low: int, high: int, what: str) -> Sequence[Any] | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.wrong(name, f"it must be a list of {low} to {high} {what}")
        if not low <= len(value) <= high:
            place = self.at(name)
            raise RequestError(f"{place} has {len(value)} {what}: it must have {low} to {high}", param=place)
        return value

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

    def done(self) -> None:
        """Raise RequestError for the first field that nobody has looked at. A null asks for nothing."""
        for name, value in self._given.items():
            if name not in self._seen and value is not None:
                place = self.at(name)[:200]
                raise RequestError(f"{place} is not a field that is known here: leave it out", param=place)


def camel_fields(given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Both spellings are allowed, as in every API of that family, but not of one field at once."""
    made: dict[str, Any] = {}
    for name, value in given.items():
        camel = _camel(name)
        if camel in made:
            place = f"{path}.{camel}" if path else camel
            raise RequestError(f"{place} is given twice, in two spellings: leave one out", param=place)
        made[camel] = value
    return made


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(word[:1].upper() + word[1:] for word in rest) if rest and head else name


def tool_name(value: object, path: str) -> str:
    if not isinstance(value, str) or not TOOL_NAME.fullmatch(value):
        raise wrong(path, value, "it must be a name of 1 to 128 letters, digits, _ or -")
    return value


def data_url(media_type: object, data: object, path: str, media_path: str) -> str:
    """An image given as base64 (either alphabet) as the `data:` address that chat bodies carry it in."""
    if not isinstance(media_type, str) or not _MEDIA_TYPE.fullmatch(media_type):
        raise wrong(media_path, media_type, "it must be a media type such as image/png")
    if not isinstance(data, str) or not data:
        raise wrong(path, None if data == "" else data, "it must be the image's bytes in base64")
    plain = data.replace("-", "+").replace("_", "/") if "-" in data or "_" in data else data
    plain += "=" * (-len(plain) % 4)
    try:
        base64.b64decode(plain, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{path} is not base64: {error}", param=path) from error
    return f"data:{media_type};base64,{plain}"


def web_address(value: object, path: str) -> str:
    if not isinstance(value, str) or not value.startswith(("https://", "http://")):
        raise wrong(path, value, "it must be an http or https address")
    return value
