"""Requests a minute by key."""

import hashlib

import pytest

from appliance.api.auth import Authenticator
from appliance.api.intake import RateLimits
from appliance.config import KeySettings
from appliance.core import Caller
from appliance.errors import RateLimited, Unauthorized


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_key_without_a_limit_is_never_stopped() -> None:
    limits = RateLimits(Clock())
    for _ in range(1000):
        limits.count_request(Caller("a", "a"))


def test_a_key_may_use_ten_seconds_worth_at_once_and_then_waits_as_long_as_it_is_told() -> None:
    clock = Clock()
    limits = RateLimits(clock)
    caller = Caller("a", "a", requests_per_minute=60)
    for _ in range(10):
        limits.count_request(caller)
    with pytest.raises(RateLimited, match="60 requests a minute") as caught:
        limits.count_request(caller)
    assert caught.value.retry_after_seconds == pytest.approx(1.0)
    clock.now += 1.0
    limits.count_request(caller)
    with pytest.raises(RateLimited):
        limits.count_request(caller)


def test_over_a_long_time_a_key_gets_its_rate_and_no_more() -> None:
    clock = Clock()
    limits = RateLimits(clock)
    caller = Caller("a", "a", requests_per_minute=30)
    passed = 0
    for _ in range(6000):
        clock.now += 0.1
        try:
            limits.count_request(caller)
            passed += 1
        except RateLimited:
            continue
    assert 300 <= passed <= 305


def test_one_key_does_not_use_up_anothers_allowance_and_a_clock_that_stands_still_gives_none() -> None:
    limits = RateLimits(Clock())
    slow, other = Caller("a", "a", requests_per_minute=1), Caller("b", "b", requests_per_minute=1)
    limits.count_request(slow)
    limits.count_request(other)
    for caller in (slow, other):
        with pytest.raises(RateLimited):
            limits.count_request(caller)


def test_5000_keys_are_told_apart() -> None:
    def digest(number: int) -> str:
        return hashlib.sha256(f"sk-{number}".encode()).hexdigest()

    keys = [KeySettings.model_validate({"name": f"key-{number}", "sha256": digest(number)}) for number in range(5000)]
    auth = Authenticator(keys, host="127.0.0.1")
    for number in (0, 2499, 4999):
        assert auth.authenticate({"authorization": f"Bearer sk-{number}"}).key_id == f"key-{number}"
    with pytest.raises(Unauthorized):
        auth.authenticate({"authorization": "Bearer sk-5000"})
