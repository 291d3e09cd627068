"""Rows about generated text: answers, documents, a stream beside long prompts; what the engine holds and takes."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import psutil

from appliance.node.models.gguf_header import build_gguf_spec, read_gguf_header
from scripts.benchmarks.arena import Contender
from scripts.benchmarks.bench import LLAMA_CPP_SERVER, LLAMA_SERVER, MANY_SLOTS, OURS, SLOTS, SLOW_SHARE, VLLM, Bench
from scripts.benchmarks.clients import Stream, generate, timed
from scripts.benchmarks.measuring import Series, gaps_within, percentile
from scripts.benchmarks.peers.ours import engine_session, load_of
from scripts.benchmarks.peers.processes import Server
from scripts.benchmarks.workloads import Chats

_TARGET_MEMORY_BYTES: Final = 150e6
_STEADY_EVENTS: Final = 12
"""A stream that has brought so many events runs."""


def generator(name: str, server: Server, bench: Bench, concurrency: int) -> Contender:
    """Tokens a second while `concurrency` chats are answered at once."""
    extra = bench.arena.peers[name].any_length

    async def run(seed: int, part: float) -> float:
        # Not fewer chats but shorter ones: the number at once is what is measured.
        tokens = max(4, round(bench.sizes.answer_tokens * part))
        chats = Chats(bench.works.chats(concurrency, seed).chats, tokens)
        seconds, generated = await timed(generate(server, chats, concurrency, extra))
        return generated / seconds

    return Contender(name, run)


async def generation(bench: Bench, concurrency: int) -> None:
    variant, _ = bench.ours["decode"]
    work = f"generation{concurrency}"
    contenders: list[Contender] = []
    mine = await bench.our_server("decode")
    if mine:
        contenders.append(generator(OURS, mine, bench, concurrency))
    theirs = await bench.peer(LLAMA_SERVER, variant, SLOTS if concurrency <= SLOTS else MANY_SLOTS)
    if theirs:
        contenders.append(generator(LLAMA_SERVER, theirs, bench, concurrency))
    other = await bench.peer(VLLM, "bf16")
    if other:
        contenders.append(generator(VLLM, other, bench, concurrency))
    slow = await bench.peer(LLAMA_CPP_SERVER, variant) if concurrency <= SLOTS else None
    if slow:
        contenders.append(generator(LLAMA_CPP_SERVER, slow, bench, 1))
    before = await _load(mine)
    found = await bench.arena.race(work, contenders)
    after = await _load(mine)
    title = f"free generation, {concurrency} at once, 156 in, {bench.sizes.answer_tokens} out"
    bench.add(work, title, "tokens/s", found, OURS, LLAMA_SERVER, 1.3, note=f"{variant} both")
    bench.add(work, title, "tokens/s", found, OURS, VLLM, 1.0, note=f"ours: {variant}")
    if concurrency <= SLOTS:
        bench.add(work, title, "tokens/s", found, OURS, LLAMA_CPP_SERVER, None, note=f"{variant} both, one at a time")
        await bench.arena.stop(LLAMA_CPP_SERVER)
    elif mine:
        _add_host_share(bench, before, after)
        await _add_memory(bench, mine)


async def _load(mine: Server | None) -> Mapping[str, Any]:
    if mine is None:
        return {}
    async with engine_session(mine) as engine:
        return await load_of(engine)


def _add_host_share(bench: Bench, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """What Python takes of the time of a step, by the engine's own counters."""
    names = ("host_seconds_total", "compute_seconds_total")
    if not all(name in after and name in before for name in names):
        bench.arena.failures.append("python: the engine's /load has no counters of its time")
        return
    host, compute = (after[name] - before[name] for name in names)
    steps = after["steps"] - before["steps"]
    series = {"python": Series("python", (host / (host + compute),) if host + compute else ())}
    note = f"{steps} steps, {1000 * (host + compute) / max(1, steps):.1f} ms each, prompts included"
    title = "Python's share of a step at 32 sequences"
    bench.add("python", title, "share", series, "python", None, 0.10, better="lower", note=note)


