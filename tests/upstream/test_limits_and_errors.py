"""What rate-limit headers and error bodies of every provider mean. Tables: no socket, no clock."""

import re
from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from appliance.errors import (
    ApplianceError,
    BackendAuth,
    BackendError,
    BackendIncapable,
    BackendOverloaded,
    BackendRefused,
    BackendTimeout,
    ContextTooLong,
)
from appliance.upstream.error_mapping import error_in_success, error_of_status
from appliance.upstream.rate_limit_headers import MAX_REST_SECONDS, cooldown_seconds, parse_reset, retry_seconds
from scripts.docs import DOCS
from tests.router.scene import engine_target, hosted_target

NOW = 1_790_000_000.0
"""2026-09-21T14:13:20Z."""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("1m30.5s", 90.5),
        ("20ms", 0.02),
        ("2h", 7200.0),
        ("34.5", 34.5),
        ("0", 0.0),
        ("1790000012", 12.0),
        ("1790000012000", 12.0),
        ("1789999999", 0.0),
        ("2026-09-21T14:13:50Z", 30.0),
        ("2026-09-21T14:13:20+00:00", 0.0),
        ("2026-09-21T14:13:20", None),
        ("soon", None),
        ("", None),
        ("-5", None),
        ("nan", None),
        ("5s and more", None),
    ],
)
def test_a_reset_is_read_in_each_of_its_forms(text: str, seconds: float | None) -> None:
    assert parse_reset(text, NOW) == (None if seconds is None else pytest.approx(seconds))


REST: list[tuple[dict[str, str], float | None]] = [
    ({}, None),
    ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "12s"}, 12.0),
    ({"x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "12s"}, None),
    ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"}, MAX_REST_SECONDS),
    (
        {
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": "3s",
            "x-ratelimit-remaining-tokens": "0",
            "x-ratelimit-reset-tokens": "7s",
        },
        7.0,
    ),
    (
        {
            "anthropic-ratelimit-input-tokens-remaining": "0",
            "anthropic-ratelimit-input-tokens-reset": "2026-09-21T14:13:30Z",
            "anthropic-ratelimit-requests-remaining": "49",
            "anthropic-ratelimit-requests-reset": "2026-09-21T14:14:10Z",
        },
        10.0,
    ),
    ({"anthropic-ratelimit-requests-remaining": "0"}, None),
    ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1790000005000"}, 5.0),
    ({"x-ratelimit-remaining-requests": "many", "x-ratelimit-reset-requests": "12s"}, None),
    ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "0s"}, None),
]


@pytest.mark.parametrize(("headers", "seconds"), REST)
def test_a_used_up_limit_is_seen_with_its_reset(headers: dict[str, str], seconds: float | None) -> None:
    assert cooldown_seconds(headers, NOW) == (None if seconds is None else pytest.approx(seconds))


def test_a_refusal_is_waited_for_as_it_says_else_until_its_limit_is_renewed() -> None:
    used_up = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1m40s"}
    assert retry_seconds({**used_up, "retry-after": "3"}, NOW) == 3.0
    assert retry_seconds(used_up, NOW) == pytest.approx(100.0)


def openai_error(code: str | None, message: str = "no", kind: str = "invalid_request_error") -> Mapping[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def anthropic_error(kind: str, message: str = "no", **more: Any) -> Mapping[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message, **more}, "request_id": "req_1"}


def gemini_error(code: int, status: str, message: str = "no", *details: Any) -> Mapping[str, Any]:
    return {"error": {"code": code, "status": status, "message": message, "details": list(details)}}


RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34s"}
BAD_KEY = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
LONG = "This model's maximum context length is 8192 tokens. Please reduce the length of the messages."
AZURE_FILTER = {
    "error": {
        "message": "The response was filtered.",
        "code": "content_filter",
        "status": 400,
        "innererror": {"code": "ResponsibleAIPolicyViolation"},
    }
}

