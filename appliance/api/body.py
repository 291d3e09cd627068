"""Reading a request's body: bounded, then parsed, with every refusal naming what is wrong and where."""

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.types import Receive

from appliance.errors import BodyTooLarge, ClientGone, RequestError

MAX_DEPTH = 100
"""Nested containers. No request needs as many, and code that walks bodies recursively stays far from its limit."""

BODY_SECONDS = 60.0
"""For a whole body to come, so that nobody holds a connection by sending a byte now and then. The largest body that is
read by default needs 1 Mbit/s."""

_SURROGATE = re.compile("[\ud800-\udfff]")


async def read_body(receive: Receive, headers: Mapping[str, str], max_bytes: int) -> bytes:
    """The raw body. Raises BodyTooLarge as soon as it is known to be too large, without reading the rest, and
    RequestError where it has not come after BODY_SECONDS."""
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise RequestError(
            f"content-encoding is {encoding[:40]!r}: send the JSON uncompressed", param="content-encoding", status=415
        )
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise _too_large(f"{int(length)} bytes", max_bytes)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _read_all(receive, max_bytes)
    except TimeoutError as error:
        late = RequestError(f"the body did not come within {BODY_SECONDS:.0f} s: send it without pauses", status=408)
        late.headers = {"connection": "close"}
        raise late from error


async def _read_all(receive: Receive, max_bytes: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left while it was sending its request")
        piece = message.get("body", b"")
        size += len(piece)
        if size > max_bytes:
            raise _too_large(f"more than {size - 1} bytes", max_bytes)
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


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


def _too_large(size: str, max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has {size}, and at most {max_bytes} are read here: send less in one request")


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
