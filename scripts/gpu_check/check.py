"""Checks a GPU machine for real: probe, plan, vLLM under the node, memory, speed, decisions, energy. One JSON report.

scripts/gpu-check is how it is started; appliance/docs/vllm.md says what to carry to a machine without a network.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import appliance
from appliance.catalog import load_catalog
from appliance.config import EngineModel, EngineSettings
from appliance.engines.base import Placement
from appliance.engines.vllm import InstalledVllm
from appliance.engines.vllm_metrics import VllmMetrics
from appliance.node.calibrate.gpu_memory_records import add_gpu_records, measure_overheads
from appliance.node.energy.sampler import EnergyMeters
from appliance.node.hardware.nvidia import Gpus, load_nvml, read_gpus
from appliance.node.hardware.probe import Hardware, probe_hardware
from appliance.node.models.candidates import list_candidates
from appliance.node.models.model_store import ModelStore
from appliance.node.plan.serving_plan import build_serving_plan
from appliance.node.supervise import orphans
from appliance.node.supervise.engine_process import KEY_FILE
from scripts.gpu_check import judge, load
from scripts.gpu_check.environment import vllm_of
from tests.running import RunningNode, running_node

NO_GPU_EXIT: Final = 3
_FORMAT: Final = 1
_IDLE_SECONDS: Final = 8.0
_START_SECONDS: Final = 900.0
_GIB: Final = 1 << 30
_WEIGHTS: Final = re.compile(r"Model loading took ([\d.]+) GiB")
_AVAILABLE: Final = re.compile(r"Available KV cache memory: ([\d.]+) GiB")
_CACHE_TOKENS: Final = re.compile(r"KV cache size: ([\d,]+) tokens")
_SHAPES: Final[Mapping[str, tuple[int, ...]]] = {
    # layers, hidden, intermediate, heads, KV heads: as Llama 3.2 1B and Llama 3.1 8B have them
    "1b": (16, 2048, 8192, 32, 8),
    "8b": (32, 4096, 14336, 32, 8),
}


@dataclass(slots=True)
class Check:
    """One run: what was asked for, and the report as it grows."""

    asked: argparse.Namespace
    scratch: Path
    report: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        print(f"gpu-check: {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A step that fails is in the report; those that need nothing of it go on."""
        self.say(name)
        begun = time.monotonic()
        try:
            yield
        except Exception as error:
            self.failures.append(f"{name}: {type(error).__name__}: {error}"[:2000])
            self.say(f"{name} failed: {error}")
        self.report.setdefault("seconds", {})[name] = round(time.monotonic() - begun, 1)


def main() -> int:
    asked = _arguments().parse_args()
    hardware = probe_hardware()
    if not hardware.gpus.devices and not asked.cpu:
        print(
            f"gpu-check: no GPU here: {hardware.gpus.reason}. Nothing was checked and nothing recorded. "
            "--cpu takes the same steps with vLLM's build for CPUs.",
            file=sys.stderr,
        )
        return NO_GPU_EXIT
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        check = Check(asked, Path(folder))
        _run(check, hardware)
        return _end(check)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--cpu", action="store_true", help="the same steps with vLLM's build for CPUs; nothing is recorded as a GPU's")
    add("--vllm", type=Path, metavar="FOLDER", help="an environment with vLLM; else the one that the node would use")
    add("--vllm-python", metavar="PYTHON", help="an interpreter that can import vLLM (PYTHONPATH counts)")
    add("--model", help="a catalogue name, or a folder with safetensors, config.json and tokenizer")
    add("--gguf", type=Path, help="a GGUF to write as safetensors first, with vLLM's own transformers")
    add("--random", choices=sorted(_SHAPES), help="random weights of this size, with the model's tokenizer")
    add("--data-dir", type=Path, help="where models lie and what was measured is remembered; else a temporary one")
    add("--option", action="append", default=[], metavar="OPTION", help="for vllm serve, as --option=--enforce-eager")
    add("--context", type=int, default=8192, help="the longest sequence, in tokens")
    add("--sequences", type=int, help="requests computed at once (64; on CPUs 4)")
    add("--requests", type=int, help="chats of one run (four times the sequences)")
    add("--tokens", type=int, help="written for each chat (128; on CPUs 24)")
    add("--runs", type=int, default=3, help="of each way, in turns")
    add("--out", type=Path, default=Path(), help="the report's file, or the folder for it")
    return parser


