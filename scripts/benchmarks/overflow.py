"""Mixed requests at a multiple of this machine's capacity, a share of them bound to the site.

A node with the embedded model and a stand-in provider (both real processes, reached over loopback) get an open stream
of requests: chats, decisions and extractions, arriving at random (Poisson, fixed seed). The capacity is measured first,
with the same mix kept on-site. Reported: what each kind got, time to first byte against the route's budget, where it
was answered, and whether the ledger, the provider's own count and the promise (no bound request leaves) agree.
"""

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from scripts.benchmarks import replay as replay_trace
from scripts.benchmarks.traces import FILES
from tests.running import ROOT, RunningNode, running_node

BUDGET_SECONDS = 2.0
POLICY = f"""\
[defaults]
latency_budget_seconds = {BUDGET_SECONDS}
max_wait_seconds = 120.0

[[routes]]
name = "complex"
match = {{ complexity_at_least = 0.7 }}
targets = ["hosted", "onsite"]

[[routes]]
name = "whole-answers"
match = {{ endpoint = ["decisions", "extract"] }}
targets = ["onsite", "hosted"]
answer_budget_seconds = {BUDGET_SECONDS}

[[routes]]
name = "rest"
targets = ["onsite", "hosted"]
"""
TOPICS = ["a refund that has not arrived", "a parcel left with the neighbour", "a login that fails", "a price change"]
QUESTIONS = [
    {
        "type": "choice",
        "name": "topic",
        "instructions": "What is the message about?",
        "choices": [{"value": value} for value in ("refund", "delivery", "login", "price")],
    }
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "amount": {"type": "number"}},
    "required": ["name", "amount"],
}


@dataclass(frozen=True)
class Work:
    kind: str
    path: str
    body: dict[str, Any]
    bound: bool


@dataclass(frozen=True)
class Result:
    work: Work
    status: int
    first_byte_seconds: float
    total_seconds: float
    location: str
    complete: bool
    """A stream ended with [DONE]; a whole answer was parsed."""


def make_work(count: int, bound_share: float, randomness: random.Random, *, pin: str = "auto") -> list[Work]:
    """The mix: 45 % chats (streamed), 30 % decisions, 15 % extractions, 10 % chats that need a larger model."""
    made = []
    for number in range(count):
        topic = randomness.choice(TOPICS)
        text = f"Message {number}: I write about {topic}. " + "It has been going on for a while. " * randomness.randint(
            1, 8
        )
        kind = randomness.choices(("chat", "decision", "extraction", "complex"), (45, 30, 15, 10))[0]
        bound = randomness.random() < bound_share
        if kind in ("chat", "complex"):
            ask = (
                "Prove step by step, with every lemma, that this is consistent:"
                if kind == "complex"
                else "Answer kindly:"
            )
            messages = [{"role": "user", "content": f"{ask} {text}"}]
            limit = randomness.randint(24, 96)
            body: dict[str, Any] = {"messages": messages, "max_tokens": limit, "temperature": 0.7, "stream": True}
            path = "chat/completions"
        elif kind == "decision":
            path, body = "decisions", {"input": text, "questions": QUESTIONS}
        else:
            path, body = "extract", {"text": f"{text} Signed: Ann Lee, 12.50 EUR.", "schema": SCHEMA}
        made.append(Work(kind, path, {"model": pin, **body}, bound))
    return made


async def send(session: aiohttp.ClientSession, work: Work) -> Result:
    headers = {"x-appliance-residency": "onsite"} if work.bound else {}
    began = time.monotonic()
    try:
        async with session.post(f"/v1/{work.path}", json=work.body, headers=headers) as response:
            first, whole = None, b""
            async for piece in response.content.iter_any():
                first = first or time.monotonic()
                whole += piece
            location = response.headers.get("x-appliance-location", "none")
            streamed = work.body.get("stream") and response.status == 200
            complete = whole.endswith(b"data: [DONE]\n\n") if streamed else bool(json.loads(whole))
            ended = time.monotonic()
            return Result(work, response.status, (first or ended) - began, ended - began, location, complete)
    except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError):
        return Result(work, 0, time.monotonic() - began, time.monotonic() - began, "none", False)


