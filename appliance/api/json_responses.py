"""Plain responses: JSON with the headers that every answer carries."""

from collections.abc import Callable, Mapping
from typing import Any

import orjson
from starlette.responses import Response

from appliance.errors import ApplianceError, BackendGarbage
from appliance.router.protocols import PipelineAnswer


def respond_json(payload: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Raises BackendGarbage for a payload that JSON cannot hold (a target's reply nested hundreds of levels deep)."""
    try:
        content = orjson.dumps(payload)
    except TypeError as error:
        raise BackendGarbage(f"the reply cannot be written as JSON: {error}") from error
    return Response(content, status, headers, "application/json")


async def respond_whole(answer: PipelineAnswer, write: Callable[[Any], Any] | None = None) -> Response:
    """Respond with the answer's payload, rewritten by `write`, and close the answer. Raises BackendGarbage."""
    headers = answer.metadata.headers()
    try:
        payload = answer.payload if write is None else write(answer.payload)
        return respond_json(payload, status=answer.status, headers=headers)
    except ApplianceError as error:
        error.headers = headers
        raise
    finally:
        await answer.aclose()
