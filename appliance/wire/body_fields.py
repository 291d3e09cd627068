"""Reading single fields of a request body. Each refusal names the field, the value and what would be right."""

from collections.abc import Mapping, Sequence
from typing import Any

from appliance.errors import RequestError

MAX_MODEL_NAME_CHARS = 256


def show(value: object) -> str:
    """`value` for an error message: short, and never a whole prompt."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def wrong(path: str, value: object, remedy: str) -> RequestError:
    """The error for a field at `path` (dotted, with [indices]) that holds `value`; `remedy` says what it must be."""
    return RequestError(f"{path} is {show(value)}: {remedy}", param=path)


def missing(path: str, remedy: str) -> RequestError:
    return RequestError(f"{path} is missing: {remedy}", param=path)


def read_model(body: Mapping[str, Any]) -> str:
    """The `model` asked for; "auto" (the policy chooses) when the body names none."""
    model = body.get("model")
    if model is None:
        return "auto"
    if not isinstance(model, str) or not model or len(model) > MAX_MODEL_NAME_CHARS:
        raise wrong("model", model, 'it must be the name of a model (GET /v1/models lists them) or "auto"')
    return model


def read_bool(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise wrong(name, value, "it must be true or false")
    return value


def read_int(body: Mapping[str, Any], name: str, low: int, high: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or value < low or (high is not None and value > high):
        upto = f" of at least {low}" if high is None else f" from {low} to {high}"
        raise wrong(name, value, f"it must be a whole number{upto}")
    return value


def read_number(body: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not low <= value <= high:
        raise wrong(name, value, f"it must be a number from {low:g} to {high:g}")
    return float(value)


def read_text(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise wrong(name, value, "it must be a string")
    return value


def read_object(value: object, path: str, what: str) -> Mapping[str, Any]:
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


def refuse_other_contract(body: Mapping[str, Any], here: str, field: str, others: Mapping[str, str]) -> None:
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
