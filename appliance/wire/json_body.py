"""A request's body as JSON: parsed, with every refusal naming what is wrong and where."""

import json
import re
from typing import Any

import orjson

from appliance.errors import RequestError

MAX_DEPTH = 100
"""Nested containers. No request needs as many, and code that walks bodies recursively stays far from its limit."""

PARSED_IN_THREAD_BYTES = 16_384
"""Bodies from this size on are parsed and checked in a thread: a schema takes some 6 ms a KiB, and streams go on."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_body(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`. Raises RequestError."""
    if not raw.strip():
        raise RequestError("the body is empty: send a JSON object")
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        _name_surrogate(raw)
        raise RequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
        raise RequestError(f"the body is {kind}: it must be a JSON object")
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH:
        _check_depth(value)
    # Valid JSON can hold NUL only in this spelling, so bodies without it need not be searched.
    if b"\\u0000" in raw:
        path = _find(value, re.compile("\0"))
        if path is not None:
            raise RequestError(f"{path} contains a NUL character (\\u0000): remove it", param=path)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if type(item) is dict else item)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return
    raise RequestError(f"the body is nested more than {MAX_DEPTH} levels deep: flatten it")


def _name_surrogate(raw: bytes) -> None:
    """orjson refuses half a character without saying in which field; Python's parser takes it, so it can be found."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return
    path = _find(value, _SURROGATE)
    if path is not None:
        raise RequestError(
            f"{path} contains a lone surrogate (half of a character, \\ud800 to \\udfff): remove or pair it", param=path
        )


def _find(root: Any, wrong: re.Pattern[str]) -> str | None:
    """The path of the first string that matches, keys included."""
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, str):
            if wrong.search(value):
                return path
        elif isinstance(value, dict):
            if any(wrong.search(key) for key in value):
                return f"a key in {path}" if path else "a key"
            stack += [(f"{path}.{key}" if path else key, inner) for key, inner in reversed(value.items())]
        elif isinstance(value, list):
            stack += [(f"{path}[{index}]", inner) for index, inner in reversed(list(enumerate(value)))]
    return None
