"""appliance probe and appliance plan: what this machine has, and what fits it, or one that is not at hand."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from appliance.catalog import Catalog, DevicePrior, load_device
from appliance.cli.options import ConfigOption, DataDirOption, JsonOption, load_node_catalog, resolve_data_dir
from appliance.cli.output import exit_on_error, format_bytes, say, say_json, stdout
from appliance.config import EngineModel, EngineSettings, load_config
from appliance.engines.base import Placement
from appliance.node.calibrate.gpu_memory_records import read_gpu_records
from appliance.node.hardware.gpu_devices import list_usable_devices
from appliance.node.hardware.nvidia import Gpu
from appliance.node.hardware.probe import Hardware, probe_hardware
from appliance.node.models.candidates import list_candidates
from appliance.node.models.model_store import ModelStore
from appliance.node.plan.gpu_fit import OverheadRecords
from appliance.node.plan.hypothetical_hardware import build_hypothetical_hardware
from appliance.node.plan.models import ModelCandidate, Plan
from appliance.node.plan.planner import plan_placements


def probe_command(as_json: JsonOption = False) -> None:
    """Measure this machine: processors, memory and GPUs as this program may use them."""
    hardware = probe_hardware()
    if as_json:
        say_json(hardware.to_dict())
        return
    cpu, ram, gpus = hardware.cpu, hardware.ram, hardware.gpus
    say(f"cpu     {cpu.model} ({cpu.architecture})")
    say(f"        {cpu.usable_cores} usable cores: {cpu.usable_reason}")
    say(f"        {' '.join(sorted(cpu.flags)) or 'no instruction sets known'}")
    for node in cpu.nodes if len(cpu.nodes) > 1 else ():
        say(f"        NUMA node {node.index}: {len(node.cpus)} CPUs, {format_bytes(node.memory_total_bytes)}")
    say(f"memory  {format_bytes(ram.usable_bytes)} usable: {ram.usable_reason}")
    say(f"gpus    {gpus.reason}{f'; driver {gpus.driver}, CUDA {gpus.cuda}' if gpus.driver else ''}")
    for gpu in gpus.devices:
        for line in _gpu_lines(gpu):
            say(f"        {line}")


def plan_command(
    name: Annotated[
        str | None, typer.Argument(help="A catalogue name, a GGUF file or a folder of safetensors; empty: everything.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--for", help="A machine that is not at hand: a file like hardware/gpu-h200.toml, or its name."),
    ] = None,
    gpus: Annotated[int, typer.Option(help="With --for: so many of these GPUs.", min=1, max=64)] = 1,
    cores: Annotated[int | None, typer.Option(help="With --for: physical cores.", min=1)] = None,
    memory_gib: Annotated[float | None, typer.Option(help="With --for: RAM, in GiB.", min=0.5)] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", help="Plan these together, as a node would serve them; repeat it.")
    ] = None,
    config_path: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say for every model and variant whether it fits, with what context and how many sequences, or why not.

    Each by itself, or with --model several together.
    """
    config = exit_on_error(lambda: load_config(config_path))
    home = resolve_data_dir(data_dir, config)
    catalog, store = load_node_catalog(home), ModelStore(home)
    hardware = probe_hardware()
    if device is not None:
        prior = exit_on_error(lambda: _prior(device, catalog))
        ram = None if memory_gib is None else int(memory_gib * (1 << 30))
        hardware = build_hypothetical_hardware(prior, gpus=gpus, cores=cores, memory_bytes=ram)
    has_gpus = bool(list_usable_devices(hardware)[0])
    names = models or ([name] if name is not None else [model.name for model in catalog.models])
    groups = [_candidates(one, catalog, store, has_gpus) for one in names]
    records = read_gpu_records(home)
    rows = (_together if models else _each)(hardware, groups, config.engine, records)
    if as_json:
        say_json({"fingerprint": hardware.fingerprint, "candidates": rows})
        return
    stdout.print(_table(rows))


def _candidates(name: str, catalog: Catalog, store: ModelStore, has_gpus: bool) -> tuple[ModelCandidate, ...]:
    return exit_on_error(lambda: list_candidates(EngineModel(name=name), catalog, store, has_gpus=has_gpus))


def _prior(name: str, catalog: Catalog) -> DevicePrior:
    return load_device(Path(name)) if name.endswith(".toml") else catalog.get_device(name)


