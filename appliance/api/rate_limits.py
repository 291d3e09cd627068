"""Requests a minute, key by key: a bucket that fills evenly. Pure but for what it remembers."""

from collections.abc import Callable
from typing import Final

from appliance.core import Caller
from appliance.errors import RateLimited

_BURST_SECONDS: Final = 10.0
"""So much of a minute's allowance may be used at once; the rest comes evenly."""


class RateLimits:
    """Called on the event loop; one bucket for each key that has a limit. `clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        """Key -> (requests left, when that was so)."""

    def take(self, caller: Caller) -> None:
        """Count one request. Raises RateLimited, with the seconds to wait, where the key has none left."""
        limit = caller.requests_per_minute
        if limit is None:
            return
        per_second = limit / 60.0
        most = max(1.0, per_second * _BURST_SECONDS)
        now = self._clock()
        left, at = self._buckets.get(caller.key_id, (most, now))
        left = min(most, left + max(0.0, now - at) * per_second)
        if left < 1.0:
            self._buckets[caller.key_id] = (left, now)
            raise RateLimited(
                f"API key {caller.name!r} may send {limit} requests a minute: wait and send this one again",
                retry_after_seconds=(1.0 - left) / per_second,
            )
        self._buckets[caller.key_id] = (left - 1.0, now)
