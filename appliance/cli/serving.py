"""appliance serve: from nothing to a running node, saying at each step what is happening."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from appliance.catalog import Catalog, load_catalog
from appliance.cli.calibrate import first_start
from appliance.cli.models import pull_with_progress
from appliance.cli.output import bytes_text, fail, guarded, say, stderr
from appliance.cli.places import ConfigOption, DataDirOption, data_dir_of
from appliance.config import NodeConfig, load_config
from appliance.engines.base import Placement
from appliance.errors import ApplianceError
from appliance.node.calibration import Calibration
from appliance.node.candidate import best_candidate
from appliance.node.choice import wanted
from appliance.node.models import ModelStore
from appliance.node.planner import Plan, Wanted, plan
from appliance.node.probe import Hardware, probe
from appliance.serve import Running, Site, prepare, serve


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
    config = _with_options(guarded(lambda: load_config(config_path)), host, port, model)
    home = data_dir_of(data_dir, config)
    catalog, store, hardware = guarded(load_catalog), ModelStore(home), probe()
    chosen = guarded(lambda: wanted(config.engine, catalog, store))
    if not chosen.path.exists():
        stderr.print(f"pulling {chosen.model.name} ({chosen.variant.name}, {bytes_text(chosen.variant.size_bytes)})")
        pull_with_progress(store, chosen.model, chosen.variant)
    engine = config.engine.model_copy(update={"calibrate": False}) if no_calibrate else config.engine
    candidates, calibration = first_start(chosen, engine, home, hardware, store)
    outcome = plan(hardware, candidates, config.engine)
    if not outcome.placements:
        fail(f"{chosen.model.name} cannot be served here: {outcome.refusals[0].reason}")

    def read() -> Site:
        now = _with_options(load_config(config_path), host, port, model)
        return prepare(now, home, outcome.placements)

    site = guarded(read)

    def announce(running: Running) -> None:
        why = _why(outcome, candidates)
        say(_ready_message(running, outcome.placements[0], chosen, home, time.monotonic() - started, why))
        say(_advice(catalog, hardware, chosen, calibration))
        say("Stop it with Ctrl-C.")

    try:
        uvloop.run(serve(site, read, announce))
    except ApplianceError as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


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


def _why(outcome: Plan, candidates: Sequence[Wanted]) -> str:
    """Why the variant that is served was chosen; empty where nothing was measured."""
    served = outcome.placements[0].variant
    if outcome.refusals and candidates[0].variant.name != served:
        return f"{candidates[0].variant.name} is quicker, but {outcome.refusals[0].reason}"
    return candidates[0].reason


def _ready_message(running: Running, placement: Placement, chosen: Wanted, home: Path, seconds: float, why: str) -> str:
    shape, url = placement.shape, running.url
    auth = ' -H "Authorization: Bearer $KEY"' if running.needs_key else ""
    lines = [
        f"\nReady after {seconds:.1f} s at {url}",
        f"  model    {placement.model}, variant {placement.variant} ({chosen.model.parameters / 1e6:,.0f}M parameters)",
        *([f"           chosen because {why}"] if why else []),
        f"  engine   {_engine_of(placement)}, {shape.context_tokens:,} tokens of context, {shape.sequences} sequences",
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


def _advice(catalog: Catalog, hardware: Hardware, chosen: Wanted, calibration: Calibration | None) -> str:
    """For the embedded model: that it is only for trying things out, and what this machine could run instead."""
    if not chosen.model.embedded:
        return ""
    lines = [f"{chosen.model.name} is for trying things out: its answers are often wrong. It shows how the node works."]
    better = best_candidate(hardware, catalog, calibration.measurement if calibration else None)
    if better is None or better.model.parameters <= chosen.model.parameters:
        return f"{lines[0]}\nNo larger model of the catalogue would be quick here: `appliance plan` says what fits.\n"
    name, variant = better.model.name, better.variant.name
    lines.append(
        f"This machine could run {better.model.title}: about {better.decode_tokens_per_second:,.0f} tokens/s for one "
        f"request and {better.prefill_tokens_per_second:,.0f} prompt tokens/s, {better.basis}."
    )
    size = bytes_text(better.variant.size_bytes)
    lines.append(
        f"Get ({size}) and serve it with: appliance models pull {name} --variant {variant} && "
        f"scripts/serve --model {name}"
    )
    return "\n".join(lines) + "\n"
