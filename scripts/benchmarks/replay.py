"""A recorded trace at a multiple of this machine's capacity: our node against a static limit of parallel requests.

One node with the embedded model and a stand-in provider, both real processes. Three phases: the trace kept on-site with
the engine always full (capacity, tokens/s); the trace at N times that rate with the node deciding; the same again with
the caller deciding by a static limit, as gateways do that count parallel requests: fewer than the limit on-site are
sent there, all others are hosted. In both a share is bound to the site.
"""

import argparse
import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from scripts.benchmarks.traces import Recorded, chat_body, due_times, read_trace
from tests.running import RunningNode

POLICY = """\
[defaults]
latency_budget_seconds = {budget}
max_wait_seconds = 120.0

[[routes]]
name = "all"
targets = ["onsite", "hosted"]
"""
_EDGE = 0.15
"""Share of a phase at its beginning and end that does not count for rates: the engine fills and empties then."""


@dataclass(frozen=True)
class Answered:
    is_bound: bool
    status: int
    first_byte_seconds: float
    location: str
    is_whole: bool
    completion_tokens: int


@dataclass(frozen=True)
class Done:
    """What the engine has computed up to a moment."""

    at: float
    prefill_tokens: int
    decode_tokens: int


class Engine:
    """The node's engine, asked for its counters on its own socket."""

    def __init__(self, node: RunningNode) -> None:
        (self._socket,) = (node.data_dir / "run").rglob("*.sock")

    @asynccontextmanager
    async def counting(self) -> AsyncIterator[list[Done]]:
        """A growing list of its counters, read five times a second."""
        seen: list[Done] = []
        connector = aiohttp.UnixConnector(str(self._socket))
        async with aiohttp.ClientSession("http://engine", connector=connector) as session:
            task = asyncio.create_task(self._count(session, seen))
            try:
                yield seen
            finally:
                task.cancel()
                await asyncio.wait({task})

    async def _count(self, session: aiohttp.ClientSession, seen: list[Done]) -> None:
        while True:
            load = await self.load(session)
            seen.append(Done(time.monotonic(), load["prefill_tokens_total"], load["decode_tokens_total"]))
            await asyncio.sleep(0.2)

    @staticmethod
    async def load(session: aiohttp.ClientSession) -> dict[str, Any]:
        async with session.get("/load") as response:
            found: dict[str, Any] = await response.json()
            return found

    async def now(self) -> dict[str, Any]:
        connector = aiohttp.UnixConnector(str(self._socket))
        async with aiohttp.ClientSession("http://engine", connector=connector) as session:
            return await self.load(session)


async def send(session: aiohttp.ClientSession, body: dict[str, Any], *, is_bound: bool) -> Answered:
    headers = {"x-appliance-residency": "onsite"} if is_bound else {}
    began = time.monotonic()
    first, whole, status, location = None, b"", 0, "none"
    try:
        async with session.post("/v1/chat/completions", json=body, headers=headers) as response:
            status, location = response.status, response.headers.get("x-appliance-location", "none")
            async for piece in response.content.iter_any():
                first = first or time.monotonic()
                whole += piece
    except (aiohttp.ClientError, TimeoutError):
        status = 0
    is_whole = status == 200 and whole.endswith(b"data: [DONE]\n\n")
    return Answered(is_bound, status, (first or time.monotonic()) - began, location, is_whole, _completion(whole))


def _completion(whole: bytes) -> int:
    at = whole.rfind(b'"completion_tokens":')
    return int(whole[at + 20 :].split(b",")[0].split(b"}")[0]) if at >= 0 else 0


Choose = Callable[[bool], str]
"""Whether it is bound -> the model to ask for."""


async def saturate(
    session: aiohttp.ClientSession, bodies: Sequence[dict[str, Any]], model: str, at_once: int, seconds: float
) -> float:
    """Requests a second with the engine always full: those that ended in the window, without its beginning."""
    waiting, began = itertools.cycle(bodies), time.monotonic()
    first, last = began + 0.25 * seconds, began + seconds
    ended: list[float] = []

    async def worker() -> None:
        while time.monotonic() < last:
            answered = await send(session, {**next(waiting), "model": model}, is_bound=True)
            if not answered.is_whole:
                raise SystemExit(f"a request failed while the capacity was measured: {answered}")
            ended.append(time.monotonic())

    workers = [asyncio.create_task(worker()) for _ in range(at_once)]
    await asyncio.sleep(seconds)
    rate = sum(first <= at <= last for at in ended) / (last - first)
    for one in workers:  # what is under way is of no use any more
        one.cancel()
    await asyncio.wait(workers)
    for one in workers:
        if not one.cancelled():
            one.result()
    return rate


