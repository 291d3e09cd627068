"""Plain responses: JSON with the headers that every answer carries."""

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response

from appliance.errors import BackendGarbage


def json_response(payload: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Raises BackendGarbage for a payload that JSON cannot hold (a target's reply nested hundreds of levels deep)."""
    try:
        content = orjson.dumps(payload)
    except TypeError as error:
        raise BackendGarbage(f"the reply cannot be written as JSON: {error}") from error
    return Response(content, status, headers, "application/json")
