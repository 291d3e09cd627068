"""What the gateway itself costs: ours and LiteLLM's proxy before the same stub, in alternating rounds.

The stub answers at once, so what is measured is the gateway: CPU of its process a request, latency added to asking the
stub directly (one connection), requests a second and p99 at 64 connections, CPU of a stream event, and memory. The node
runs as a user starts it, with everything on. Asked on-site (`onsite`), and as a hosted provider (`hosted`), where every
call's possible cost is on disk before it leaves.
"""

import argparse
import asyncio
import contextlib
import json
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from scripts.benchmarks.peers.installing import Environment, PeerMissing, installed
from scripts.benchmarks.peers.processes import free_port, serving
from tests.running import ROOT, running_node

LITELLM = Environment("litellm", ("litellm[proxy]==1.106.12",))
"""Pinned: a later release, 1.107.0, was compromised, and figures of two versions cannot be compared."""

EVENTS = 64
MESSAGES = [{"role": "user", "content": "Where is the Eiffel Tower? Answer in one short sentence, please."}]


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    url: str
    """Up to `/v1`."""
    model: str
    pid: int | None
    """The gateway's process; None for the stub itself."""
    key: str = "none"


@dataclass(frozen=True, slots=True)
class Round:
    """One contender's figures in one round."""

    p50_ms: float
    p99_ms: float
    cpu_ms: float
    per_second: float
    p99_at_64_ms: float
    event_cpu_us: float


def cpu_seconds(pid: int | None) -> float:
    if pid is None:
        return 0.0
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


async def ask(session: aiohttp.ClientSession, contender: Contender, *, stream: bool = False) -> float:
    """Seconds for one request, read to its end. Raises RuntimeError on anything but a whole answer."""
    body = {"model": contender.model, "messages": MESSAGES, "max_tokens": 64, "stream": stream}
    headers = {"authorization": f"Bearer {contender.key}"}
    began = time.perf_counter()
    async with session.post(f"{contender.url}/chat/completions", json=body, headers=headers) as response:
        text = await response.read()
        if response.status != 200 or (stream and not text.rstrip().endswith(b"[DONE]")):
            raise RuntimeError(f"{contender.name}: {response.status}: {text[-300:]!r}")
    return time.perf_counter() - began


async def crowd_of(session: aiohttp.ClientSession, contender: Contender, at_once: int, seconds: float) -> list[float]:
    """`at_once` callers, each asking again as soon as it is answered."""
    until = time.perf_counter() + seconds
    took: list[float] = []

    async def caller() -> None:
        while time.perf_counter() < until:
            took.append(await ask(session, contender))

    await asyncio.gather(*(caller() for _ in range(at_once)))
    return took


async def measure(contender: Contender, options: argparse.Namespace) -> Round:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await crowd_of(session, contender, 8, 0.5)
        before = cpu_seconds(contender.pid)
        alone = [await ask(session, contender) for _ in range(options.requests)]
        cpu_ms = 1000 * (cpu_seconds(contender.pid) - before) / options.requests
        began = time.perf_counter()
        crowd = await crowd_of(session, contender, 64, options.seconds)
        per_second = len(crowd) / (time.perf_counter() - began)
        before = cpu_seconds(contender.pid)
        for _ in range(options.streams):
            await ask(session, contender, stream=True)
        streamed = cpu_seconds(contender.pid) - before
    return Round(
        p50_ms=1000 * statistics.median(alone),
        p99_ms=1000 * percentile(alone, 0.99),
        cpu_ms=cpu_ms,
        per_second=per_second,
        p99_at_64_ms=1000 * percentile(crowd, 0.99),
        event_cpu_us=1e6 * streamed / options.streams / EVENTS,
    )


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@contextlib.asynccontextmanager
async def stub() -> AsyncIterator[str]:
    """A provider that answers at once; a process of its own. Its base URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "scripts.benchmarks.provider",
        "--words",
        str(EVENTS),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        yield (await process.stdout.readline()).decode().strip()
    finally:
        process.terminate()
        await process.wait()


@contextlib.contextmanager
def node(base_url: str) -> Iterator[list[Contender]]:
    """Ours before the stub, once as a server of the site and once as a hosted provider."""
    abilities = '["chat", "completions", "json_schema", "logprobs", "tools"]'
    rows = "".join(
        f"""
