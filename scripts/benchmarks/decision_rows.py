"""Rows about decisions: many texts in one call, the floor, many labels, many questions, single requests."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from scripts.benchmarks.arena import Contender
from scripts.benchmarks.bench import LLAMA_CPP_SERVER, LLAMA_SERVER, OURS, SLOTS, SLOW_SHARE, VLLM, Bench
from scripts.benchmarks.clients import at_once, timed
from scripts.benchmarks.measuring import Series
from scripts.benchmarks.peers.base import Decided, Method
from scripts.benchmarks.peers.ours import engine_session, prefill_directly, score_directly
from scripts.benchmarks.peers.processes import Server
from scripts.benchmarks.workloads import QUESTIONS, Decisions

_TRIAL_TEXTS: Final = 16
_SHORT: Final = f"{OURS}, short layout"
_TRIAL_SECONDS: Final = 12.0
_TRIAL_SEED: Final = 9_001
"""Of the trial that counts: texts that no slot has seen."""


@dataclass(slots=True)
class _Told:
    """What the last run of a contender took, for figures that need more than a rate."""

    uncached_per_text: float = math.nan


def decider(
    name: str,
    server: Server,
    method: Method,
    make: Callable[[int, int], Decisions],
    texts: int,
    concurrency: int,
    share: float = 1.0,
    told: _Told | None = None,
) -> Contender:
    """Answers a second; every text must get one of the labels."""

    async def run(seed: int, part: float) -> float:
        work = make(max(2, round(texts * part)), seed)
        seconds, decided = await timed(method(server, work, concurrency))
        if len(decided.labels) != len(work.texts) or not set(decided.labels) <= set(work.labels):
            raise RuntimeError(f"{name} gave {len(decided.labels)} answers to {len(work.texts)} texts")
        if told is not None and part == 1.0:
            told.uncached_per_text = (decided.prompt_tokens - decided.cached_tokens) / len(work.texts)
        return len(work.texts) / seconds

    return Contender(name, run, share)


async def choose_their_way(bench: Bench, variants: Sequence[str]) -> None:
    """Try every variant and every way of llama-server on a few texts, and keep what is quickest."""
    best = 0.0
    for variant in variants:
        server = await bench.peer(LLAMA_SERVER, variant)
        if server is None:
            return
        for way, method in bench.arena.peers[LLAMA_SERVER].methods.items():
            contender = decider(f"{variant}, {way}", server, method, bench.works.decisions, _TRIAL_TEXTS, SLOTS)
            # The slots read the prefix first; what is too slow for that is not tried again.
            if await bench.arena.trial("trial", replace(contender, share=0.5), _TRIAL_SECONDS) is None:
                continue
            rate = await bench.arena.trial("trial", contender, _TRIAL_SECONDS, _TRIAL_SEED)
            if rate is None:
                continue
            bench.trials[f"llama-server, {variant}, {way}"] = rate
            bench.arena.say(f"trial: llama-server, {variant}, {way}: {rate:.1f} answers/s")
            if rate > best:
                best, bench.theirs, bench.way = rate, variant, way


async def decisions(bench: Bench) -> None:
    texts, make = bench.sizes.texts, bench.works.decisions
    contenders: list[Contender] = []
    told = _Told()
    mine = await bench.our_server("prefill")
    if mine:
        contenders.append(decider(OURS, mine, bench.method(OURS, "one call"), make, texts, 1, told=told))
        contenders.append(decider(_SHORT, mine, bench.method(OURS, "one call, short"), make, texts, 1))
        contenders += _behind_the_gateway(bench, mine)
    theirs = await bench.peer(LLAMA_SERVER, bench.theirs)
    if theirs:
        method = bench.method(LLAMA_SERVER, bench.way)
        contenders.append(decider(LLAMA_SERVER, theirs, method, make, texts, SLOTS))
    other = await bench.peer(LLAMA_CPP_SERVER, bench.theirs)
    if other:
        method = bench.method(LLAMA_CPP_SERVER, "grammar")
        contenders.append(decider(LLAMA_CPP_SERVER, other, method, make, texts, 1, SLOW_SHARE))
    found = await bench.arena.race("decisions", contenders)
    title = f"8 labels, {texts} texts in one call"
    how = f"llama-server: {bench.theirs}, {bench.way}; ours: {bench.ours['prefill'][0]}"
    bench.add("decisions", title, "answers/s", found, OURS, LLAMA_SERVER, 1.7, note=how)
    bench.add("decisions", f"{title}, short layout", "answers/s", found, _SHORT, LLAMA_SERVER, None, note=how)
    bench.add("decisions", title, "answers/s", found, OURS, LLAMA_CPP_SERVER, None, note="grammar, one at a time")
    _add_floor(bench, found, told)
    await bench.arena.stop(LLAMA_CPP_SERVER)


def _behind_the_gateway(bench: Bench, mine: Server) -> list[Contender]:
    """Ours at the engine's own socket: the same label scores, and prefill alone."""

    async def direct(server: Server, work: Decisions, concurrency: int) -> Decided:
        async with engine_session(mine) as engine:
            return await score_directly(engine, work)

    async def prefill(seed: int, part: float) -> float:
        prompts = bench.works.prefill(max(1, round(bench.sizes.prefill_prompts * part)), seed)
        async with engine_session(mine) as engine:
            seconds, _ = await timed(prefill_directly(engine, prompts))
        return sum(map(len, prompts)) / seconds

    name = "ours, engine alone"
    return [
        decider(name, mine, direct, bench.works.decisions, bench.sizes.texts, 1),
        Contender("ours, prefill tokens/s", prefill),
    ]


