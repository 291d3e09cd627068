"""Request bodies, read up to a limit."""

from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request

from appliance.core.json_types import JsonObject
from appliance.errors import BodyTooLarge, ClientGone, RequestError


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The whole body. Raises BodyTooLarge before more than the limit is held, ClientGone when the client leaves."""
    refusal = BodyTooLarge(f"the body has more than {limit_bytes} bytes; send less in one call")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise refusal
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit_bytes:
                raise refusal
            chunks.append(chunk)
    except ClientDisconnect:
        raise ClientGone("the client closed the connection while it was sending") from None
    return b"".join(chunks)


def parse_json_object(body: bytes) -> JsonObject:
    """The body as an object; an empty body is an empty object. Raises RequestError for anything else."""
    try:
        value: Any = orjson.loads(body) if body else {}
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    return value