async def replay(
    session: aiohttp.ClientSession,
    bodies: Sequence[dict[str, Any]],
    due: Sequence[float],
    bound: Sequence[bool],
    choose: Choose,
    ended: Callable[[str], None] = lambda model: None,
) -> list[Answered]:
    """Send each when it is due, whatever becomes of those before it."""

    async def one(body: dict[str, Any], is_bound: bool) -> Answered:
        model = choose(is_bound)
        try:
            return await send(session, {**body, "model": model}, is_bound=is_bound)
        finally:
            ended(model)

    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for body, at, is_bound in zip(bodies, due, bound, strict=True):
            await asyncio.sleep(max(0.0, began + at - time.monotonic()))
            tasks.append(group.create_task(one(body, is_bound)))
    return [task.result() for task in tasks]


class StaticLimit:
    """So many at once on-site, the others hosted; nothing is known of how long anything takes."""

    def __init__(self, local: str, hosted: str, limit: int) -> None:
        self._local, self._hosted, self._limit = local, hosted, limit
        self._running = 0

    def choose(self, is_bound: bool) -> str:
        if not is_bound and self._running >= self._limit:
            return self._hosted
        self._running += 1
        return self._local

    def ended(self, model: str) -> None:
        self._running -= model == self._local


def rates(seen: Sequence[Done]) -> tuple[float, float]:
    """Prompt and output tokens a second that the engine computed, without the edges of the phase."""
    begin, end = seen[0].at, seen[-1].at
    inner = [one for one in seen if begin + _EDGE * (end - begin) <= one.at <= end - _EDGE * (end - begin)]
    seconds = inner[-1].at - inner[0].at
    prefill = inner[-1].prefill_tokens - inner[0].prefill_tokens
    return prefill / seconds, (inner[-1].decode_tokens - inner[0].decode_tokens) / seconds


def summary(answers: Sequence[Answered], budget: float) -> dict[str, Any]:
    unbound = [one for one in answers if not one.is_bound]
    bound = [one for one in answers if one.is_bound]
    firsts = sorted(one.first_byte_seconds for one in unbound if one.is_whole)
    waits = sorted(one.first_byte_seconds for one in bound if one.is_whole)
    return {
        "requests": len(answers),
        "in_budget": sum(one.is_whole and one.first_byte_seconds <= budget for one in unbound) / max(1, len(unbound)),
        "first_byte_p50_seconds": _at(firsts, 0.5),
        "first_byte_p95_seconds": _at(firsts, 0.95),
        "first_byte_p99_seconds": _at(firsts, 0.99),
        "onsite_share": sum(one.location == "onsite" and one.is_whole for one in answers) / len(answers),
        "unbound_lost": sum(not one.is_whole for one in unbound),
        "bound": len(bound),
        "bound_left": sum(one.location == "hosted" for one in bound),
        "bound_refused_429": sum(one.status == 429 for one in bound),
        "bound_lost": sum(not one.is_whole and one.status != 429 for one in bound),
        "bound_first_byte_p95_seconds": _at(waits, 0.95),
    }


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


async def run(node: RunningNode, provider: str, options: argparse.Namespace) -> dict[str, Any]:
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(node.url, connector=connector, timeout=timeout) as session:
        local, hosted = await _models(session)
        engine = Engine(node)
        load = await engine.now()
        sequences = load["sequences_capacity"]
        trace = read_trace(options.trace, options.data, 4000, options.mean_prompt_tokens or _mean_prompt(load, options))
        async with engine.counting() as seen:
            bodies = _bodies(trace[:400], 1)
            capacity = await saturate(session, bodies, local, 2 * sequences, options.seconds * 0.6)
        full = rates(seen)
        count = min(len(trace), max(20, int(options.seconds * capacity * options.times_capacity)))
        found: dict[str, Any] = {
            "trace": options.trace,
            "capacity_per_second": capacity,
            "offered_per_second": capacity * options.times_capacity,
            "saturated_prompt_tokens_per_second": full[0],
            "saturated_output_tokens_per_second": full[1],
            "sequences": sequences,
            "mean_prompt_tokens": sum(one.prompt_tokens for one in trace) / len(trace),
            "mean_output_tokens": sum(one.output_tokens for one in trace) / len(trace),
            "budget_seconds": options.budget,
        }
        limit = StaticLimit(local, hosted, options.slots or sequences)
        ways: list[tuple[str, Choose, Callable[[str], None]]] = [
            ("node", lambda is_bound: "auto", lambda model: None),
            ("static", limit.choose, limit.ended),
        ]
        for name, choose, ended in ways:
            found[name] = await _phase(session, engine, provider, trace[:count], capacity, full, options, choose, ended)
    return found