def _add_floor(bench: Bench, found: Mapping[str, Series], told: _Told) -> None:
    rates, prefill = found.get(OURS), found.get("ours, prefill tokens/s")
    shares: tuple[float, ...] = ()
    if rates and prefill:
        pairs = zip(rates.values, prefill.values, strict=False)
        shares = tuple(rate * told.uncached_per_text / tokens for rate, tokens in pairs)
    series = {**found, "share": Series("share", shares)}
    speed = prefill.median if prefill else math.nan
    note = f"{told.uncached_per_text:.1f} uncached tokens a text, prefill {speed:,.0f} tokens/s"
    bench.add("floor", "the same, share of prefill alone", "share", series, "share", None, 0.85, note=note)


async def singles(bench: Bench) -> None:
    texts, make = bench.sizes.texts, bench.works.decisions
    contenders: list[Contender] = []
    mine = await bench.our_server("prefill")
    if mine:
        contenders.append(decider(OURS, mine, bench.method(OURS, "single calls"), make, texts, 32))
    theirs = await bench.peer(VLLM, "bf16")
    ways = list(bench.arena.peers[VLLM].methods) if theirs else []
    for way in ways:
        assert theirs is not None
        contenders.append(decider(f"{VLLM}, {way}", theirs, bench.method(VLLM, way), make, texts, 32))
    found = await bench.arena.race("singles", contenders)
    known = [name for name in found if name.startswith(VLLM)]
    best = max(known, key=lambda name: found[name].median, default=VLLM)
    title = f"8 labels, {texts} single requests, 32 at once"
    bench.add("singles", title, "answers/s", found, OURS, best, 1.0, note=f"ours: {bench.ours['prefill'][0]}")


async def many_labels(bench: Bench) -> None:
    texts, make = bench.sizes.many_labels_texts, bench.works.many_labels
    contenders: list[Contender] = []
    told = _Told()
    mine = await bench.our_server("prefill")
    if mine:
        contenders.append(decider(OURS, mine, bench.method(OURS, "one call"), make, texts, 1, told=told))
    theirs = await bench.peer(LLAMA_SERVER, bench.theirs)
    way = await _quickest_with_many_labels(bench, theirs) if theirs else "-"
    if theirs and way:
        contenders.append(decider(LLAMA_SERVER, theirs, bench.method(LLAMA_SERVER, way), make, texts, SLOTS))
    found = await bench.arena.race("labels77", contenders)
    note = f"llama-server: {bench.theirs}, {way or 'no way in time'}; ours: {bench.ours['prefill'][0]}"
    note += f", {told.uncached_per_text:.1f} uncached tokens a text"
    bench.add("labels77", f"77 labels, {texts} texts", "answers/s", found, OURS, LLAMA_SERVER, 2.0, note=note)


async def _quickest_with_many_labels(bench: Bench, theirs: Server) -> str | None:
    best: tuple[float, str | None] = (0.0, None)
    for way, method in bench.arena.peers[LLAMA_SERVER].methods.items():
        # The slots read the long prefix once; that is not what is compared.
        contender = decider(way, theirs, method, bench.works.many_labels, SLOTS, SLOTS)
        if await bench.arena.trial("labels77", contender, 2 * _TRIAL_SECONDS) is None:
            continue
        rate = await bench.arena.trial("labels77", contender, _TRIAL_SECONDS, _TRIAL_SEED)
        if rate is not None:
            bench.trials[f"llama-server, 77 labels, {way}"] = rate
            best = max(best, (rate, way), key=lambda pair: pair[0])
    return best[1]


async def questions(bench: Bench) -> None:
    """Five questions about one text in one call, and in five calls at once: ours against ours."""
    mine = await bench.our_server("prefill")
    if mine is None:
        return
    server = mine

    async def ask(text: str, asked: Sequence[Mapping[str, Any]]) -> None:
        body = {"model": server.model, "input": text, "questions": list(asked)}
        reply = await server.post("/v1/decisions", body)
        if [answer["type"] for answer in reply["answers"]] != [question["type"] for question in asked]:
            raise RuntimeError(f"asked {len(asked)} questions, got {reply['answers']}")

    def contender(name: str, groups: Sequence[Sequence[Mapping[str, Any]]], seed_offset: int) -> Contender:
        async def run(seed: int, part: float) -> float:
            texts = bench.works.long_texts(max(1, round(bench.sizes.long_texts * part)), seed + seed_offset)
            began = time.perf_counter()
            for text in texts:
                await at_once(groups, len(groups), lambda group, text=text: ask(text, group))  # type: ignore[misc]
            return len(texts) * len(QUESTIONS) / (time.perf_counter() - began)

        return Contender(name, run)

    # Other texts for each, or the second would find them cached.
    pair = [contender(OURS, [QUESTIONS], 1_000), contender("ours, 5 calls", [[one] for one in QUESTIONS], 2_000)]
    found = await bench.arena.race("questions", pair)
    title = "5 questions about a 300-token text, one call against five"
    bench.add("questions", title, "answers/s", found, OURS, "ours, 5 calls", 3.0, note=bench.ours["prefill"][0])