NOWHERE = "User location is not supported for the API use."
MODEL_UNKNOWN: list[tuple[str, int, Any, type[ApplianceError], str]] = [
    ("openai no access", 403, openai_error("model_not_found", "no access to model"), BackendIncapable, ""),
    ("azure deployment", 404, {"error": {"code": "DeploymentNotFound", "message": "x"}}, BackendIncapable, ""),
    ("azure operation", 400, {"error": {"code": "OperationNotSupported", "message": "x"}}, BackendIncapable, ""),
    ("groq retired", 400, openai_error("model_decommissioned"), BackendIncapable, ""),
    ("mistral model", 400, openai_error(None, "Invalid model: x", "invalid_model"), BackendIncapable, ""),
    ("gemini country", 400, gemini_error(400, "FAILED_PRECONDITION", NOWHERE), BackendIncapable, ""),
    ("no such path", 404, {"detail": "Not Found"}, BackendIncapable, ""),
    ("wrong method", 405, {"detail": "Method Not Allowed"}, BackendIncapable, ""),
    ("a callers file", 404, anthropic_error("not_found_error", "File not found: file_1"), BackendRefused, ""),
    ("a callers item", 404, openai_error(None, "Item with id 'rs_1' not found."), BackendRefused, ""),
]

ERRORS: list[tuple[str, int, Any, type[ApplianceError], str]] = [
    ("openai long", 400, openai_error("context_length_exceeded", LONG), ContextTooLong, "context_length_exceeded"),
    ("vllm long", 400, openai_error(None, LONG, "BadRequestError"), ContextTooLong, "context_length_exceeded"),
    ("anthropic long", 400, anthropic_error("invalid_request_error", "prompt is too long: 9 > 8"), ContextTooLong, ""),
    ("anthropic window", 400, anthropic_error("model_context_window_exceeded"), ContextTooLong, ""),
    (
        "gemini long",
        400,
        gemini_error(400, "INVALID_ARGUMENT", "The input token count 9 exceeds"),
        ContextTooLong,
        "",
    ),
    ("mistral long", 400, {"message": "Prompt contains 9 tokens, too large: exceeds the context"}, ContextTooLong, ""),
    ("groq long", 413, openai_error(None, "Please reduce the length of the messages"), ContextTooLong, ""),
    ("openai key", 401, openai_error("invalid_api_key"), BackendAuth, "backend_auth"),
    ("anthropic key", 401, anthropic_error("authentication_error"), BackendAuth, "backend_auth"),
    ("anthropic money", 402, anthropic_error("billing_error"), BackendAuth, "backend_auth"),
    ("anthropic permission", 403, anthropic_error("permission_error"), BackendAuth, "backend_auth"),
    ("gemini key", 400, gemini_error(400, "INVALID_ARGUMENT", "no", BAD_KEY), BackendAuth, "backend_auth"),
    ("gemini permission", 403, gemini_error(403, "PERMISSION_DENIED"), BackendAuth, "backend_auth"),
    ("openrouter money", 402, openai_error(None), BackendAuth, "backend_auth"),
    ("openai rate", 429, openai_error("rate_limit_exceeded"), BackendOverloaded, "backend_overloaded"),
    ("anthropic rate", 429, anthropic_error("rate_limit_error"), BackendOverloaded, "backend_overloaded"),
    ("anthropic overload", 529, anthropic_error("overloaded_error"), BackendOverloaded, "backend_overloaded"),
    ("anthropic overload, 500", 500, anthropic_error("overloaded_error"), BackendOverloaded, "backend_overloaded"),
    ("gemini rate", 429, gemini_error(429, "RESOURCE_EXHAUSTED"), BackendOverloaded, "backend_overloaded"),
    ("gemini overload", 503, gemini_error(503, "UNAVAILABLE"), BackendOverloaded, "backend_overloaded"),
    ("gemini deadline", 504, gemini_error(504, "DEADLINE_EXCEEDED"), BackendTimeout, "backend_timeout"),
    ("anthropic timeout", 504, anthropic_error("timeout_error"), BackendTimeout, "backend_timeout"),
    ("gemini internal", 500, gemini_error(500, "INTERNAL"), BackendError, "backend_error"),
    ("anthropic internal", 500, anthropic_error("api_error"), BackendError, "backend_error"),
    ("azure filter", 400, AZURE_FILTER, BackendRefused, "content_filter"),
    ("openai policy", 400, openai_error("content_policy_violation"), BackendRefused, "content_filter"),
    (
        "openrouter moderation",
        403,
        {"error": {"code": 403, "message": "flagged", "metadata": {"reasons": ["x"], "flagged_input": "y"}}},
        BackendRefused,
        "content_filter",
    ),
    ("anthropic wrong", 400, anthropic_error("invalid_request_error", "temperature is deprecated"), BackendRefused, ""),
    ("anthropic too large", 413, anthropic_error("request_too_large"), BackendIncapable, ""),
    ("anthropic unknown", 404, anthropic_error("not_found_error"), BackendIncapable, ""),
    ("gemini unknown", 404, gemini_error(404, "NOT_FOUND"), BackendIncapable, ""),
    *MODEL_UNKNOWN,
    ("mistral wrong", 422, {"detail": [{"loc": ["body", "n"], "msg": "no"}]}, BackendRefused, ""),
    ("in a list", 400, [gemini_error(400, "INVALID_ARGUMENT")], BackendRefused, ""),
]


