"""What rate-limit headers say: how long a target that has nothing left wants to be left alone. Pure."""

import math
import re
from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Final

MAX_RETRY_AFTER_SECONDS: Final = 300.0
"""A target that wants to be left alone for longer is asked again after this: a year is a mistake, not an order."""

MAX_REST_SECONDS: Final = 60.0
"""After an answer that came: limits are per minute with everyone, and a longer rest is more likely a mistake."""

_REMAINING: Final = re.compile(r"(?:x-ratelimit|anthropic-ratelimit|ratelimit)-.*remaining.*|.*-ratelimit-.*-remaining")
_SPANS: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|us|ns|h|m|s|d)")
_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_EPOCH: Final = 1_000_000_000.0
"""A reset beyond this is a point in time, not a number of seconds."""


def cooldown_seconds(headers: Mapping[str, str], wall: float) -> float | None:
    """Seconds until a limit is renewed of which nothing remains; None where something does, or nothing is said.

    `headers` in lower case; `wall` seconds since the epoch.
    """
    return _longest(headers, wall, MAX_REST_SECONDS)


def retry_seconds(headers: Mapping[str, str], wall: float) -> float | None:
    """For a refusal: what it asks for by `retry-after`, else until what is used up is renewed."""
    asked = parse_retry_after(headers, wall)
    return asked if asked is not None else _longest(headers, wall, MAX_RETRY_AFTER_SECONDS)


def _longest(headers: Mapping[str, str], wall: float, most_seconds: float) -> float | None:
    longest = 0.0
    for name, value in headers.items():
        if "ratelimit" in name and "remaining" in name and _REMAINING.fullmatch(name) and _is_none_left(value):
            reset = headers.get(name.replace("remaining", "reset"))
            seconds = None if reset is None else parse_reset(reset, wall)
            longest = max(longest, seconds or 0.0)
    return min(longest, most_seconds) if longest > 0 else None


def _is_none_left(value: str) -> bool:
    number = _number(value)
    return number is not None and number <= 0


def parse_reset(text: str, wall: float) -> float | None:
    """Seconds from now: `6m0s`, `20ms`, `12.5`, a Unix time in seconds or milliseconds, or RFC 3339."""
    text = text.strip()
    number = _number(text)
    if number is not None:
        if number < 0:
            return None
        if number > _EPOCH:
            number = (number / 1000 if number > _EPOCH * 1000 else number) - wall
        return max(0.0, number)
    if text and _SPANS.sub("", text) == "":
        return sum(float(count) * _UNITS[unit] for count, unit in _SPANS.findall(text))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return max(0.0, moment.timestamp() - wall) if moment.tzinfo is not None else None


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
