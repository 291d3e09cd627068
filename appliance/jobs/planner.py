"""When a batch will be done, and what of it has to leave the site to be done in time. Pure: values and `now`."""

import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from appliance.core import Snapshot
from appliance.errors import RequestError

SAFETY_SHARE: Final = 0.9
"""Share of the time that is left which is counted on: rates vary."""
LEARN_LINES: Final = 8
LEARN_SECONDS: Final = 2.0
"""A rate is believed from so many lines over so many seconds on."""
WINDOW_SECONDS: Final = 60.0
WINDOW_SHARE: Final = 0.02
"""Rates are those of the last minute of work, or of so much of a batch's window where that is longer: a busy minute is
no reason to send a day's work away."""
MIN_WINDOW_SECONDS: Final = 10.0
MAX_WINDOW_SECONDS: Final = 14 * 86_400.0
BACKLOG_CALLS: Final = 2
"""Beyond what engines compute together, so that they never wait for us between two calls."""

_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def parse_window(text: str) -> float:
    """`24h`, `30m`, `90s`, `7d` in seconds. Raises RequestError."""
    found = re.fullmatch(r"(\d{1,7})([smhd])", text)
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0.0
    if not MIN_WINDOW_SECONDS <= seconds <= MAX_WINDOW_SECONDS:
        raise RequestError(
            f"completion_window is {text[:40]!r}: write a time from 10s to 14d, for example 24h, 90m or 7d",
            param="completion_window",
        )
    return seconds


class BatchPace:
    """Lines a second over the last window, counting only time with work. Fed with counts; `now` is monotonic."""

    def __init__(self, window_seconds: float = WINDOW_SECONDS) -> None:
        self._window_seconds = window_seconds
        self._marks: deque[tuple[float, int]] = deque()
        self._begun: float | None = None

    def start(self, now: float) -> None:
        """Work begins, or goes on after a pause: what lies before says nothing."""
        self._marks.clear()
        self._begun = now

    def add_lines(self, lines: int, now: float) -> None:
        if self._begun is None:
            self._begun = now
        if self._marks and now - self._marks[-1][0] < 1.0:
            at, before = self._marks.pop()
            self._marks.append((at, before + lines))
        else:
            self._marks.append((now, lines))
        while now - self._marks[0][0] > self._window_seconds:
            self._begun = self._marks.popleft()[0]

    def lines_per_second(self, now: float) -> float | None:
        """None until enough was seen; that nothing comes is seen after a whole window."""
        lines, seconds = sum(count for _, count in self._marks), now - (now if self._begun is None else self._begun)
        is_known = lines >= LEARN_LINES and seconds >= LEARN_SECONDS
        return lines / seconds if is_known or seconds >= self._window_seconds else None


def make_pace(window_seconds: float) -> BatchPace:
    """For the forecast of a batch with such a completion window."""
    return BatchPace(max(WINDOW_SECONDS, WINDOW_SHARE * window_seconds))


@dataclass(frozen=True, slots=True)
class Forecast:
    """`seconds` until all is done at this pace, None where that is not known; `late` lines would not be in time."""

    seconds: float | None
    late_lines: int


def make_forecast(lines_left: int, per_second: float | None, seconds_left: float) -> Forecast:
    """What will come of so many lines on-site, with so many seconds of work left until the deadline."""
    if lines_left <= 0:
        return Forecast(0.0, 0)
    if per_second is None:
        return Forecast(None, 0)
    if per_second <= 0:
        return Forecast(None, lines_left)
    in_time = math.floor(per_second * max(0.0, seconds_left) * SAFETY_SHARE)
    return Forecast(lines_left / per_second, max(0, lines_left - in_time))


def choose_concurrency(snapshot: Snapshot, configured: int | None) -> int:
    """How many calls keep the engines that are ready busy; with no engine, what a hosted target gets at once."""
    if configured is not None:
        return configured
    ready = [view.load for view in snapshot.engines.values() if view.state == "ready" and view.load is not None]
    sequences = sum(max(1, load.sequences_capacity) for load in ready)
    return sequences + BACKLOG_CALLS if sequences else 4 * BACKLOG_CALLS


def is_within_hours(hours: Sequence[str], at: datetime) -> bool:
    """Whether jobs run at this moment of the machine's own time."""
    return not hours or any(_within(span, at) for span in hours)


def count_open_seconds(hours: Sequence[str], start: datetime, seconds: float) -> float:
    """How much of the next `seconds` jobs may run in, to the minute."""
    if not hours or seconds <= 0:
        return max(0.0, seconds)
    minutes = min(int(seconds // 60), int(MAX_WINDOW_SECONDS // 60))
    return 60.0 * sum(is_within_hours(hours, start + timedelta(minutes=minute)) for minute in range(minutes))


def _within(span: str, at: datetime) -> bool:
    begin, _, end = span.partition("-")
    now = f"{at.hour:02d}:{at.minute:02d}"
    return begin <= now < end if begin < end else now >= begin or now < end
