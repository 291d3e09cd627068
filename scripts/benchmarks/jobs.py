"""Jobs in idle capacity: how fast they go, how busy the engine is, and what interactive traffic notices of them.

A node with the embedded model gets the same lines (decisions and extractions) one request after the other, several at
once, and as a batch of the Files and Batches API. Then chats arrive at random (Poisson, the same moments each time),
alone, beside a batch, and beside the same lines sent one by one, in turns. Reported: answers a second idle and loaded,
the engine's busy share while lines wait (its own count of seconds spent computing), calls of the engine that the lines
became, and the p50 and p95 of the chats' first token. With its defaults it takes less than four minutes.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import psutil

from scripts.benchmarks.clients import at_once
from scripts.benchmarks.measuring import percentile
from scripts.benchmarks.peers.processes import connect
from tests.running import RunningNode, running_node

TARGET_TIMES: Final = 1.5
TARGET_BUSY: Final = 0.95
TARGET_HARM: Final = 1.10
DECISIONS, EXTRACTIONS = "/v1/decisions", "/v1/extract"
_TOPICS: Final = ("billing", "delivery", "refund", "account", "technical", "login", "order", "other")
_WHO: Final = ("my sister", "our office", "the neighbour", "my manager", "a friend", "the driver")
_WHAT: Final = ("the blue lamp", "an invoice", "the parcel", "a password", "two chairs", "a booking")
_QUESTIONS: Final = [
    {
        "type": "choice",
        "name": "team",
        "instructions": "Which team of the shop should handle the message?",
        "choices": [{"value": topic} for topic in _TOPICS],
    }
]
_SCHEMA: Final = {
    "type": "object",
    "properties": {"customer": {"type": "string", "maxLength": 24}, "amount": {"type": "number"}},
    "required": ["customer", "amount"],
}


def texts(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Bodies that differ from run to run, or caches would answer."""
    chance = random.Random(f"{kind} {seed}")
    bodies: list[dict[str, Any]] = []
    for number in range(count):
        text = f"Message {seed}-{number}: {chance.choice(_WHO)} asked twice about {chance.choice(_WHAT)}"
        if kind == DECISIONS:
            bodies.append({"model": "auto", "input": f"{text}, what shall I do now?", "questions": _QUESTIONS})
        else:
            amount = chance.randrange(100, 99_999) / 100
            bodies.append(
                {
                    "model": "auto",
                    "text": f"{text}. Customer Ada. Paid {amount} EUR.",
                    "schema": _SCHEMA,
                    "max_tokens": 48,
                }
            )
    return bodies