def _mean_prompt(load: dict[str, Any], options: argparse.Namespace) -> int:
    """So long that this machine reads several within the budget, as the trace's own machines did."""
    return int(min(1000, max(32, load["prefill_tokens_per_second"] * options.budget / 8)))


async def _phase(
    session: aiohttp.ClientSession,
    engine: Engine,
    provider: str,
    trace: Sequence[Recorded],
    capacity: float,
    full: tuple[float, float],
    options: argparse.Namespace,
    choose: Choose,
    ended: Callable[[str], None],
) -> dict[str, Any]:
    randomness = random.Random(3)
    bodies, bound = _bodies(trace, 2), [randomness.random() < options.bound_share for _ in trace]
    due = due_times(trace, capacity * options.times_capacity)
    before = await _counts(session, provider)
    async with engine.counting() as seen:
        task = asyncio.create_task(replay(session, bodies, due, bound, choose, ended))
        await asyncio.wait({task}, timeout=due[-1])
        during = list(seen)
        answers = await task
    after, prompt_output = await _counts(session, provider), rates(during)
    return {
        **summary(answers, options.budget),
        "hosted_usd": after["usd"] - before["usd"],
        "prompt_tokens_per_second": prompt_output[0],
        "output_tokens_per_second": prompt_output[1],
        "of_saturated": _work(prompt_output, full, await engine.now()),
    }


def _work(done: tuple[float, float], full: tuple[float, float], load: dict[str, Any]) -> float:
    """Work done as a share of what the full engine does, whatever the mix of reading and writing: each token counts by
    the time that the engine says it takes."""
    prefill: float = load["prefill_tokens_per_second"]
    decode: float = max(load["decode_tokens_per_second"].values())
    return (done[0] / prefill + done[1] / decode) / (full[0] / prefill + full[1] / decode)


def _bodies(trace: Sequence[Recorded], seed: int) -> list[dict[str, Any]]:
    randomness = random.Random(seed)
    return [chat_body(recorded, randomness) for recorded in trace]


async def _models(session: aiohttp.ClientSession) -> tuple[str, str]:
    async with session.get("/v1/models") as response:
        names = [row["id"] for row in (await response.json())["data"]]
    return next(name for name in names if name.startswith("onsite/")), next(
        n for n in names if n.startswith("standin/")
    )


async def _counts(session: aiohttp.ClientSession, provider: str) -> dict[str, Any]:
    async with session.get(provider.removesuffix("/v1") + "/counts") as response:
        found: dict[str, Any] = await response.json()
        return found


def show(found: dict[str, Any]) -> None:
    print(
        f"{found['trace']}: {found['mean_prompt_tokens']:.0f} tokens in and up to {found['mean_output_tokens']:.0f} "
        f"out on average; capacity {found['capacity_per_second']:.2f} requests/s on-site, "
        f"offered {found['offered_per_second']:.2f}/s; the full engine reads "
        f"{found['saturated_prompt_tokens_per_second']:.0f} and writes "
        f"{found['saturated_output_tokens_per_second']:.0f} tokens/s in {found['sequences']} sequences"
    )
    rows = (
        ("unbound in budget", "in_budget", "{:.1%}"),
        ("first byte p50 s", "first_byte_p50_seconds", "{:.2f}"),
        ("first byte p95 s", "first_byte_p95_seconds", "{:.2f}"),
        ("first byte p99 s", "first_byte_p99_seconds", "{:.2f}"),
        ("unbound lost", "unbound_lost", "{}"),
        ("answered on-site", "onsite_share", "{:.1%}"),
        ("prompt tokens/s", "prompt_tokens_per_second", "{:.0f}"),
        ("output tokens/s", "output_tokens_per_second", "{:.0f}"),
        ("of the full engine", "of_saturated", "{:.1%}"),
        ("hosted USD", "hosted_usd", "{:.4f}"),
        ("bound requests", "bound", "{}"),
        ("bound that left", "bound_left", "{}"),
        ("bound told to wait", "bound_refused_429", "{}"),
        ("bound lost", "bound_lost", "{}"),
        ("bound p95 s", "bound_first_byte_p95_seconds", "{:.2f}"),
    )
    print(f"{'':20}{'the node decides':>18}{'static limit':>18}")
    for title, field, form in rows:
        print(f"{title:20}{form.format(found['node'][field]):>18}{form.format(found['static'][field]):>18}")


def save(found: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1))
