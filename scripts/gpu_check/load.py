"""Load on an engine, straight or through its node, and what it took: tokens, requests, seconds, joules."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp

from appliance.node.energy.account import compute_joules
from appliance.node.energy.meters import CPU_METER, MeterReading
from appliance.node.energy.sampler import EnergyMeters

_SAMPLE_SECONDS: Final = 1.0
_WORDS: Final = tuple(
    word
    for line in (
        "river winter engine garden paper signal harbour mirror copper lantern",
        "market bridge forest window letter station summer valley thread island",
    )
    for word in line.split()
)
LABELS: Final = ("billing", "delivery", "returns", "account", "technical", "praise", "complaint", "other")


@dataclass(frozen=True, slots=True)
class Door:
    """Where requests are sent: a unix socket with its key, or an address."""

    name: str
    base_url: str
    model: str
    socket: Path | None = None
    key: str = ""

    def session(self, connections: int) -> aiohttp.ClientSession:
        connector = (
            aiohttp.TCPConnector(limit=connections)
            if self.socket is None
            else aiohttp.UnixConnector(str(self.socket), limit=connections)
        )
        headers = {"x-appliance-residency": "onsite"} if self.socket is None else {}
        headers |= {"authorization": f"Bearer {self.key}"} if self.key else {}
        return aiohttp.ClientSession(connector=connector, headers=headers, timeout=aiohttp.ClientTimeout(total=600))


@dataclass(frozen=True, slots=True)
class Done:
    requests: int
    failed: int
    tokens: int
    seconds: float
    first_failure: str = ""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def requests_per_second(self) -> float:
        return (self.requests - self.failed) / self.seconds


def prompt(seed: int, words: int) -> str:
    """Text that no cache has seen: it begins with its number."""
    body = " ".join(_WORDS[(seed * 7 + index * index) % len(_WORDS)] for index in range(words))
    return f"{seed}: tell a long story about these words: {body}."


async def chats(door: Door, *, seed: int, requests: int, at_once: int, words: int, tokens: int, stream: bool) -> Done:
    """So many chats, `at_once` of them at any time."""
    bodies = [
        {
            "model": door.model,
            "messages": [{"role": "user", "content": prompt(seed * 100_000 + number, words)}],
            "max_tokens": tokens,
            "temperature": 0,
            **({"stream": True, "stream_options": {"include_usage": True}} if stream else {}),
        }
        for number in range(requests)
    ]
    return await _posted(door, "/v1/chat/completions", bodies, at_once)


async def decisions(door: Door, *, seed: int, requests: int, at_once: int, inputs: int = 1) -> Done:
    """Decisions among eight labels; `inputs` of them in each call. Tokens count the decisions."""
    question = {
        "type": "choice",
        "name": "topic",
        "instructions": "What is the customer's message about?",
        "choices": [{"value": value} for value in LABELS],
    }
    texts = [prompt(seed * 100_000 + number, 24) for number in range(requests * inputs)]
    if inputs == 1:
        bodies: list[dict[str, Any]] = [{"model": door.model, "input": text, "questions": [question]} for text in texts]
        return await _posted(door, "/v1/decisions", bodies, at_once)
    bodies = [
        {"model": door.model, "inputs": texts[start : start + inputs], "questions": [question]}
        for start in range(0, len(texts), inputs)
    ]
    return await _posted(door, "/v1/decisions/batch", bodies, at_once)


async def _posted(door: Door, path: str, bodies: Sequence[Mapping[str, Any]], at_once: int) -> Done:
    waiting = list(reversed(bodies))
    tokens, failures = 0, []
    async with door.session(at_once) as session:

        async def worker() -> None:
            nonlocal tokens
            while waiting:
                body = waiting.pop()
                try:
                    async with session.post(door.base_url + path, json=body) as response:
                        text = (await response.read()).decode()
                        if response.status != 200:
                            failures.append(f"HTTP {response.status}: {text[:300]}")
                            continue
                        tokens += _tokens(text, stream=bool(body.get("stream")))
                except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                    failures.append(repr(error))

        begun = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(at_once)))
        seconds = time.perf_counter() - begun
    return Done(len(bodies), len(failures), tokens, seconds, failures[0] if failures else "")


def _tokens(text: str, *, stream: bool) -> int:
    """Completion tokens of an answer; of decisions, which may have none, 0."""
    if not stream:
        usage = json.loads(text).get("usage") or {}
        return int(usage.get("completion_tokens") or 0)
    for line in reversed(text.splitlines()):
        if line.startswith("data: {") and '"usage"' in line:
            usage = json.loads(line[6:]).get("usage")
            if usage:
                return int(usage["completion_tokens"])
    raise ValueError(f"a stream without its usage: {text[-200:]!r}")


@dataclass(slots=True)
class Spent:
    """Joules by meter, while it was looked at; None: a meter that does not tell."""

    joules: dict[str, float | None]
    seconds: float = 0.0

    def watts(self, kind: str) -> float | None:
        """Of the GPUs or of the processors together."""
        found = [joules for meter, joules in self.joules.items() if (meter == CPU_METER) == (kind == "cpu")]
        known = [one for one in found if one is not None]
        return sum(known) / self.seconds if known and len(known) == len(found) and self.seconds else None


@contextlib.asynccontextmanager
async def metered(meters: EnergyMeters) -> AsyncIterator[Spent]:
    """What the meters count inside the block; read again and again for those that tell their power alone."""
    spent = Spent({})
    at, before = time.monotonic(), {one.meter: one for one in await asyncio.to_thread(meters.read)}
    begun = at

    async def look() -> None:
        nonlocal at, before
        now = time.monotonic()
        readings = {one.meter: one for one in await asyncio.to_thread(meters.read)}
        _add(spent, before, readings, now - at)
        at, before = now, readings

    async def keep_looking() -> None:
        while True:
            await asyncio.sleep(_SAMPLE_SECONDS)
            await look()

    looking = asyncio.create_task(keep_looking())
    try:
        yield spent
    finally:
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looking
        await look()
        spent.seconds = at - begun


def _add(spent: Spent, before: Mapping[str, MeterReading], now: Mapping[str, MeterReading], seconds: float) -> None:
    for meter, reading in now.items():
        counted = compute_joules(before[meter], reading, seconds) if meter in before else None
        known = spent.joules.get(meter, 0.0)
        spent.joules[meter] = None if counted is None or known is None else known + counted
