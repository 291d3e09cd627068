"""What a status code or an error object from a target means. Pure; the one place that knows other people's codes."""

import math
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final

import orjson

from appliance.core import Target
from appliance.errors import (
    ApplianceError,
    BackendAuth,
    BackendError,
    BackendOverloaded,
    BackendRefused,
    BackendTimeout,
    EngineBusy,
)

MAX_RETRY_AFTER_SECONDS: Final = 300.0
"""A target that wants to be left alone for longer is asked again after this: a year is a mistake, not an order."""

_OVERLOADED: Final = frozenset({409, 429, 503, 529})
_TIMED_OUT: Final = frozenset({408, 504})
_NEVER_ELSEWHERE: Final = frozenset({501, 505})
_MESSAGE_CHARACTERS: Final = 600


def error_of_status(target: Target, status: int, raw: bytes, headers: Mapping[str, str], wall: float) -> ApplianceError:
    """The error that a reply other than 200 stands for. `headers` in lower case; `wall` seconds since the epoch."""
    fields = _error_fields(raw)
    said = _message(fields) or f"HTTP {status}"
    retry_after = parse_retry_after(headers, wall)
    if status in (401, 403):
        # the message often quotes part of the key, so it stays here
        return BackendAuth(
            f"{target.name} refused this node's key (HTTP {status}): check the provider's key_env or key_file"
        )
    if status in _OVERLOADED:
        kind = EngineBusy if target.provider is None else BackendOverloaded
        return kind(f"{target.name} is overloaded (HTTP {status}): {said}", retry_after_seconds=retry_after)
    if status in _TIMED_OUT:
        return BackendTimeout(f"{target.name} timed out (HTTP {status}): {said}")
    if 300 <= status < 400:
        return BackendError(f"{target.name} redirects (HTTP {status}), which is not followed: correct its base_url")
    if status < 500 or status in _NEVER_ELSEWHERE:
        return _refused(target, status, said, fields)
    return BackendError(f"{target.name} failed (HTTP {status}): {said}", retry_after_seconds=retry_after)


def _refused(target: Target, status: int, said: str, fields: Mapping[str, Any]) -> BackendRefused:
    """The caller's mistake, as the target worded it: it would be the same mistake anywhere."""
    param, code, kind = fields.get("param"), fields.get("code"), fields.get("type")
    refused = BackendRefused(
        said if target.provider is None else f"{target.name}: {said}",
        param=param if isinstance(param, str) else None,
        status=status if status >= 400 else 502,
    )
    if isinstance(code, str) and code:
        refused.code = code
    if isinstance(kind, str) and kind:
        refused.kind = kind
    return refused


def is_error_payload(payload: Any) -> bool:
    """Whether a body that came with 200 is an error all the same."""
    return isinstance(payload, dict) and bool(payload.get("error"))


def error_in_success(target: Target, error: Any) -> BackendError:
    """For an error object inside a reply or stream that began with 200."""
    fields = error if isinstance(error, Mapping) else {"message": str(error)}
    said = _message(fields) or "no message"
    text = f"{target.name} answered with an error: {said}"
    words = f"{fields.get('code')} {fields.get('type')}".lower()
    if any(word in words for word in ("429", "529", "503", "rate_limit", "overloaded")):
        return BackendOverloaded(text)
    return BackendError(text)


def parse_retry_after(headers: Mapping[str, str], wall: float) -> float | None:
    """Seconds to wait, bounded, by `retry-after-ms` or `retry-after` (seconds or a date); None if neither is usable."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        if not text:
            continue
        seconds = _number(text)
        seconds = seconds * scale if seconds is not None else _until(text, wall)
        if seconds is not None:
            return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)
    return None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return None if math.isnan(number) else number


def _until(text: str, wall: float) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp() - wall
    except (ValueError, OverflowError):
        return None


def _error_fields(raw: bytes) -> Mapping[str, Any]:
    try:
        payload = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return {}
    if isinstance(payload, list) and payload:  # some servers wrap the object
        payload = payload[0]
    if not isinstance(payload, dict):
        return {}
    error = payload.get("error")
    if isinstance(error, dict):
        return error
    return {"message": error} if isinstance(error, str) else payload


def _message(fields: Mapping[str, Any]) -> str:
    message = fields.get("message") or fields.get("detail") or ""
    text = message if isinstance(message, str) else str(message)
    return " ".join(text.split())[:_MESSAGE_CHARACTERS]