@dataclass
class Bench:
    """One node, asked in several ways."""

    node: RunningNode
    http: aiohttp.ClientSession
    options: argparse.Namespace
    sent_singly: int = 0
    """Lines answered so far, of those that are sent one by one beside chats."""

    async def post(self, path: str, body: Mapping[str, Any]) -> None:
        async with self.http.post(self.node.url + path, json=body) as response:
            await response.read()
            if response.status not in (200, 502):  # an answer that does not match its schema is held back
                raise RuntimeError(f"{path}: {response.status}: {await response.text()}")

    async def sent(self, path: str, bodies: Sequence[Mapping[str, Any]], most: int) -> dict[str, float]:
        """Answers a second, and the engine's CPU seconds for each, which say more where others use the cores too."""
        began, cpu = time.perf_counter(), self.cpu_seconds()
        await at_once(bodies, most, lambda body: self.post(path, body))
        took, count = time.perf_counter() - began, len(bodies)
        return {"per_second": count / took, "cpu_seconds": (self.cpu_seconds() - cpu) / count}

    def cpu_seconds(self) -> float:
        times = psutil.Process(self.node.engine_pids()[0]).cpu_times()
        return float(times.user + times.system)

    async def start(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> str:
        rows = [
            {"custom_id": str(number), "method": "POST", "url": path, "body": body}
            for number, body in enumerate(bodies)
        ]
        form = aiohttp.FormData()
        form.add_field("purpose", "batch")
        form.add_field("file", "\n".join(map(json.dumps, rows)), filename="in.jsonl")
        async with self.http.post(f"{self.node.url}/v1/files", data=form) as response:
            file_id = (await response.json())["id"]
        asked = {"input_file_id": file_id, "endpoint": path, "completion_window": "24h"}
        async with self.http.post(f"{self.node.url}/v1/batches", json=asked) as response:
            name: str = (await response.json())["id"]
            return name

    async def batch(self, name: str) -> Mapping[str, Any]:
        async with self.http.get(f"{self.node.url}/v1/batches/{name}") as response:
            found: Mapping[str, Any] = await response.json()
            return found

    async def until(self, name: str, status: str) -> None:
        while (await self.batch(name))["status"] != status:  # noqa: ASYNC110 another process has no event to wait for
            await asyncio.sleep(0.05)

    async def cancel(self, name: str) -> None:
        async with self.http.post(f"{self.node.url}/v1/batches/{name}/cancel") as response:
            await response.read()

    async def job(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Answers a second from making the batch to its end, and how busy the engine was from first to last answer."""
        began, cpu = time.perf_counter(), self.cpu_seconds()
        name = await self.start(path, bodies)
        busy = await self.engine_seconds(), time.perf_counter()
        last = busy
        while (found := await self.batch(name))["status"] not in ("completed", "failed"):
            under_way = found["appliance"].get("under_way", 0)
            counts = found["request_counts"]
            if counts["total"] and counts["total"] - counts["completed"] - counts["failed"] > under_way:
                last = await self.engine_seconds(), time.perf_counter()
            await asyncio.sleep(0.1)
        took, cpu = time.perf_counter() - began, self.cpu_seconds() - cpu
        share = (last[0] - busy[0]) / (last[1] - busy[1]) if last[1] > busy[1] else float("nan")
        counts = found["request_counts"]
        return {
            "per_second": len(bodies) / took,
            "cpu_seconds": cpu / len(bodies),
            "seconds": took,
            "busy": share,
            "failed": counts["failed"],
            "engine_calls": await self.calls(found["output_file_id"]),
        }

    async def calls(self, file_id: str | None) -> int:
        """Calls that a batch's lines became: lines that were asked together share a decision, and its attempts."""
        if file_id is None:
            return 0
        async with self.http.get(f"{self.node.url}/v1/files/{file_id}/content") as response:
            rows = [json.loads(row) for row in (await response.text()).splitlines()]
        total = 0
        for decision in {row["response"]["decision_id"] for row in rows}:
            async with self.http.get(f"{self.node.url}/v1/explain/{decision}") as response:
                total += len((await response.json())["attempts"])
        return total

    async def engine_seconds(self) -> float:
        """What the engine has spent computing, by its own count."""
        command = psutil.Process(self.node.engine_pids()[0]).cmdline()
        async with connect(Path(command[command.index("--uds") + 1])) as engine, engine.get("/load") as response:
            return float((await response.json())["compute_seconds_total"])

    async def chats(self, seed: int) -> list[float]:
        """First-token seconds of chats that come at random moments, the same for the same seed."""
        chance, tasks = random.Random(seed), []
        ends = time.perf_counter() + self.options.seconds
        while time.perf_counter() < ends:
            tasks.append(asyncio.create_task(self.first_token(chance.random())))
            await asyncio.sleep(chance.expovariate(self.options.chats_per_second))
        return list(await asyncio.gather(*tasks))

    async def first_token(self, salt: float) -> float:
        content = f"{salt}: what would you say to {_WHO[int(salt * 6)]} about {_WHAT[int(salt * 36) % 6]}? " * 3
        messages = [{"role": "user", "content": content}]
        body = {"model": "auto", "messages": messages, "max_tokens": 24, "stream": True}
        began = time.perf_counter()
        async with self.http.post(f"{self.node.url}/v1/chat/completions", json=body) as response:
            first = None
            async for piece in response.content.iter_any():
                if first is None and b'"content"' in piece:
                    first = time.perf_counter() - began
            if response.status != 200 or first is None:
                raise RuntimeError(f"a chat was answered with {response.status}")
            return first


async def run(node: RunningNode, options: argparse.Namespace) -> dict[str, Any]:
    limits = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=limits, timeout=aiohttp.ClientTimeout(3600)) as http:
        bench = Bench(node, http, options)
        found: dict[str, Any] = {"options": {name: str(value) for name, value in vars(options).items()}}
        for kind, path, count in (
            ("decisions", DECISIONS, options.decisions),
            ("extractions", EXTRACTIONS, options.extractions),
        ):
            if not count:
                continue
            await bench.sent(path, texts(path, max(2, count // 20), 0), 4)
            alone = max(8, int(count * options.alone_share))
            one_by_one = await bench.sent(path, texts(path, alone, 1), 1)
            say(f"{kind}: one by one: {one_by_one['per_second']:.2f} answers/s")
            several = await bench.sent(path, texts(path, count, 2), options.at_once)
            say(f"{kind}: {options.at_once} at once: {several['per_second']:.2f} answers/s")
            job = await bench.job(path, texts(path, count, 3))
            say(f"{kind}: as a job: {job['per_second']:.2f} answers/s")
            found[kind] = {
                "lines": count,
                "one_by_one": one_by_one,
                "at_once": several,
                "job": job,
                "times_one_by_one": job["per_second"] / one_by_one["per_second"],
                "times_at_once": job["per_second"] / several["per_second"],
                "times_one_by_one_of_cpu": one_by_one["cpu_seconds"] / job["cpu_seconds"],
            }
        if options.seconds:
            found["interactive"] = await beside(bench)
        return found


async def beside(bench: Bench) -> dict[str, Any]:
    """Chats without and with a job, in turns; the jobs are long enough never to end by themselves."""
    options = bench.options
    without: list[float] = []
    with_job: list[float] = []
    with_single: list[float] = []
    answered, single, seconds, busy, single_seconds = 0, 0, 0.0, 0.0, 0.0
    for turn in range(options.turns):
        without += await bench.chats(turn)
        began, sending = time.perf_counter(), asyncio.create_task(one_by_one(bench, turn))
        with_single += await bench.chats(turn)
        sending.cancel()
        single_seconds += time.perf_counter() - began
        with contextlib.suppress(asyncio.CancelledError):
            await sending
        single += bench.sent_singly
        name = await bench.start(DECISIONS, texts(DECISIONS, options.background_lines, 100 + turn))
        await bench.until(name, "in_progress")
        began, before = time.perf_counter(), (await bench.batch(name))["request_counts"]["completed"]
        engine = await bench.engine_seconds()
        with_job += await bench.chats(turn)
        answered += (await bench.batch(name))["request_counts"]["completed"] - before
        busy += await bench.engine_seconds() - engine
        seconds += time.perf_counter() - began
        await bench.cancel(name)
        await bench.until(name, "cancelled")
    return {
        "chats": len(without),
        "without": _spread(without),
        "with": _spread(with_job),
        "p95_times": percentile(with_job, 0.95) / percentile(without, 0.95),
        "with_one_by_one": _spread(with_single),
        "job_per_second": answered / seconds,
        "job_busy": busy / seconds,
        "one_by_one_per_second": single / single_seconds,
        "times_one_by_one": answered / seconds / max(single / single_seconds, 1e-9),
    }


async def one_by_one(bench: Bench, turn: int) -> None:
    """The same lines without a job, each sent when the one before was answered, until cancelled."""
    bench.sent_singly = 0
    for body in texts(DECISIONS, bench.options.background_lines, 500 + turn):
        await bench.post(DECISIONS, body)
        bench.sent_singly += 1


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"p50_seconds": percentile(values, 0.5), "p95_seconds": percentile(values, 0.95)}


def show(found: Mapping[str, Any]) -> None:
    for kind in [kind for kind in ("decisions", "extractions") if kind in found]:
        row, job = found[kind], found[kind]["job"]
        print(
            f"{kind}: {row['lines']} lines: one by one {row['one_by_one']['per_second']:.1f}/s, "
            f"at once {row['at_once']['per_second']:.1f}/s, as a job {job['per_second']:.1f}/s "
            f"({row['times_one_by_one']:.2f} x one by one, target {TARGET_TIMES}; "
            f"of the engine's CPU time {row['times_one_by_one_of_cpu']:.2f} x); "
            f"engine busy {job['busy']:.0%} while lines wait (target {TARGET_BUSY:.0%}); {job['failed']} failed; "
            f"{row['lines']} lines were {job['engine_calls']} calls of the engine"
        )
    if "interactive" not in found:
        return
    row = found["interactive"]
    quiet, beside_job = row["without"], row["with"]
    print(
        f"{row['chats']} chats: first token p50 {quiet['p50_seconds'] * 1e3:.0f} ms, "
        f"p95 {quiet['p95_seconds'] * 1e3:.0f} ms; beside a job p50 {beside_job['p50_seconds'] * 1e3:.0f} ms, "
        f"p95 {beside_job['p95_seconds'] * 1e3:.0f} ms ({row['p95_times']:.2f} x, target {TARGET_HARM}); "
        f"the job got {row['job_per_second']:.1f} answers/s beside them, the engine {row['job_busy']:.0%} busy"
    )
    singly = row["with_one_by_one"]
    print(
        f"the same lines one by one beside chats: {row['one_by_one_per_second']:.1f} answers/s (the job "
        f"{row['times_one_by_one']:.2f} x that), chats' first token p95 {singly['p95_seconds'] * 1e3:.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench jobs", description=__doc__)
    parser.add_argument("--decisions", type=int, default=400, help="10000 for the full measurement")
    parser.add_argument("--extractions", type=int, default=24, help="1000 for the full measurement")
    parser.add_argument("--alone-share", type=float, default=0.25, help="of the lines that are sent one by one")
    parser.add_argument("--at-once", type=int, default=16, help="requests at once, as a client with threads would")
    parser.add_argument("--seconds", type=float, default=15.0, help="of chats, without and with a job, each turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--chats-per-second", type=float, default=1.0)
    parser.add_argument("--background-lines", type=int, default=20_000)
    parser.add_argument("--config", default="", help="TOML lines for the node, for example '[engine]'")
    parser.add_argument("--models", type=Path, default=Path.home() / ".local/share/appliance/models")
    parser.add_argument("--json", type=Path, help="write the result there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-jobs-") as folder:
        home = Path(folder)
        if options.models.is_dir():
            (home / "models").symlink_to(options.models)
        with running_node(home, config=options.config.replace("\\n", "\n"), seconds=600) as node:
            found = asyncio.run(run(node, options))
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
