"""appliance serve: from nothing to a running node, saying at each step what is happening."""

import json
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from appliance.catalog import Catalog, EngineKind
from appliance.cli.models.calibrate import first_start
from appliance.cli.models.models import pull_with_progress
from appliance.cli.options import ConfigOption, DataDirOption, load_node_catalog, resolve_data_dir
from appliance.cli.output import exit_on_error, fail, format_bytes, say, stderr
from appliance.config import EngineSettings, NodeConfig, load_config
from appliance.engines.base import Placement
from appliance.errors import ApplianceError
from appliance.node.calibrate.calibration import Calibration
from appliance.node.calibrate.gpu_memory_records import read_gpu_records
from appliance.node.hardware.gpu_devices import list_usable_devices
from appliance.node.hardware.probe import Hardware, probe_hardware
from appliance.node.models.candidates import list_candidates, select_candidate
from appliance.node.models.model_store import ModelStore
from appliance.node.plan.models import ModelCandidate, Plan
from appliance.node.plan.planner import plan_placements
from appliance.node.plan.recommendation import recommend_model
from appliance.node.plan.serving_plan import build_serving_plan
from appliance.node.vllm.environments import load_vllm_adapters
from appliance.serve import NodeSpec, RunningNode, build_node_spec, check_can_start, serve_node


def serve_command(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; beyond loopback, API keys are needed.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65_535)] = None,
    config_path: ConfigOption = None,
    data_dir: DataDirOption = None,
    model: Annotated[str | None, typer.Option(help="A catalogue name, or the path of a GGUF file.")] = None,
    no_calibrate: Annotated[
        bool, typer.Option("--no-calibrate", help="Measure nothing at a first start; what was measured before counts.")
    ] = False,
) -> None:
    """Run a node: pull the model if it is not here, start the engine, serve the API until stopped."""
    started = time.monotonic()
    config = _with_options(exit_on_error(lambda: load_config(config_path)), host, port, model)
    home = resolve_data_dir(data_dir, config)
    catalog, store, hardware = load_node_catalog(home), ModelStore(home), probe_hardware()
    engines: set[EngineKind] = {
        "llamacpp",
        "encoder",
        *exit_on_error(lambda: load_vllm_adapters(config.engine, home, os.environ)),
    }
    has_gpus = "vllm" in engines and bool(list_usable_devices(hardware)[0])

    def check(placements: tuple[Placement, ...]) -> None:
        """What can be told at once is told before a model is pulled and measured."""
        exit_on_error(lambda: build_node_spec(config, home, placements))
        exit_on_error(lambda: check_can_start(config, home))

    if _is_a_line_up(config.engine, has_gpus):
        serving = _line_up(config.engine, check, catalog, store, hardware, engines, has_gpus, home)
    else:
        engine = config.engine.model_copy(update={"calibrate": False}) if no_calibrate else config.engine
        serving = _one_model(engine, check, catalog, store, hardware, home)

    def read() -> NodeSpec:
        now = _with_options(load_config(config_path), host, port, model)
        return build_node_spec(now, home, serving.placements, serving.pools)

    site = exit_on_error(read)

    def announce(running: RunningNode) -> None:
        first, seconds = serving.placements[0], time.monotonic() - started
        say(_ready_message(running, first, serving.parameters, home, seconds, serving.why, serving.others))
        say(serving.advice)
        say("Stop it with Ctrl-C.")

    try:
        uvloop.run(serve_node(site, read, announce))
    except ApplianceError as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


_Check = Callable[[tuple[Placement, ...]], None]


@dataclass(frozen=True, slots=True)
class _Serving:
    """What is about to be served, and what to say of it. `placements[0]` is told first."""

    placements: tuple[Placement, ...]
    pools: Mapping[str, int] | None
    parameters: int
    why: str = ""
    others: tuple[str, ...] = ()
    advice: str = ""


def _is_a_line_up(engine: EngineSettings, has_gpus: bool) -> bool:
    """Several models, or one that was named and that may need more than a GGUF on the processor. The embedded one,
    which nobody named, needs no GPU."""
    if engine.models:
        return True
    is_named = "model" in engine.model_fields_set
    return is_named and (has_gpus or (Path(engine.model).expanduser() / "config.json").is_file())


def _one_model(
    engine: EngineSettings, check: _Check, catalog: Catalog, store: ModelStore, hardware: Hardware, home: Path
) -> _Serving:
    """One model on the processor, in the variant that was measured to be quickest."""
    chosen = exit_on_error(lambda: select_candidate(engine, catalog, store))
    placements = plan_placements(hardware, [chosen], engine).placements
    if placements:
        check(placements)
    _pull(store, chosen)
    measured, calibration = first_start(chosen, engine, home, hardware, store)
    outcome = plan_placements(hardware, measured, engine)
    if not outcome.placements:
        fail(f"{chosen.model.name} cannot be served here: {outcome.refusals[0].reason}")
    advice = _advice(catalog, hardware, chosen, calibration)
    return _Serving(outcome.placements, None, chosen.model.parameters, _why(outcome, measured), advice=advice)