[[providers]]
name = "{name}"
location = "{location}"
base_url = "{base_url}"
models = [{{ name = "stub", input_usd = 0.0, output_usd = 0.0, abilities = {abilities} }}]
"""
        for name, location in (("near", "onsite"), ("far", "hosted"))
    )
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        shared = Path.home() / ".local/share/appliance/models"
        if shared.is_dir():
            (home / "models").symlink_to(shared)
        with running_node(home, config="[engine]\ncalibrate = false\n" + rows, seconds=300) as running:
            pid = running.process.pid
            yield [
                Contender("ours, on-site", f"{running.url}/v1", "near/stub", pid),
                Contender("ours, hosted", f"{running.url}/v1", "far/stub", pid),
            ]


@contextlib.asynccontextmanager
async def litellm(base_url: str) -> AsyncIterator[Contender]:
    """LiteLLM's proxy with one worker. Raises PeerMissing."""
    environment = installed(LITELLM, lambda text: print(text, file=sys.stderr))
    port, key = free_port(), f"sk-{secrets.token_hex(16)}"
    model = {"model": "openai/stub", "api_base": base_url, "api_key": "none"}
    config = {"model_list": [{"model_name": "stub", "litellm_params": model}]}

    def command(folder: Path) -> Sequence[str]:
        (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
        start = [str(environment.folder / "bin" / "litellm"), "--config", str(folder / "config.yaml")]
        return [*start, "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]

    async with serving(
        "litellm",
        command,
        address=lambda _: f"http://127.0.0.1:{port}",
        health="/health/liveliness",
        model="stub",
        seconds=180,
        environment={"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": key},
    ) as server:
        yield Contender("LiteLLM", f"http://127.0.0.1:{port}/v1", "stub", server.pids()[0], key)


async def run(options: argparse.Namespace) -> dict[str, Any]:
    async with contextlib.AsyncExitStack() as stack:
        base_url = await stack.enter_async_context(stub())
        direct = Contender("the stub itself", base_url, "stub", None)
        contenders = [direct, *stack.enter_context(node(base_url))]
        try:
            contenders.append(await stack.enter_async_context(litellm(base_url)))
        except PeerMissing as missing:
            print(missing, file=sys.stderr)
        rounds: dict[str, list[Round]] = {contender.name: [] for contender in contenders}
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            for contender in contenders:
                rounds[contender.name].append(await measure(contender, options))
        memory = {one.name: psutil.Process(one.pid).memory_info().rss / 1e6 for one in contenders if one.pid}
    return summary(rounds, memory)


def summary(rounds: dict[str, list[Round]], memory: dict[str, float]) -> dict[str, Any]:
    """Medians over the rounds; added latency is taken round by round against the stub in the same round."""
    base = rounds["the stub itself"]
    found: dict[str, Any] = {}
    for name, own in rounds.items():
        found[name] = {
            field: statistics.median(getattr(one, field) for one in own) for field in Round.__dataclass_fields__
        }
        found[name]["added_p50_ms"] = statistics.median(a.p50_ms - b.p50_ms for a, b in zip(own, base, strict=True))
        found[name]["added_p99_ms"] = statistics.median(a.p99_ms - b.p99_ms for a, b in zip(own, base, strict=True))
        found[name]["rss_mb"] = memory.get(name)
    return found


COLUMNS = {
    "cpu_ms": "CPU ms",
    "added_p50_ms": "added p50 ms",
    "added_p99_ms": "added p99 ms",
    "per_second": "requests/s at 64",
    "p99_at_64_ms": "p99 ms at 64",
    "event_cpu_us": "CPU us an event",
    "rss_mb": "MB",
}


def show(found: dict[str, Any]) -> None:
    print(f"{'':18}" + "".join(f"{title:>18}" for title in COLUMNS.values()))
    for name, row in found.items():
        cells = "".join(f"{row[field]:>18.2f}" if row[field] is not None else f"{'':>18}" for field in COLUMNS)
        print(f"{name:18}{cells}")
    if "LiteLLM" in found:
        ours, theirs = found["ours, on-site"], found["LiteLLM"]
        ratios = ("per_second", "cpu_ms", "added_p50_ms")
        print("ours against LiteLLM: " + ", ".join(f"{COLUMNS[one]} {ours[one] / theirs[one]:.2f} x" for one in ratios))


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench gateway", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=300, help="one after another, in each round")
    parser.add_argument("--seconds", type=float, default=4.0, help="of 64 connections, in each round")
    parser.add_argument("--streams", type=int, default=20, help=f"of {EVENTS} events, in each round")
    parser.add_argument("--json", type=Path, help="write the result there too")
    options = parser.parse_args()
    found = asyncio.run(run(options))
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