async def measure_capacity(session: aiohttp.ClientSession, model: str, count: int, at_once: int) -> float:
    """Requests a second of the mix when the engine always has work, everything answered on-site."""
    waiting = iter(make_work(count, 1.0, random.Random(7), pin=model))
    began = time.monotonic()

    async def worker() -> None:
        for work in waiting:
            result = await send(session, work)
            if result.status not in (200, 502):  # 502: the model's answer did not pass verification
                raise SystemExit(f"a request failed while the capacity was measured: {result}")

    await asyncio.gather(*(worker() for _ in range(at_once)))
    return count / (time.monotonic() - began)


async def replay(session: aiohttp.ClientSession, works: Sequence[Work], per_second: float) -> list[Result]:
    """Send `works` at random moments, `per_second` on average, whatever the node makes of them."""
    randomness = random.Random(11)
    async with asyncio.TaskGroup() as group:
        tasks = []
        due = time.monotonic()
        for work in works:
            due += randomness.expovariate(per_second)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(group.create_task(send(session, work)))
    return [task.result() for task in tasks]


@contextlib.contextmanager
def stand_in(seconds_per_token: float) -> Iterator[str]:
    """The stand-in provider as a process of its own; its base URL."""
    command = [sys.executable, "-m", "scripts.benchmarks.provider", "--seconds-per-token", str(seconds_per_token)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def provider_config(base_url: str) -> str:
    return f"""\
[[providers]]
name = "standin"
base_url = "{base_url}"
models = [{{ name = "large", input_usd = 2.0, output_usd = 8.0, \
abilities = ["chat", "completions", "json_schema", "logprobs", "tools", "decisions"] }}]
"""


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    answered = [result for result in results if result.status == 200 and result.complete]
    firsts = [result.first_byte_seconds for result in answered]
    return {
        "requests": len(results),
        "answered": len(answered),
        "refused_busy": sum(result.status == 429 for result in results),
        "rejected": sum(result.status == 502 for result in results),
        "lost": sum(
            result.status not in (200, 429) or (result.status == 200 and not result.complete) for result in results
        ),
        "onsite": sum(result.location == "onsite" for result in answered),
        "hosted": sum(result.location == "hosted" for result in answered),
        "first_byte_p50_seconds": percentile(firsts, 0.50),
        "first_byte_p95_seconds": percentile(firsts, 0.95),
        "first_byte_p99_seconds": percentile(firsts, 0.99),
        "within_budget": sum(first <= BUDGET_SECONDS for first in firsts) / max(1, len(results)),
    }


def report_of(node: RunningNode) -> dict[str, Any]:
    command = [sys.executable, "-m", "appliance", "report", "--json", "--data-dir", str(node.data_dir)]
    found: dict[str, Any] = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    return found


async def run(node: RunningNode, provider: str, options: argparse.Namespace) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(node.url, timeout=timeout, connector=connector) as session:
        async with session.get("/v1/models") as response:
            names = [row["id"] for row in (await response.json())["data"]]
        model = next(name for name in names if name.startswith("onsite/"))
        capacity = await measure_capacity(session, model, options.warmup, options.at_once)
        before = await counts(session, provider)
        works = make_work(options.requests, options.bound_share, random.Random(3))
        began = time.monotonic()
        results = await replay(session, works, capacity * options.times_capacity)
        seconds = time.monotonic() - began
        after = await counts(session, provider)
    bound = [result for result in results if result.work.bound]
    unbound = [result for result in results if not result.work.bound]
    kinds = sorted({result.work.kind for result in results})
    return {
        "capacity_per_second": capacity,
        "offered_per_second": options.requests / seconds,
        "seconds": seconds,
        "budget_seconds": BUDGET_SECONDS,
        "bound": summarise(bound),
        "unbound": summarise(unbound),
        "unbound_by_kind": {kind: summarise([one for one in unbound if one.work.kind == kind]) for kind in kinds},
        "bound_answered_hosted": sum(result.location == "hosted" for result in bound),
        "provider_calls": after["calls"] - before["calls"],
        "provider_usd": after["usd"],
        "ledger": {key: value for key, value in report_of(node).items() if key != "targets"},
        "ledger_hosted_usd": sum(row["cost_usd"] for row in report_of(node)["targets"] if row["location"] == "hosted"),
    }


async def counts(session: aiohttp.ClientSession, provider: str) -> dict[str, Any]:
    async with session.get(provider.removesuffix("/v1") + "/counts") as response:
        found: dict[str, Any] = await response.json()
        return found


def show(found: dict[str, Any]) -> None:
    print(
        f"capacity {found['capacity_per_second']:.2f} requests/s on-site, offered {found['offered_per_second']:.2f}/s"
    )
    columns = ("requests", "answered", "refused_busy", "rejected", "lost", "onsite", "hosted")
    times = ("first_byte_p50_seconds", "first_byte_p95_seconds", "first_byte_p99_seconds", "within_budget")
    print(f"{'':18}" + "".join(f"{name:>13}" for name in (*columns, "p50 s", "p95 s", "p99 s", "in budget")))
    rows = [("bound", found["bound"]), ("unbound", found["unbound"])]
    rows += [(f"  {kind}", row) for kind, row in found["unbound_by_kind"].items()]
    for name, row in rows:
        cells = [f"{row[column]:>13}" for column in columns] + [f"{row[column]:>13.3f}" for column in times]
        print(f"{name:18}" + "".join(cells))
    print(f"bound requests answered by the provider: {found['bound_answered_hosted']}")
    print(
        f"cost of hosted calls: ledger {found['ledger_hosted_usd']:.6f} USD, provider {found['provider_usd']:.6f} USD"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench overflow", description=__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--times-capacity", type=float, default=3.0)
    parser.add_argument("--bound-share", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=120, help="requests for measuring the capacity")
    parser.add_argument("--at-once", type=int, default=16, help="requests at once while measuring the capacity")
    parser.add_argument("--seconds-per-token", type=float, default=0.01, help="of the stand-in provider")
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--trace", choices=sorted(FILES), help="replay recorded traffic, beside a static limit")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/load", help="folder of the traces")
    parser.add_argument("--seconds", type=float, default=40.0, help="how long each replay of a trace lasts")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="latency budget of a replay")
    parser.add_argument("--slots", type=int, help="the static limit; else as many as the engine has sequences")
    parser.add_argument("--mean-prompt-tokens", type=int, help="a trace is scaled to this; else by speed")
    options = parser.parse_args()
    policy = POLICY if options.trace is None else replay_trace.POLICY.format(budget=options.budget)
    with tempfile.TemporaryDirectory() as folder, stand_in(options.seconds_per_token) as provider:
        home = Path(folder)
        shared = Path.home() / ".local/share/appliance/models"
        if shared.is_dir():
            (home / "models").symlink_to(shared)
        with running_node(home, config=provider_config(provider), policy=policy, seconds=600) as node:
            if options.trace is not None:
                replayed = asyncio.run(replay_trace.run(node, provider, options))
                replay_trace.show(replayed)
                replay_trace.save(replayed, options.json)
                if replayed["node"]["bound_left"] or replayed["node"]["unbound_lost"]:
                    raise SystemExit("a promise was broken: see above")
                return
            found = asyncio.run(run(node, provider, options))
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    if found["bound_answered_hosted"] or found["unbound"]["lost"]:
        raise SystemExit("a promise was broken: see above")


if __name__ == "__main__":
    main()
