"""JSON responses, and errors in OpenAI's shape."""

import math
from typing import Any, Final

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from appliance.errors import ApplianceError, NotFound
from appliance.worker.json_log import log

INTERNAL_ERROR: Final = ApplianceError("the worker process met an error of its own; its log says which")


def json_response(value: object, status: int = 200) -> Response:
    return raw_json_response(orjson.dumps(value), status)


def raw_json_response(body: bytes, status: int = 200) -> Response:
    """A body that is JSON already."""
    return Response(body, status, media_type="application/json")


def error_response(error: ApplianceError) -> Response:
    """OpenAI's error object, with `retry-after` where waiting helps."""
    response = json_response(error.to_openai(), error.status)
    if error.retry_after_seconds is not None:
        response.headers["retry-after"] = str(max(1, math.ceil(error.retry_after_seconds)))
    return response


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApplianceError)
    if error.status >= 500:
        log("request_failed", path=request.url.path, code=error.code, reason=error.message)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    missing = f"{request.method} {request.url.path}: {error.detail}; see the list of endpoints"
    return error_response(NotFound(missing, status=error.status_code))


async def _on_bug(request: Request, error: Exception) -> Response:
    log("bug", path=request.url.path, reason=f"{type(error).__name__}: {error}")
    return error_response(INTERNAL_ERROR)


EXCEPTION_HANDLERS: Final[dict[Any, Any]] = {
    ApplianceError: _on_error,
    HTTPException: _on_http_error,
    Exception: _on_bug,
}
"""For a Starlette application: what is raised in an endpoint, as a response."""
