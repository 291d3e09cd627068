"""What must not be told: secrets in any text, and fields that hold what people wrote or were answered."""

import re
from collections.abc import Mapping, MutableMapping
from typing import Any

from appliance.core import ParsedRequest, Request, UpstreamCall, UpstreamReply

_HIDDEN = "[hidden]"

_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    # A header or a setting and its value, in whatever notation: `X-Api-Key: v`, `"api_key": "v"`, `api_key=v`.
    (
        re.compile(
            r"(?i)\b((?:proxy-)?authorization|(?:x[-_])?api[-_]?key|set-cookie|cookie|password|client[-_]secret)"
            r"(['\"]?\s*[:=]\s*(?:b?['\"])?)(?:(?:bearer|basic|token)\s+)?[^\s'\",;)}\]]+"
        ),
        rf"\1\2{_HIDDEN}",
    ),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), rf"\1 {_HIDDEN}"),
    (re.compile(r"\b(?:(?:sk-|apl_)[\w-]{8,}|(?:hf_|ghp_|gho_|xai-|gsk_)[\w-]{16,})"), _HIDDEN),
    (re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"), _HIDDEN),
    # pydantic quotes what it was given, which may be a prompt.
    (re.compile(r"input_value=.*?(?=, input_type=)", re.DOTALL), f"input_value={_HIDDEN}"),
)

_SECRET_FIELD = re.compile(
    r"(?i)(.*[-_])?(authorization|api[-_]?key|secret|password|passwd|cookie|access[-_]token|auth[-_]token)"
)
_WRITTEN_FIELDS = frozenset(
    {
        "answer",
        "body",
        "choices",
        "completion",
        "content",
        "input",
        "inputs",
        "messages",
        "prompt",
        "reply",
        "text",
        "texts",
    }
)
_DEPTH = 4


def scrub_text(text: str) -> str:
    """`text` without API keys, Authorization headers, passwords and quoted input."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def scrub_event(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: scrubs every field of a log event, whoever logged it."""
    for name, value in list(event.items()):
        if not name.startswith("_"):
            event[name] = _scrub_field(name, value, _DEPTH)
    return event


def _scrub_field(name: str, value: Any, depth: int) -> Any:
    if value is not None and _SECRET_FIELD.fullmatch(name):
        return _HIDDEN
    if name in _WRITTEN_FIELDS and not isinstance(value, bool | int | float | None):
        return _HIDDEN
    return _scrub_value(value, depth)


def _scrub_value(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return scrub_text(value)
    if isinstance(value, Request):
        return f"<Request {value.id}>"
    if isinstance(value, ParsedRequest | UpstreamCall | UpstreamReply) or depth == 0:
        return f"<{type(value).__name__}>"
    if isinstance(value, Mapping):
        return {str(name): _scrub_field(str(name), item, depth - 1) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_scrub_value(item, depth - 1) for item in value]
    return scrub_text(str(value))
