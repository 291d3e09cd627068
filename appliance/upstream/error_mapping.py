"""What a status code or an error object from a target means. Pure; the one place that knows other people's codes."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeVar

import orjson

from appliance.core import Target
from appliance.errors import (
    ApplianceError,
    BackendAuth,
    BackendError,
    BackendIncapable,
    BackendOverloaded,
    BackendRefused,
    BackendTimeout,
    ContextTooLong,
    EngineBusy,
)
from appliance.upstream.rate_limit_headers import MAX_RETRY_AFTER_SECONDS, parse_reset, retry_seconds

_Refusal = TypeVar("_Refusal", bound=BackendRefused)

_AUTH: Final = frozenset({401, 402, 403})
_OVERLOADED: Final = frozenset({409, 429, 503, 529})
_DRAINING: Final = (500, "cannot schedule new futures after shutdown")
"""What vLLM says to new requests while it finishes the old ones; its health page goes on saying that all is well."""
_TIMED_OUT: Final = frozenset({408, 504})
_NEVER_ELSEWHERE: Final = frozenset({501, 505})
_NOT_FOUND: Final = frozenset({404, 405, 410})
_TOO_LARGE: Final = 413
_MESSAGE_CHARACTERS: Final = 600

CONTEXT_WORDS: Final = frozenset(
    {"context_length_exceeded", "model_context_window_exceeded", "context_window_exceeded"}
)
CONTEXT_TEXT: Final = re.compile(
    r"maximum context length|context (?:length|window)|prompt is too long|input is too long"
    r"|input token count .{0,40}exceeds|exceed(?:s|ed)? .{0,40}(?:context|maximum number of tokens)"
    r"|too many (?:input )?tokens|reduce the length of the (?:messages|prompt|input)",
    re.IGNORECASE,
)
"""How providers without a code for it say that a prompt is too long."""

FILTER_WORDS: Final = frozenset(
    {"content_filter", "content_policy_violation", "responsibleaipolicyviolation", "invalid_prompt", "flagged_input"}
)
AUTH_WORDS: Final = frozenset({"api_key_invalid", "invalid_api_key", "authentication_error", "unauthenticated"})
"""Some say with 400 that a key is wrong."""

SPENT_WORDS: Final = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "contract_spend_limit_reached",
        "enforced_spend_limit_reached",
        "linked_organization_spend_limit_reached",
    }
)
"""Too many requests, but waiting a moment does not help: the account has nothing left."""

MODEL_WORDS: Final = frozenset(
    {
        "deploymentnotfound",
        "failed_precondition",
        "invalid_model",
        "model_decommissioned",
        "model_not_active",
        "model_not_available",
        "model_not_found",
        "modelnotfound",
        "operationnotsupported",
        "unsupported_model",
    }
)
"""The account or region has no such model: OpenAI, Azure, Groq, Mistral and Together say so with 400, 403 or 404.
Gemini says FAILED_PRECONDITION where it does not serve a country."""

_CALLERS_OBJECT: Final = re.compile(
    r"\b(?:files?|file[-_]id|cached ?content|previous_response_id|(?:response|item|container) with id)\b", re.IGNORECASE
)
"""A 404 that speaks of something that the request names besides the model is the request's mistake."""

OVERLOAD_WORDS: Final = (
    "429", "503", "529", "rate_limit", "overloaded", "resource_exhausted", "unavailable", "capacity", *SPENT_WORDS,
)  # fmt: skip


def error_of_status(target: Target, status: int, raw: bytes, headers: Mapping[str, str], wall: float) -> ApplianceError:
    """The error that a reply other than 200 stands for. `headers` in lower case; `wall` seconds since the epoch."""
    fields = _error_fields(raw)
    said = _message(fields) or f"HTTP {status}"
    words = frozenset(_words(fields))
    by_content = _error_of_content(target, status, said, fields, words)
    if by_content is not None:
        return by_content
    if status in _AUTH:
        return _auth_error(target, status)
    retry_after = retry_seconds(headers, wall)
    if retry_after is None:
        retry_after = MAX_RETRY_AFTER_SECONDS if words & SPENT_WORDS else _retry_delay(fields, wall)
    is_draining = status == _DRAINING[0] and _DRAINING[1] in said and target.provider is None
    if status in _OVERLOADED or is_draining or (status >= 500 and "overloaded_error" in words):
        kind = EngineBusy if target.provider is None else BackendOverloaded
        return kind(f"{target.name} is overloaded (HTTP {status}): {said}", retry_after_seconds=retry_after)
    if status in _TIMED_OUT:
        return BackendTimeout(f"{target.name} timed out (HTTP {status}): {said}")
    if 300 <= status < 400:
        return BackendError(f"{target.name} redirects (HTTP {status}), which is not followed: correct its base_url")
    if _is_incapable(status, said):
        return _incapable(target, status, said, fields)
    if status < 500 or status in _NEVER_ELSEWHERE:
        return _refused(target, status, said, fields)
    return BackendError(f"{target.name} failed (HTTP {status}): {said}", retry_after_seconds=retry_after)