def _each(
    hardware: Hardware, groups: list[tuple[ModelCandidate, ...]], engine: EngineSettings, records: OverheadRecords
) -> list[dict[str, Any]]:
    """Each variant by itself: the question is what could run, not what runs together."""
    rows = []
    for wanted in (one for group in groups for one in group):
        rows += _rows([wanted], plan_placements(hardware, [wanted], engine, records))
    return rows


def _together(
    hardware: Hardware, groups: list[tuple[ModelCandidate, ...]], engine: EngineSettings, records: OverheadRecords
) -> list[dict[str, Any]]:
    wanted = [one for group in groups for one in group]
    return _rows(wanted, plan_placements(hardware, wanted, engine, records))


def _rows(wanted: list[ModelCandidate], outcome: Plan) -> list[dict[str, Any]]:
    placed = {(one.model, one.variant): one for one in outcome.placements}
    refused = {(one.model, one.variant): one.reason for one in outcome.refusals}
    rows = []
    for one in wanted:
        key = one.model.name, one.variant.name
        placement = placed.get(key)
        rows.append(
            {
                "model": key[0],
                "variant": key[1],
                "here": one.path.exists(),
                "refusal": None if placement else refused[key],
                "placement": placement and _placement(placement),
            }
        )
    return rows


def _placement(placed: Placement) -> dict[str, Any]:
    return {
        "engine": placed.engine,
        "memory_bytes": placed.memory.total_bytes,
        "memory": asdict(placed.memory),
        "shape": asdict(placed.shape),
        "gpu": placed.gpu and asdict(placed.gpu),
        "settings": dict(placed.settings),
        "reasons": placed.reasons,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "model", "variant", "engine", "memory", "on", "context", "sequences", "verdict", box=None, pad_edge=False
    )
    for row in rows:
        place: Any = row["placement"]
        if place is None:
            table.add_row(row["model"], row["variant"], "", "", "", "", "", row["refusal"])
            continue
        shape, gpu = place["shape"], place["gpu"]
        on = f"{shape['threads']} threads" if gpu is None else _gpus_text(gpu)
        # Of a GPU engine the longest sequence says more than its cache; of llama.cpp both are one.
        context = shape["context_tokens" if gpu is None else "sequence_context_tokens"]
        cells = (place["engine"], format_bytes(place["memory_bytes"]), on, context, shape["sequences"], "fits")
        table.add_row(row["model"], row["variant"], *map(str, cells))
    return table


def _gpus_text(gpu: dict[str, Any]) -> str:
    size, copies = gpu["tensor_parallel"], gpu["data_parallel"]
    text = "1 GPU" if size == 1 else f"{size} GPUs"
    return text if copies == 1 else f"{copies} x {text}"


def _gpu_lines(gpu: Gpu) -> list[str]:
    memory = gpu.memory_reason if gpu.memory_free_bytes is None else f"{format_bytes(gpu.memory_free_bytes)} free"
    total = "unknown" if gpu.memory_total_bytes is None else format_bytes(gpu.memory_total_bytes)
    lines = [f"{gpu.index}: {gpu.name}, compute capability {gpu.compute_capability}, {total}, {memory}"]
    now = [
        f"{gpu.power_watts:.0f} W" if gpu.power_watts is not None else "",
        f"of {gpu.power_limit_watts:.0f} W" if gpu.power_limit_watts is not None else "",
        f"{gpu.utilisation:.0%} busy" if gpu.utilisation is not None else "",
        f"{gpu.temperature_celsius} C" if gpu.temperature_celsius is not None else "",
        f"{gpu.nvlinks} NVLinks" if gpu.nvlinks else "",
        f"held down by {', '.join(gpu.throttled)}" if gpu.throttled else "",
        f"{gpu.ecc_uncorrected_errors} uncorrected memory errors" if gpu.ecc_uncorrected_errors else "",
        f"{len(gpu.processes)} processes" if gpu.processes else "",
    ]
    told = ", ".join(filter(None, now))
    lines += [f"   {told}"] if told else []
    for part in gpu.mig_devices:
        free = "memory unknown" if part.memory_free_bytes is None else f"{format_bytes(part.memory_free_bytes)} free"
        lines.append(f"   part {part.index}: {part.name}, {free}")
    return lines