def _run(check: Check, hardware: Hardware) -> None:
    asked, report = check.asked, check.report
    asked.sequences = asked.sequences or (4 if asked.cpu else 64)
    asked.requests = asked.requests or 4 * asked.sequences
    asked.tokens = asked.tokens or (24 if asked.cpu else 128)
    report |= {
        "format": _FORMAT,
        "kind": "cpu" if asked.cpu else "gpu",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"appliance": appliance.__version__, "python": platform.python_version(), "revision": _revision()},
        "hardware": hardware.to_dict(),
    }
    with check.step("vLLM"):
        found = vllm_of(asked.vllm, asked.vllm_python, cpu=asked.cpu, scratch=check.scratch)
        if isinstance(found, str):
            raise RuntimeError(found)
        report["versions"] |= _versions(found, hardware.gpus)
        folder = _model(check, found)
    if check.failures:
        return
    with check.step("plan"):
        home = asked.data_dir or check.scratch / "data"
        engine = _engine(asked, found, folder)
        placement = _planned(hardware, engine, home, "vllm")
        report["plan"] = {
            "model": placement.model,
            "variant": placement.variant,
            "memory": dataclasses.asdict(placement.memory),
            "shape": dataclasses.asdict(placement.shape),
            "gpu": placement.gpu and dataclasses.asdict(placement.gpu),
            "reasons": placement.reasons,
        }
    if check.failures:
        return
    before = _gpus(hardware)
    with (
        check.step("node"),
        running_node(
            home, config=_config(asked, engine), environment={"APPLIANCE_HOME": str(home)}, seconds=_START_SECONDS
        ) as node,
    ):
        report["seconds_to_ready"] = round(node.seconds_to_ready, 1)
        _with_node(check, node, placement, before)


def _with_node(check: Check, node: RunningNode, placement: Placement, before: Gpus) -> None:
    asked, report = check.asked, check.report
    direct, through = _doors(node, placement)
    with check.step("memory"):
        report["memory"] = _memory(node, placement, before, direct, remembers=asked.data_dir is not None)
    meters = EnergyMeters.open(load_nvml())
    try:
        with check.step("idle power"):
            report["idle_watts"] = asyncio.run(_idle(meters))
        with check.step("throughput"):
            report["throughput"] = asyncio.run(_throughput(check, direct, through))
        with check.step("energy"):
            report["energy"] = asyncio.run(_energy(check, through, meters, node))
        with check.step("decisions"):
            report["decisions"] = asyncio.run(_decisions(check, through, meters))
    finally:
        meters.close()


def _end(check: Check) -> int:
    report, asked = check.report, check.asked
    made = judge.goals(report.get("memory", {}).get("rows", ()), report.get("throughput", {}))
    report["goals"] = [dataclasses.asdict(goal) for goal in made]
    report["failures"] = check.failures
    report["verdict"] = judge.verdict(made, check.failures)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    target: Path = asked.out / f"gpu-check-{report['kind']}-{stamp}.json" if asked.out.is_dir() else asked.out
    target.write_text(json.dumps(report, indent=1, default=_plain) + "\n", "utf-8")
    for goal in made:
        held = {True: "held", False: "MISSED", None: "not measured"}[goal.held]
        check.say(f"{goal.name} {goal.wanted:g}: {'-' if goal.found is None else f'{goal.found:.3f}'} ({held})")
    check.say(f"{report['verdict']}; the report is {target}")
    return 0 if report["verdict"] == "passed" else 1


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


