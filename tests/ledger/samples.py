"""Outcomes, attempts and targets as the pipeline would make them, and waiting for what happens in another thread."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio

from appliance.core import AttemptOutcome, ExcludedTarget, Outcome, Price, Profile, Target, Usage
from appliance.ledger.database import sqlite_url

NOW_AT = 1_800_000_000.0
HOSTED = Target(
    name="acme/large",
    location="hosted",
    dialect="openai",
    address="https://api.acme.example/v1",
    model="large",
    abilities=frozenset({"chat"}),
    price=Price(3.0, 15.0),
)
PROFILE = Profile(
    task="chat",
    complexity=0.25,
    format="text",
    latency_class="interactive",
    language="en",
    prompt_tokens=12,
    output_tokens=64,
    reasons=("chat: no other task fits",),
)


def onsite_attempt(**changes: Any) -> AttemptOutcome:
    attempt = AttemptOutcome(
        index=0,
        target="onsite/small",
        location="onsite",
        reason="first choice of the route",
        result="answered",
        detail="",
        started_at=NOW_AT,
        first_byte_seconds=0.1,
        total_seconds=0.5,
        usage=Usage(prompt_tokens=12, completion_tokens=30, cached_tokens=4),
        cost_usd=0.000_002,
    )
    return replace(attempt, **changes)


def hosted_attempt(**changes: Any) -> AttemptOutcome:
    base = onsite_attempt(target=HOSTED.name, location="hosted", cost_usd=0.01, usage=Usage(100, 50))
    return replace(base, **changes)


def outcome(decision_id: str = "dec_1", *attempts: AttemptOutcome, **changes: Any) -> Outcome:
    made = Outcome(
        decision_id=decision_id,
        request_id=f"req_{decision_id}",
        received_at=NOW_AT,
        endpoint="chat",
        model="auto",
        key_id="key_1",
        route="everyday",
        policy_version="sha256:abc",
        residency="any",
        residency_reason="nothing binds it",
        profile=PROFILE,
        attempts=attempts or (onsite_attempt(),),
        excluded=(ExcludedTarget("acme/tiny", "context of 2,048 tokens is too short"),),
        status=200,
        error_code=None,
        stream=False,
        first_byte_seconds=0.1,
        total_seconds=0.5,
    )
    return replace(made, **changes)


def url_in(folder: Path) -> str:
    return sqlite_url(folder / "ledger.db")


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Let the loop run until what another thread does has been done; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await anyio.lowlevel.checkpoint()