def _line_up(
    engine: EngineSettings,
    check: _Check,
    catalog: Catalog,
    store: ModelStore,
    hardware: Hardware,
    engines: Collection[EngineKind],
    has_gpus: bool,
    home: Path,
) -> _Serving:
    """Several models, or one with GPUs at hand: planned together, pulled where they are not here."""
    groups = [
        exit_on_error(lambda requested=requested: list_candidates(requested, catalog, store, has_gpus=has_gpus))  # type: ignore[misc]
        for requested in engine.wanted_models
    ]
    found = build_serving_plan(hardware, groups, engine, engines, read_gpu_records(home))
    for refusal in found.missing:
        stderr.print(f"{refusal.model} cannot be served here: {refusal.reason}")
    if not found.placements:
        fail("no model can be served here: `appliance plan` says what would fit")
    check(found.placements)
    for item in found.items.values():
        _pull(store, item)
    first, *rest = found.placements
    others = [f"{one.model}, variant {one.variant}: {_engine_of(one)}" for one in rest if one not in found.on_demand]
    others += [f"{one.model}, variant {one.variant}: loaded when it is wanted" for one in found.on_demand]
    parameters = found.items[first.model].model.parameters
    return _Serving(found.placements, found.pools, parameters, others=tuple(others))


def _pull(store: ModelStore, item: ModelCandidate) -> None:
    if not item.path.exists():
        stderr.print(f"pulling {item.model.name} ({item.variant.name}, {format_bytes(item.variant.size_bytes)})")
        pull_with_progress(store, item.model, item.variant)


def _with_options(config: NodeConfig, host: str | None, port: int | None, model: str | None) -> NodeConfig:
    server = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    changes: dict[str, object] = {}
    if server:
        changes["server"] = config.server.model_copy(update=server)
    if model is not None:
        # A variant that was configured belongs to the model that was configured.
        variant = config.engine.variant if model == config.engine.model else None
        changes["engine"] = config.engine.model_copy(update={"model": model, "variant": variant})
    return config.model_copy(update=changes)


_TRIES = (
    (
        "chat/completions",
        {
            "model": "auto",
            "messages": [{"role": "user", "content": "Where is the Eiffel Tower?"}],
            "temperature": 0,
        },
    ),
    (
        "decisions",
        {
            "model": "auto",
            "input": "My card was charged twice!",
            "questions": [
                {
                    "type": "choice",
                    "name": "topic",
                    "instructions": "What is the message about?",
                    "choices": [{"value": value} for value in ("billing", "delivery", "other")],
                }
            ],
        },
    ),
    (
        "extract",
        {
            "text": "Invoice number 4711 from Acme Ltd. The total is 99.50 EUR.",
            "schema": {
                "type": "object",
                "properties": {"invoice_number": {"type": "string"}, "total_eur": {"type": "number"}},
                "required": ["invoice_number", "total_eur"],
            },
        },
    ),
)
"""One line of curl for each of the three things a node is for."""


def _why(outcome: Plan, candidates: Sequence[ModelCandidate]) -> str:
    """Why the variant that is served was chosen; empty where nothing was measured."""
    served = outcome.placements[0].variant
    if outcome.refusals and candidates[0].variant.name != served:
        return f"{candidates[0].variant.name} is quicker, but {outcome.refusals[0].reason}"
    return candidates[0].reason


def _ready_message(
    running: RunningNode,
    placement: Placement,
    parameters: int,
    home: Path,
    seconds: float,
    why: str,
    others: Sequence[str],
) -> str:
    shape, url = placement.shape, running.url
    auth = ' -H "Authorization: Bearer $KEY"' if running.needs_key else ""
    lines = [
        f"\nReady after {seconds:.1f} s at {url}",
        f"  model    {placement.model}, variant {placement.variant} ({parameters / 1e6:,.0f}M parameters)",
        *([f"           chosen because {why}"] if why else []),
        f"  engine   {_engine_of(placement)}, {shape.context_tokens:,} tokens of context, {shape.sequences} sequences",
        *(f"  beside   {other}" for other in others),
        f"  hosted   {', '.join(running.hosted) or 'none configured, so every request is answered on this machine'}",
        f"  policy   {running.policy_path} ({running.policy_version})",
        f"  data     {home}",
        "\nTry:",
    ]
    for path, body in _TRIES:
        # No value above holds a single quote, so the shell takes the body as it stands.
        lines.append(f"  curl -s {url}/v1/{path}{auth} -H 'Content-Type: application/json' -d '{json.dumps(body)}'")
    return "\n".join(lines) + "\n"


def _engine_of(placement: Placement) -> str:
    name = "vLLM" if placement.engine == "vllm" else "llama.cpp"
    if placement.gpu is None:
        return f"{name}, {placement.shape.threads} threads"
    return f"{name} on {len(placement.gpu.devices)} GPU{'s' if len(placement.gpu.devices) > 1 else ''}"


def _advice(catalog: Catalog, hardware: Hardware, chosen: ModelCandidate, calibration: Calibration | None) -> str:
    """For the embedded model: that it is only for trying things out, and what this machine could run instead."""
    if not chosen.model.embedded:
        return ""
    lines = [f"{chosen.model.name} is for trying things out: its answers are often wrong. It shows how the node works."]
    better = recommend_model(hardware, catalog, calibration.measurement if calibration else None)
    if better is None or better.model.parameters <= chosen.model.parameters:
        return f"{lines[0]}\nNo larger model of the catalogue would be quick here: `appliance plan` says what fits.\n"
    name, variant = better.model.name, better.variant.name
    lines.append(
        f"This machine could run {better.model.title}: about {better.decode_tokens_per_second:,.0f} tokens/s for one "
        f"request and {better.prefill_tokens_per_second:,.0f} prompt tokens/s, {better.basis}."
    )
    size = format_bytes(better.variant.size_bytes)
    lines.append(
        f"Get ({size}) and serve it with: appliance models pull {name} --variant {variant} && "
        f"scripts/serve --model {name}"
    )
    return "\n".join(lines) + "\n"