async def _add_memory(bench: Bench, mine: Server) -> None:
    """Resident memory of the engine after all that work, less its weights and KV cells."""
    path = bench.files[bench.ours["decode"][0]]
    spec = build_gguf_spec(read_gguf_header(path))
    load = await _load(mine)
    kv = 2 * load["kv_capacity_tokens"] * spec.layers * spec.kv_elements_per_token_per_layer
    resident = psutil.Process(mine.pids()[0]).memory_info().rss
    weights = path.stat().st_size
    series = {"memory": Series("memory", ((resident - weights - kv) / 1e6,))}
    note = f"resident {resident / 1e6:.0f}, weights {weights / 1e6:.0f}, KV {kv / 1e6:.0f} MB"
    title = "engine's memory over weights and KV"
    bound = _TARGET_MEMORY_BYTES / 1e6
    bench.add("memory", title, "MB", series, "memory", None, bound, better="lower", note=note)


# ---- documents and streams ----


async def receipts(bench: Bench) -> None:
    variant, _ = bench.ours["prefill"]
    valid: dict[str, list[float]] = {}

    def contender(name: str, server: Server, share: float = 1.0) -> Contender:
        async def run(seed: int, part: float) -> float:
            work = bench.works.receipts(max(1, round(bench.sizes.receipts * part)), seed)
            seconds, good = await timed(bench.arena.peers[name].extract(server, work, SLOTS))
            if seed:
                valid.setdefault(name, []).append(sum(good) / len(good))
            return len(good) / seconds

        return Contender(name, run, share)

    contenders = []
    for name, share in ((OURS, 1.0), (LLAMA_SERVER, 1.0), (VLLM, 1.0), (LLAMA_CPP_SERVER, SLOW_SHARE)):
        server = await (bench.our_server("prefill") if name == OURS else bench.peer(name, variant))
        if server:
            contenders.append(contender(name, server, share))
    found = await bench.arena.race("receipts", contenders)
    shares = {name: sum(values) / len(values) for name, values in valid.items()}
    title = "receipts, 273 in, 6 fields, 8 at once"
    for name, target in ((LLAMA_SERVER, 2.0), (VLLM, 1.3), (LLAMA_CPP_SERVER, None)):
        told = ", ".join(f"{one} {shares[one]:.0%}" for one in (OURS, name) if one in shares)
        note = f"valid: {told}; ours: {variant}"
        bench.add("receipts", title, "documents/s", found, OURS, name, target, note=note)
    mine = {"valid": Series("valid", (shares[OURS],) if OURS in shares else ())}
    bench.add("receipts", "receipts, ours: valid", "share", mine, "valid", None, 1.0)
    await bench.arena.stop(LLAMA_CPP_SERVER)


async def gaps(bench: Bench) -> None:
    variant, _ = bench.ours["decode"]
    contenders = []
    for name in (OURS, LLAMA_SERVER):
        server = await (bench.our_server("decode") if name == OURS else bench.peer(name, variant))
        if server:
            contenders.append(Contender(name, _gap_run(bench, name, server)))
    found = await bench.arena.race("gaps", contenders)
    title = f"a stream's p99 gap while {bench.sizes.arriving} prompts of 2,000 tokens arrive"
    how = f"{variant} both"
    bench.add("gaps", title, "ms", found, OURS, LLAMA_SERVER, 0.5, better="lower", note=how)


def _gap_run(bench: Bench, name: str, server: Server) -> Callable[[int, float], Awaitable[float]]:
    extra = bench.arena.peers[name].any_length

    async def run(seed: int, part: float) -> float:
        arriving = bench.works.arriving(max(1, round(bench.sizes.arriving * part)), seed)
        (messages,) = bench.works.chats(1, 5_000 + seed).chats
        stream = Stream()
        # Longer than the prompts can take; it is left when they are done.
        reading = asyncio.create_task(stream.read(server, messages, 3_500, _STEADY_EVENTS, extra))
        running = asyncio.create_task(stream.enough.wait())
        try:
            await asyncio.wait({reading, running}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
                raise RuntimeError(f"{name}: the stream ended before it ran")
            began = time.perf_counter()
            await generate(server, arriving, len(arriving.chats), extra)
            ended = time.perf_counter()
        finally:
            for task in (reading, running):
                task.cancel()
            await asyncio.gather(reading, running, return_exceptions=True)
        return 1_000 * percentile(gaps_within(stream.moments, began, ended), 0.99)

    return run
