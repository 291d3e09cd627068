"""appliance probe and appliance plan: what this machine has, and what fits it."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from appliance.catalog import Catalog, load_catalog
from appliance.cli.output import bytes_text, guarded, say, say_json, stdout
from appliance.cli.places import ConfigOption, DataDirOption, JsonOption, data_dir_of
from appliance.config import Engine, load_config
from appliance.node.choice import wanted_file
from appliance.node.models import ModelStore
from appliance.node.planner import Plan, Wanted, plan
from appliance.node.probe import Hardware, probe


def probe_command(as_json: JsonOption = False) -> None:
    """Measure this machine: processors, memory and GPUs as this program may use them."""
    hardware = probe()
    if as_json:
        say_json(hardware.to_dict())
        return
    cpu, ram, gpus = hardware.cpu, hardware.ram, hardware.gpus
    say(f"cpu     {cpu.model} ({cpu.architecture})")
    say(f"        {cpu.usable_cores} usable cores: {cpu.usable_reason}")
    say(f"        {' '.join(sorted(cpu.flags)) or 'no instruction sets known'}")
    say(f"memory  {bytes_text(ram.usable_bytes)} usable: {ram.usable_reason}")
    say(f"gpus    {gpus.reason}")
    for gpu in gpus.devices:
        memory = gpu.memory_reason if gpu.memory_free_bytes is None else f"{bytes_text(gpu.memory_free_bytes)} free"
        total = "unknown" if gpu.memory_total_bytes is None else bytes_text(gpu.memory_total_bytes)
        say(f"        {gpu.index}: {gpu.name}, compute capability {gpu.compute_capability}, {total}, {memory}")


def plan_command(
    name: Annotated[str | None, typer.Argument(help="A catalogue name or a GGUF file; empty: everything.")] = None,
    config_path: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say for every model and variant whether it fits here, with what context and how many sequences, or why not."""
    config = guarded(lambda: load_config(config_path))
    catalog = guarded(load_catalog)
    store = ModelStore(data_dir_of(data_dir, config))
    hardware = probe()
    rows = [_verdict(hardware, wanted, config.engine) for wanted in _candidates(catalog, store, name)]
    if as_json:
        say_json({"fingerprint": hardware.fingerprint, "candidates": rows})
        return
    table = Table("model", "variant", "memory", "threads", "context", "sequences", "verdict", box=None, pad_edge=False)
    for row in rows:
        place: Any = row["placement"]
        if place is None:
            table.add_row(row["model"], row["variant"], "", "", "", "", row["refusal"])
        else:
            shape = place["shape"]
            cells = (bytes_text(place["memory_bytes"]), shape["threads"], shape["context_tokens"], shape["sequences"])
            table.add_row(row["model"], row["variant"], *map(str, cells), "fits")
    stdout.print(table)


def _verdict(hardware: Hardware, wanted: Wanted, engine: Engine) -> dict[str, Any]:
    """Each candidate is planned by itself: the question is what could run, not what runs together."""
    outcome: Plan = plan(hardware, [wanted], engine)
    placed = outcome.placements[0] if outcome.placements else None
    return {
        "model": wanted.model.name,
        "variant": wanted.variant.name,
        "here": wanted.path.exists(),
        "refusal": None if placed else outcome.refusals[0].reason,
        "placement": placed
        and {
            "engine": placed.engine,
            "memory_bytes": placed.memory.total_bytes,
            "memory": asdict(placed.memory),
            "shape": asdict(placed.shape),
            "reasons": placed.reasons,
        },
    }


def _candidates(catalog: Catalog, store: ModelStore, name: str | None) -> list[Wanted]:
    if name is not None and name.endswith(".gguf"):
        return [guarded(lambda: wanted_file(Path(name)))]
    models = catalog.models if name is None else (guarded(lambda: catalog.model(name)),)
    return [Wanted(model, one, store.path_of(model.name, one.name)) for model in models for one in model.variants]
