"""The CPU engine against what people would run instead: same weights, same machine, taking turns, all over HTTP.

Every server is started and stopped here; the peers are installed on demand into the user's cache. Wanted: an idle
machine. Rows: decisions (with the floor), labels77, questions, singles, receipts, gaps, generation8, generation32 (with
memory and Python's share).
"""

import argparse
import asyncio
import importlib.metadata
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from appliance.cli.models.calibrate import first_start
from appliance.config import EngineSettings
from appliance.node.hardware.probe import probe_hardware
from appliance.node.models.candidates import read_gguf_candidate
from appliance.node.models.model_store import ModelStore
from scripts.benchmarks.arena import FAILURES, Arena
from scripts.benchmarks.bench import QUICK, Bench, Kind, Sizes
from scripts.benchmarks.decision_rows import choose_their_way
from scripts.benchmarks.measuring import Result, shown
from scripts.benchmarks.peers.base import Peer
from scripts.benchmarks.peers.installing import PeerMissing, peers_folder
from scripts.benchmarks.peers.llama_cpp_server import LlamaCppServer
from scripts.benchmarks.peers.llama_server import LlamaServer
from scripts.benchmarks.peers.ours import Ours
from scripts.benchmarks.peers.variants import SOURCE_VARIANT, VARIANTS, source_model, variant_file
from scripts.benchmarks.peers.vllm_cpu import VllmCpu
from scripts.benchmarks.rows import ROWS
from scripts.benchmarks.tokens import Tokens
from scripts.benchmarks.workloads import Workloads, data_folder

PEERS = ("ours", "llama-server", "llama_cpp.server", "vllm-cpu")
_TRIED = {"decisions", "labels77"}
"""Rows for which llama-server's best variant and way are looked for."""

console = Console(stderr=True, highlight=False)


def product_choice(source: Path) -> dict[Kind, tuple[str, int]]:
    """Variant and threads for each kind of work, as a node chooses at its first start; measured once, remembered."""
    home = peers_folder() / "node"
    hardware, store, model = probe_hardware(), ModelStore(home), read_gguf_candidate(source)
    chosen: dict[Kind, tuple[str, int]] = {}
    kinds: tuple[Kind, ...] = ("prefill", "decode")
    for kind in kinds:
        config = EngineSettings(workload=kind)
        best = first_start(model, config, home, hardware, store)[0][0]
        # The source's own variant is called after its file.
        variant = best.variant.name if best.variant.name in VARIANTS else SOURCE_VARIANT
        chosen[kind] = (variant, best.threads or hardware.cpu.usable_cores)
        console.print(f"ours: for {kind} {variant} with {chosen[kind][1]} threads. {best.reason or ''}")
    return chosen


def make_peers(wanted: Sequence[str], source: Path) -> dict[str, Peer]:
    made: dict[str, Peer] = {}
    for name in wanted:
        if name == "ours":
            made[name] = Ours()
        elif name == "llama-server":
            made[name] = LlamaServer()
        elif name == "llama_cpp.server":
            made[name] = LlamaCppServer()
        else:
            made[name] = VllmCpu(source)
    return made


def install(peers: dict[str, Peer], arena: Arena) -> None:
    """Before anything is measured: building keeps the machine busy."""
    for name, peer in peers.items():
        try:
            peer.prepare(arena.say)
        except PeerMissing as error:
            arena.missing[name] = str(error)
            arena.say(f"{name} is left out: {error}")


def prepare(options: argparse.Namespace) -> Bench:
    source = source_model(options.model)
    peers = make_peers(options.peers, source)
    arena = Arena(peers, console.print, options.runs, options.budget_seconds)
    install(peers, arena)
    files = {variant: variant_file(source, variant, arena.say) for variant in VARIANTS}
    works = Workloads(Tokens(source), data_folder())
    if options.ours_variant:
        ours: dict[Kind, tuple[str, int]] = {
            "prefill": (options.ours_variant, options.threads),
            "decode": (options.ours_variant, options.threads),
        }
    else:
        ours = product_choice(source)
    theirs = options.theirs_variant or ours["prefill"][0]
    sizes = QUICK if options.quick else Sizes()
    arena.began = time.monotonic()  # what was installed and calibrated first does not count
    return Bench(arena, works, sizes, files, ours, options.threads, theirs, options.quick)


