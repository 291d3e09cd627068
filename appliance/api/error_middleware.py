"""Around every request: its id on every response, and no exception that reaches the client as anything but an error."""

import re
import secrets

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from appliance.api.caller_dialect import ANTHROPIC_REQUEST_ID_HEADER, detect_dialect, move_query_key, respond_error
from appliance.errors import ApplianceError, OperatorError

REQUEST_ID_HEADER = "x-request-id"
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

log = structlog.stdlib.get_logger(__name__)


class ErrorMiddleware:
    """ASGI middleware, the outermost of ours. `scope["state"]` holds the id as `request_id`, and whose shapes the
    caller expects as `dialect`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        dialect = detect_dialect(scope)
        scope.setdefault("state", {}).update(request_id=request_id, dialect=dialect)
        if dialect == "gemini":
            move_query_key(scope)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers.setdefault(REQUEST_ID_HEADER, request_id)
                if dialect == "anthropic":
                    headers.setdefault(ANTHROPIC_REQUEST_ID_HEADER, request_id)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            failed = _as_ours(error, request_id, scope["path"])
            if started:
                # Half a response is out: only closing the connection tells the client that it is not whole.
                raise
            await respond_error(failed, dialect, request_id)(scope, receive, send_with_id)


def _request_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _SANE_ID.fullmatch(given) else make_request_id()


def make_request_id() -> str:
    return f"req_{secrets.token_hex(12)}"


def _as_ours(error: Exception, request_id: str, path: str) -> ApplianceError:
    """Errors of ours as they are; any other is a defect, logged here with its trace and hidden from the client."""
    if isinstance(error, ApplianceError) and not isinstance(error, OperatorError):
        return error
    log.error("request failed unexpectedly", request_id=request_id, path=path, exc_info=error)
    return ApplianceError(f"the appliance failed unexpectedly; its log has the details under request id {request_id}")