# --- what is checked


def _model(check: Check, vllm: InstalledVllm) -> Path | None:
    """The folder of weights to serve, written first where they are to be made; None: a catalogue's."""
    asked = check.asked
    folder = Path(asked.model).expanduser() if asked.model and Path(asked.model).expanduser().is_dir() else None
    if asked.gguf is not None:
        check.say(f"writing {asked.gguf.name} as safetensors")
        folder = check.scratch / asked.gguf.stem
        _in_vllms_python(vllm, "scripts/benchmarks/peers/convert.py", asked.gguf.resolve(), folder)
    if asked.random is None:
        return folder
    if folder is None:
        raise RuntimeError("--random needs a tokenizer: name a folder with --model, or a --gguf")
    check.say(f"writing random weights of the size {asked.random}")
    target = check.scratch / f"random-{asked.random}"
    _in_vllms_python(vllm, "scripts/gpu_check/random_weights.py", target, *_SHAPES[asked.random], folder)
    return target


def _in_vllms_python(vllm: InstalledVllm, script: str, *arguments: object) -> None:
    done = subprocess.run(
        [vllm.python, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"{script} ended with {done.returncode}: {done.stderr.strip()[-800:]}")


def _engine(asked: argparse.Namespace, vllm: InstalledVllm, folder: Path | None) -> EngineSettings:
    name = str(folder) if folder is not None else (asked.model or "smollm2-135m-instruct")
    return EngineSettings(
        model=name,
        variant="bf16-safetensors" if folder is None and not asked.model else None,
        vllm=str(vllm.folder),
        vllm_options=tuple(asked.option),
        context_tokens=asked.context,
        sequences=asked.sequences,
    )


def _config(asked: argparse.Namespace, engine: EngineSettings) -> str:
    rows = [
        f"model = {json.dumps(engine.model)}",
        f"vllm = {json.dumps(engine.vllm)}",
        f"vllm_options = {json.dumps(list(engine.vllm_options))}",
        f"context_tokens = {engine.context_tokens}",
        f"sequences = {engine.sequences}",
        f"max_queued_requests = {max(16, asked.requests)}",
        f"start_seconds = {_START_SECONDS - 30:g}",
        *([f"variant = {json.dumps(engine.variant)}"] if engine.variant else []),
    ]
    return "[server]\ndrain_seconds = 60\n[engine]\n" + "\n".join(rows) + "\n"


def _planned(hardware: Hardware, engine: EngineSettings, home: Path, kind: str) -> Placement:
    """As `appliance serve` plans it."""
    catalog, store = load_catalog([home / "model_configs"]), ModelStore(home)
    asked = EngineModel(
        name=engine.model, variant=engine.variant, context_tokens=engine.context_tokens, sequences=engine.sequences
    )
    group = list_candidates(asked, catalog, store, has_gpus=bool(hardware.gpus.devices))
    found = build_serving_plan(hardware, [group], engine, {"vllm"})
    if not found.placements:
        raise RuntimeError("; ".join(one.reason for one in found.loaded.refusals) or f"{engine.model} has no variant")
    placement = found.placements[0]
    if placement.engine != kind:
        raise RuntimeError(f"{placement.model} would be served by {placement.engine}")
    return placement


def _doors(node: RunningNode, placement: Placement) -> tuple[load.Door, load.Door]:
    """The engine's own socket, and the node before it."""
    for pid in orphans.find_marked_processes(orphans.format_engine_mark(node.data_dir / "run")):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if "--uds" in words:
            socket = Path(words[words.index("--uds") + 1])
            key = (socket.parent / KEY_FILE).read_text()
            direct = load.Door("direct", "http://engine", placement.model, socket, key)
            return direct, load.Door("node", node.url, "auto")
    raise RuntimeError("the engine's socket is not found among the node's processes")


# --- what is measured


def _memory(
    node: RunningNode, placement: Placement, before: Gpus, direct: load.Door, *, remembers: bool
) -> Mapping[str, Any]:
    """What was planned against what vLLM tells and NVML counts."""
    log = (node.data_dir / "logs" / f"{placement.model}.log").read_text("utf-8", "replace")
    kv_tokens = asyncio.run(_kv_tokens(direct, placement)) or _number(_CACHE_TOKENS, log)
    weights = _number(_WEIGHTS, log)
    weights_bytes = None if weights is None else int(weights * _GIB)
    rows = [
        judge.compared("kv_tokens", placement.shape.context_tokens, kv_tokens),
        judge.compared("weights_bytes", placement.memory.weights_bytes, weights_bytes),
    ]
    told: dict[str, Any] = {"available_kv_gib": _number(_AVAILABLE, log)}
    if placement.gpu is not None:
        after = _gpus(probe_hardware())
        held = _held(placement, before, after)
        rows.append(judge.compared("held_bytes", placement.memory.total_bytes, held))
        found = None if weights_bytes is None else measure_overheads(placement, weights_bytes, before, after)
        if found is not None:
            other = placement.memory.buffers_bytes + placement.memory.program_bytes
            rows.append(judge.compared("other_bytes", other, found[1].other_bytes))
            if remembers:
                add_gpu_records(node.data_dir, [found])
    return {"rows": rows, **told}


def _held(placement: Placement, before: Gpus, after: Gpus) -> int | None:
    """The most that was taken of any of its devices."""
    assert placement.gpu is not None
    free = [{one.uuid or str(one.index): one.memory_free_bytes for one in gpus.devices} for gpus in (before, after)]
    taken = []
    for key in placement.gpu.devices:
        first, last = free[0].get(key), free[1].get(key)
        if first is None or last is None:
            return None
        taken.append(first - last)
    return max(taken)


async def _kv_tokens(direct: load.Door, placement: Placement) -> float | None:
    async with direct.session(1) as session, session.get(f"{direct.base_url}/metrics") as response:
        page = await response.text()
    found = VllmMetrics(placement.shape.sequences, 0).read(page, time.monotonic())
    return found.kv_capacity_tokens or None


async def _idle(meters: EnergyMeters) -> Mapping[str, float | None]:
    async with load.metered(meters) as spent:
        await asyncio.sleep(_IDLE_SECONDS)
    return {"gpu": spent.watts("gpu"), "cpu": spent.watts("cpu")}


async def _throughput(check: Check, direct: load.Door, through: load.Door) -> Mapping[str, Any]:
    """Whole and streamed chats, straight and through the node in turns, after a run each that does not count."""
    asked, found = check.asked, {}
    for stream in (False, True):
        way = "streamed" if stream else "whole"
        rates: dict[str, list[float]] = {direct.name: [], through.name: []}
        failed = 0
        for run in range(asked.runs + 1):
            order = (direct, through) if run % 2 else (through, direct)
            for place, door in enumerate(order):
                done = await load.chats(
                    door,
                    seed=1000 * stream + 10 * run + place,
                    requests=asked.requests if run else asked.sequences,
                    at_once=asked.sequences,
                    words=48,
                    tokens=asked.tokens,
                    stream=stream,
                )
                if done.failed:
                    failed += done.failed
                    check.failures.append(f"{done.failed} {way} chats failed, {door.name}: {done.first_failure}")
                if run:
                    rates[door.name].append(done.tokens_per_second)
        medians = {name: statistics.median(values) for name, values in rates.items()}
        # Of neighbouring runs, so that a change of the machine hits both alike.
        pairs = zip(rates[through.name], rates[direct.name], strict=True)
        shares = [ours / theirs for ours, theirs in pairs if theirs]
        share = statistics.median(shares) if shares else None
        check.say(f"{way}: {medians[direct.name]:,.0f} tokens/s direct, {medians[through.name]:,.0f} through the node")
        found[way] = {
            "tokens_per_second": rates,
            "medians": medians,
            "shares": shares,
            "share": share,
            "failed": failed,
        }
    return found


async def _energy(check: Check, through: load.Door, meters: EnergyMeters, node: RunningNode) -> Mapping[str, Any]:
    """Joules by our own reading of the meters, against what the node wrote into its ledger for the same requests."""
    asked = check.asked
    await asyncio.sleep(_IDLE_SECONDS)
    before = _report(node)
    async with load.metered(meters) as spent:
        done = await load.chats(
            through,
            seed=9000,
            requests=2 * asked.requests,
            at_once=asked.sequences,
            words=48,
            tokens=asked.tokens,
            stream=False,
        )
    after = _report(node)
    idle = check.report.get("idle_watts", {}).get("gpu")
    watts = spent.watts("gpu")
    extra = None if watts is None or idle is None else max(0.0, (watts - idle) * spent.seconds)
    ledger = after["energy_joules"] - before["energy_joules"]
    return {
        "watts": {"gpu": watts, "cpu": spent.watts("cpu")},
        "requests": done.requests - done.failed,
        "tokens": done.tokens,
        "tokens_per_second": done.tokens_per_second,
        "extra_joules": extra,
        "joules_per_request": None if extra is None else extra / max(1, done.requests - done.failed),
        "joules_per_token": None if extra is None else extra / max(1, done.tokens),
        "ledger_joules": ledger,
        "ledger_measured_joules": after["measured_joules"] - before["measured_joules"],
        "ledger_against_meters": None if not extra else ledger / extra,
    }


async def _decisions(check: Check, through: load.Door, meters: EnergyMeters) -> Mapping[str, Any]:
    asked, found = check.asked, {}
    ways: Mapping[str, Callable[[int], Any]] = {
        "single": lambda seed: load.decisions(through, seed=seed, requests=asked.requests, at_once=asked.sequences),
        "batch": lambda seed: load.decisions(
            through, seed=seed, requests=4, at_once=1, inputs=max(8, asked.requests // 2)
        ),
    }
    for number, (way, go) in enumerate(ways.items()):
        await go(20_000 + number)  # prefixes are read once
        async with load.metered(meters) as spent:
            done = await go(21_000 + number)
        if done.failed:
            check.failures.append(f"{done.failed} decisions failed, {way}: {done.first_failure}")
        many = 1 if way == "single" else max(8, asked.requests // 2)
        rate = done.requests_per_second * many
        watts = spent.watts("gpu")
        found[way] = {
            "decisions_per_second": rate,
            "gpu_watts": watts,
            "joules_per_decision": None if watts is None or not rate else watts / rate,
        }
        check.say(f"decisions, {way}: {rate:,.1f} a second")
    return found


# --- what is told


def _report(node: RunningNode) -> Mapping[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "appliance", "report", "--json", "--data-dir", str(node.data_dir)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: Mapping[str, Any] = json.loads(done.stdout)
    return found


def _gpus(hardware: Hardware) -> Gpus:
    return read_gpus(hardware.ram.total_bytes, hardware.ram.usable_bytes, load_nvml())


def _versions(vllm: InstalledVllm, gpus: Gpus) -> dict[str, Any]:
    asked = (
        "import importlib.metadata as m, json; "
        "print(json.dumps({n: m.version(n) for n in ('torch', 'transformers') if m.distribution(n)}))"
    )
    done = subprocess.run([vllm.python, "-c", asked], capture_output=True, text=True, check=False)
    found = json.loads(done.stdout) if done.returncode == 0 else {}
    return {"vllm": vllm.version, "driver": gpus.driver, "cuda": gpus.cuda, **found}


def _revision() -> str | None:
    """Of the tree, where it has one: a carried tree may have none."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


def _number(pattern: re.Pattern[str], log: str) -> float | None:
    found = pattern.findall(log)
    return float(found[-1].replace(",", "")) if found else None


if __name__ == "__main__":
    sys.exit(main())
