"""Plain responses: JSON, and errors in OpenAI's shape with the headers that every answer carries."""

import math
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response

from appliance.errors import ApplianceError, BackendGarbage, Unauthorized


def json_response(payload: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Raises BackendGarbage for a payload that JSON cannot hold (a target's reply nested hundreds of levels deep)."""
    try:
        content = orjson.dumps(payload)
    except TypeError as error:
        raise BackendGarbage(f"the reply cannot be written as JSON: {error}") from error
    return Response(content, status, headers, "application/json")


def error_response(error: ApplianceError) -> Response:
    """The error in OpenAI's shape. Retry-After is in whole seconds, rounded up, where waiting helps."""
    headers = dict(error.headers)
    if error.retry_after_seconds is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_seconds)))
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return Response(orjson.dumps(error.to_openai(), default=str), error.status, headers, "application/json")
