"""Which model of the catalogue fits which class of hardware: tables by the planner, for appliance/docs/models.md."""

from pathlib import Path
from typing import Final

from appliance.catalog import ModelSpec, load_catalog
from appliance.config import EngineSettings
from appliance.node.hardware.probe import Hardware
from appliance.node.plan.hypothetical_hardware import build_hypothetical_hardware
from appliance.node.plan.models import ModelCandidate, Plan
from appliance.node.plan.planner import plan_placements

_NOWHERE: Final = Path()
"""Nothing has been pulled."""


def gpu_table() -> str:
    """One GPU and vLLM. A cell: variant, the longest sequence, how many sequences at once."""
    return _table("gpu", "vllm")


def cpu_table() -> str:
    """A processor and llama.cpp. A cell: variant, context shared by all sequences, how many sequences at once."""
    return _table("cpu", "llamacpp")


def verdict(hardware: Hardware, model: ModelSpec, engine: str) -> Plan:
    """What the planner makes of this model alone, in its variants for this engine."""
    from_catalogue = [variant for variant in model.variants if variant.engine == engine]
    return plan_placements(
        hardware, [ModelCandidate(model, variant, _NOWHERE) for variant in from_catalogue], EngineSettings()
    )


def _table(kind: str, engine: str) -> str:
    """Models down, classes of hardware of this kind across, smallest memory first."""
    catalog = load_catalog()
    devices = sorted((one for one in catalog.devices if one.kind == kind), key=lambda one: one.memory_bytes or 0)
    names = [device.name.partition("-")[2] for device in devices]
    machines = [build_hypothetical_hardware(device) for device in devices]
    rows = [f"| model | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    models = [model for model in catalog.models if not model.measuring_only]
    for model in sorted(models, key=lambda model: model.parameters):
        if any(variant.engine == engine for variant in model.variants):
            cells = (_cell(verdict(machine, model, engine)) for machine in machines)
            rows.append(f"| {model.name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(outcome: Plan) -> str:
    if not outcome.placements:
        return "does not fit"
    (placed,) = outcome.placements
    shape = placed.shape
    context = shape.context_tokens if placed.gpu is None else shape.sequence_context_tokens
    return f"{placed.variant.removesuffix('-safetensors')} {context // 1024}k x {shape.sequences}"