@pytest.mark.parametrize(
    ("status", "body", "kind", "code"), [row[1:] for row in ERRORS], ids=[row[0] for row in ERRORS]
)
def test_each_providers_error_is_one_of_ours(status: int, body: Any, kind: type[ApplianceError], code: str) -> None:
    error = error_of_status(hosted_target(), status, orjson.dumps(body), {}, NOW)
    assert type(error) is kind
    assert not code or error.code == code
    assert error.fallback is (isinstance(error, BackendError) and kind is not BackendRefused)
    refusals = (ContextTooLong, BackendRefused, BackendIncapable)
    assert error.status != 402 and (error.status < 500) is (kind in refusals)


def test_googles_own_retry_hint_is_read() -> None:
    body = orjson.dumps(gemini_error(429, "RESOURCE_EXHAUSTED", "quota", RETRY_INFO))
    assert error_of_status(hosted_target(), 429, body, {}, NOW).retry_after_seconds == 34.0


@pytest.mark.parametrize(
    "body",
    [
        openai_error("insufficient_quota", kind="insufficient_quota"),
        anthropic_error("rate_limit_error", details={"error_code": "enforced_spend_limit_reached"}),
    ],
)
def test_an_account_with_nothing_left_is_left_alone_for_long(body: Mapping[str, Any]) -> None:
    error = error_of_status(hosted_target(), 429, orjson.dumps(body), {}, NOW)
    assert isinstance(error, BackendOverloaded) and error.retry_after_seconds == 300.0


def test_an_engines_own_words_for_a_long_prompt_keep_their_field() -> None:
    raw = orjson.dumps({"error": {"message": "too long", "param": "prompt", "code": "context_length_exceeded"}})
    error = error_of_status(engine_target(), 400, raw, {}, NOW)
    assert isinstance(error, ContextTooLong) and (error.message, error.param) == ("too long", "prompt")


IN_STREAMS: list[tuple[Any, type[ApplianceError]]] = [
    ({"type": "overloaded_error", "message": "Overloaded"}, BackendOverloaded),
    ({"type": "rate_limit_error", "message": "x"}, BackendOverloaded),
    ({"code": 503, "status": "UNAVAILABLE", "message": "x"}, BackendOverloaded),
    ({"code": "rate_limit_exceeded", "message": "x"}, BackendOverloaded),
    ({"type": "api_error", "message": "x"}, BackendError),
    ({"code": "context_length_exceeded", "message": "x"}, ContextTooLong),
    ({"code": "content_filter", "message": "x"}, BackendRefused),
    ("words alone", BackendError),
]


@pytest.mark.parametrize(("error", "kind"), IN_STREAMS)
def test_an_error_inside_a_reply_that_began_well_is_one_of_ours(error: Any, kind: type[ApplianceError]) -> None:
    assert type(error_in_success(hosted_target(), error)) is kind


def test_the_documentation_tells_what_each_of_these_becomes() -> None:
    rows = [line.split("|")[1:3] for line in (DOCS / "errors.md").read_text().splitlines() if line.startswith("| ")]
    for _, status, body, kind, code in ERRORS:
        error = error_of_status(hosted_target(), status, orjson.dumps(body), {}, NOW)
        ours = "upstream_rejected" if issubclass(kind, BackendRefused) and code != "content_filter" else error.code
        told = [says for says, becomes in rows if f"`{ours}`" in becomes]
        said = set(re.findall(r'"(?:(?:code|status|type|reason)":"(?=\w))?(\w+)"', orjson.dumps(body).decode()))
        named = any(f"`{word}`" in says for says in told for word in said) or any(str(status) in says for says in told)
        assert told and (named or ours in ("upstream_rejected", "context_length_exceeded")), (status, said)
