"""Which API's shapes a caller expects, by path and headers alone, so that errors before any endpoint have them too."""

import math
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

import orjson
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from appliance.core import Dialect
from appliance.errors import ApplianceError, Unauthorized
from appliance.wire.registry import DIALECTS

ANTHROPIC_REQUEST_ID_HEADER = "request-id"
GOOGLE_KEY_HEADER = b"x-goog-api-key"
GEMINI_ACTIONS = (":generateContent", ":streamGenerateContent", ":countTokens")


def detect_dialect(scope: Scope) -> Dialect:
    """By the path; where several APIs share one (`/v1/models`), by the headers that their own SDKs send."""
    path = scope.get("path", "")
    if path.startswith(("/v1beta/", "/v1alpha/")):
        return "gemini"
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return "anthropic"
    if path != "/v1/models" and not path.startswith("/v1/models/"):
        return "openai"
    if path.endswith(GEMINI_ACTIONS):
        return "gemini"
    headers = Headers(scope=scope)
    if "x-goog-api-key" in headers or "x-goog-api-client" in headers:
        return "gemini"
    return "anthropic" if "anthropic-version" in headers else "openai"


def move_query_key(scope: MutableMapping[str, Any]) -> None:
    """Move a key in the address (`?key=`) to a header, before anything could write the address down."""
    query = scope.get("query_string", b"")
    if b"key=" not in query:
        return
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    keys = [value for name, value in pairs if name == "key"]
    if not keys:
        return
    scope["query_string"] = urlencode([pair for pair in pairs if pair[0] != "key"]).encode()
    if not any(name == GOOGLE_KEY_HEADER for name, _ in scope["headers"]):
        scope["headers"] = [*scope["headers"], (GOOGLE_KEY_HEADER, keys[0].encode("latin-1", "replace"))]


def respond_error(error: ApplianceError, dialect: Dialect = "openai", request_id: str | None = None) -> Response:
    """The error in the dialect's shape. Retry-After is in whole seconds, rounded up, where waiting helps."""
    headers = dict(error.headers)
    if error.retry_after_seconds is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_seconds)))
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    status = DIALECTS[dialect].error_status(error)
    body = orjson.dumps(write_error(error, dialect, request_id), default=str)
    return Response(body, status, headers, "application/json")


def write_error(error: ApplianceError, dialect: Dialect, request_id: str | None = None) -> Any:
    return DIALECTS[dialect].write_error(error, request_id)