def _error_of_content(
    target: Target, status: int, said: str, fields: Mapping[str, Any], words: frozenset[str]
) -> ApplianceError | None:
    """What its words say more exactly than its status."""
    if not 400 <= status < 500:
        return None
    if words & FILTER_WORDS:
        refused = _refused(target, 400 if status == 403 else status, said, fields)
        refused.code = "content_filter"
        return refused
    if words & CONTEXT_WORDS or (status in (400, 413, 422) and CONTEXT_TEXT.search(said)):
        param = fields.get("param")
        text = said if target.provider is None else f"{target.name}: {said}"
        return ContextTooLong(text, param=param if isinstance(param, str) else "messages")
    if words & MODEL_WORDS:
        return _incapable(target, status, said, fields)
    if words & AUTH_WORDS:
        return _auth_error(target, status)
    return None


def _is_incapable(status: int, said: str) -> bool:
    return status == _TOO_LARGE or (status in _NOT_FOUND and _CALLERS_OBJECT.search(said) is None)


def _auth_error(target: Target, status: int) -> BackendAuth:
    if status == 402:
        return BackendAuth(f"{target.name} wants to be paid (HTTP 402): see to the provider's account")
    # the message often quotes part of the key, so it stays here
    return BackendAuth(
        f"{target.name} refused this node's key (HTTP {status}): check the provider's key_env or key_file"
    )


def _retry_delay(fields: Mapping[str, Any], wall: float) -> float | None:
    """Google's RetryInfo, inside the error."""
    for detail in _details(fields):
        delay = detail.get("retryDelay")
        if isinstance(delay, str):
            seconds = parse_reset(delay, wall)
            return None if seconds is None else min(seconds, MAX_RETRY_AFTER_SECONDS)
    return None


def _details(fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    details = fields.get("details")
    for detail in details if isinstance(details, list) else (details, fields.get("innererror"), fields.get("metadata")):
        if isinstance(detail, Mapping):
            yield detail


def _words(fields: Mapping[str, Any]) -> Iterator[str]:
    """The codes of an error, in lower case, wherever providers put them."""
    for one in (fields, *_details(fields)):
        for name in ("code", "type", "status", "reason", "error_code"):
            value = one.get(name)
            if isinstance(value, str | int):
                yield str(value).lower()
        if "flagged_input" in one:
            yield "flagged_input"


def _refused(target: Target, status: int, said: str, fields: Mapping[str, Any]) -> BackendRefused:
    """The caller's mistake, as the target worded it: it would be the same mistake anywhere."""
    return _worded(BackendRefused, target, status, said, fields)


def _incapable(target: Target, status: int, said: str, fields: Mapping[str, Any]) -> BackendIncapable:
    """The target's limits, as it worded them. A body that is too large for it says nothing of other requests."""
    incapable = _worded(BackendIncapable, target, status, said, fields)
    incapable.refuses_all = status != _TOO_LARGE
    return incapable


def _worded(error_type: type[_Refusal], target: Target, status: int, said: str, fields: Mapping[str, Any]) -> _Refusal:
    param, code, kind = fields.get("param"), fields.get("code"), fields.get("type")
    refused = error_type(
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


def error_in_success(target: Target, error: Any) -> ApplianceError:
    """For an error object inside a reply or stream that began with 200."""
    fields = error if isinstance(error, Mapping) else {"message": str(error)}
    said = _message(fields) or "no message"
    words = frozenset(_words(fields))
    if words & CONTEXT_WORDS:
        return ContextTooLong(f"{target.name}: {said}", param="messages")
    if words & FILTER_WORDS:
        refused = _refused(target, 400, said, fields)
        refused.code = "content_filter"
        return refused
    text = f"{target.name} answered with an error: {said}"
    if any(word in " ".join(words) for word in OVERLOAD_WORDS):
        return BackendOverloaded(text)
    return BackendError(text)


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