async def run(bench: Bench, options: argparse.Namespace) -> None:
    loop, main = asyncio.get_running_loop(), asyncio.current_task()
    assert main is not None
    loop.add_signal_handler(signal.SIGTERM, main.cancel)  # servers must not outlive a run that is told to stop
    try:
        if "llama-server" in bench.arena.peers and _TRIED & set(options.only):
            variants = [options.theirs_variant] if options.theirs_variant else list(VARIANTS)
            await choose_their_way(bench, variants)
        for name in options.only:
            bench.arena.say(f"[bold]{name}[/bold] (after {time.monotonic() - bench.arena.began:.0f} s)")
            try:
                await ROWS[name](bench)
            except FAILURES as error:
                bench.arena.failures.append(f"{name}: {error!r}"[:400])
                bench.arena.say(bench.arena.failures[-1])
    finally:
        await bench.arena.aclose()


def table_of(results: Sequence[Result]) -> Table:
    table = Table("work", "unit", "ours", "against", "theirs", "ratio", "target", "", box=None, pad_edge=False)
    for one in results:
        verdict = {True: "[green]met[/green]", False: "[red]missed[/red]", None: ""}[one.passed]
        bound = "" if one.target is None else f"{'≥' if one.better == 'higher' else '≤'} {shown(one.target)}"
        name = one.theirs.name if one.theirs else ""
        theirs = str(one.theirs) if one.theirs else ""
        figure = shown(one.ratio) + (" x" if one.theirs and not math.isnan(one.ratio) else "")
        table.add_row(one.title, one.unit, str(one.ours), name, theirs, figure, bound, verdict)
        if one.note:
            table.add_row(f"[dim]  {one.note}[/dim]")
    return table


def as_json(bench: Bench, machine: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "work": one.work,
            "title": one.title,
            "unit": one.unit,
            "ours": one.ours.values,
            "against": one.theirs.name if one.theirs else None,
            "theirs": one.theirs.values if one.theirs else None,
            "ratio": None if math.isnan(one.ratio) else one.ratio,
            "target": one.target,
            "better": one.better,
            "met": one.passed,
            "note": one.note,
            "details": one.details,
        }
        for one in bench.results
    ]
    return {
        "machine": machine,
        "seconds": time.monotonic() - bench.arena.began,
        "texts": bench.works.source,
        "ours": {kind: {"variant": choice[0], "threads": choice[1]} for kind, choice in bench.ours.items()},
        "llama_server": {"variant": bench.theirs, "way": bench.way},
        "trials": bench.trials,
        "rows": rows,
        "missing": bench.arena.missing,
        "failures": bench.arena.failures,
    }


def machine_now() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "load_average": os.getloadavg(),
        "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
    }


def words(known: Sequence[str], text: str) -> list[str]:
    """The words of a list like "a,b", in the order in which they are known."""
    given = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in given if word not in known]
    if unknown or not given:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'} is not among {', '.join(known)}")
    return [word for word in known if word in given]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench engine", description=__doc__)
    parser.add_argument("--only", type=lambda text: words(tuple(ROWS), text), default=list(ROWS), help="some rows: a,b")
    parser.add_argument("--peers", type=lambda text: words(PEERS, text), default=list(PEERS), help=",".join(PEERS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one small run of each: shows that it works, not how fast")
    parser.add_argument("--model", type=Path, help="GGUF that all variants are made from; default: the embedded model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ours-variant", choices=VARIANTS, help="default: what the product's calibration chooses")
    parser.add_argument("--theirs-variant", choices=VARIANTS, help="llama-server's; default: its best in a short trial")
    parser.add_argument("--budget-seconds", type=float, default=1_100.0, help="near it, rows get one run each")
    parser.add_argument("--json", type=Path, help="write everything there too")
    options = parser.parse_args(arguments)
    if options.quick:
        options.runs = 1
        options.ours_variant = options.ours_variant or "bf16"
        options.theirs_variant = options.theirs_variant or options.ours_variant
    return options


def main() -> None:
    options = parse()
    machine = machine_now()
    bench = prepare(options)
    console.print(f"load average at the start: {os.getloadavg()[0]:.2f}; {bench.works.source}")
    try:
        asyncio.run(run(bench, options))
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("stopped; what was measured until now follows")
    Console(width=200).print(table_of(bench.results))
    for name, reason in bench.arena.missing.items():
        print(f"not here: {name}: {reason}")
    for failure in bench.arena.failures:
        print(f"failed: {failure}")
    load = machine["load_average"][0]
    seconds = time.monotonic() - bench.arena.began
    print(f"load average {load:.2f} when it began; {seconds:.0f} s; {bench.works.source}")
    if load > 0.5:
        print("The machine was not idle: these figures say little.")
    if options.json:
        options.json.write_text(json.dumps(as_json(bench, machine), indent=1))


if __name__ == "__main__":
    main()
