"""Which models a node serves when several are configured or it has GPUs: those that fit together, and those on demand.

Pure but for asking which files lie here.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from appliance.catalog import EngineKind
from appliance.config import EngineSettings as EngineConfig
from appliance.engines.base import Placement
from appliance.node.hardware.probe import Hardware
from appliance.node.plan.gpu_fit import OverheadRecords
from appliance.node.plan.models import ModelCandidate, Plan, Refusal
from appliance.node.plan.planner import plan_placements
from appliance.node.plan.swap import RAM


@dataclass(frozen=True, slots=True)
class ServingPlan:
    loaded: Plan
    """What runs together; it has a refusal for every variant that has no place."""
    on_demand: tuple[Placement, ...]
    """What would fit alone: loaded when it is wanted, in place of others."""
    items: Mapping[str, ModelCandidate]
    """What was placed, by model: to pull it."""

    @property
    def placements(self) -> tuple[Placement, ...]:
        return (*self.loaded.placements, *self.on_demand)

    @property
    def missing(self) -> tuple[Refusal, ...]:
        """Of each model that has no place at all, why its first variant has none."""
        found: dict[str, Refusal] = {}
        for refusal in self.loaded.refusals:
            if refusal.model not in self.items:
                found.setdefault(refusal.model, refusal)
        return tuple(found.values())

    @property
    def pools(self) -> Mapping[str, int]:
        """Bytes that all models of one pool of memory may hold together."""
        devices = {key for one in self.placements if one.gpu is not None for key in one.gpu.devices}
        usable = self.loaded.gpu_usable_bytes
        return {RAM: self.loaded.usable_bytes, **{key: usable.get(key, 0) for key in sorted(devices)}}


def build_serving_plan(
    hardware: Hardware,
    groups: Sequence[Sequence[ModelCandidate]],
    config: EngineConfig,
    engines: Collection[EngineKind],
    records: OverheadRecords | None = None,
) -> ServingPlan:
    """Place the models of `groups`, each in the best of its variants that the `engines` at hand can serve.

    Variants that lie here come before better ones that would have to be pulled. What does not fit beside the others is
    planned as if it were alone.
    """
    refused = [
        Refusal(
            item.model.name,
            item.variant.name,
            _MISSING_ENGINES.get(item.variant.engine, "this node has no such engine"),
        )
        for group in groups
        for item in group
        if item.variant.engine not in engines
    ]
    can = [[item for item in group if item.variant.engine in engines] for group in groups]
    here = [[item for item in group if item.path.exists()] or group for group in can]
    outcome = _planned(hardware, here, config, records)
    placed = {one.model for one in outcome.placements}
    if any(group and group[0].model.name not in placed for group in can):
        # What lies here of a model may be too large while another variant of it is not.
        wider = [own if own and own[0].model.name in placed else group for own, group in zip(here, can, strict=True)]
        outcome = _planned(hardware, wider, config, records)
        placed = {one.model for one in outcome.placements}
    on_demand: list[Placement] = []
    for group in can:
        if group and group[0].model.name not in placed:
            on_demand += _planned(hardware, [group], config, records).placements
    items = {(item.model.name, item.variant.name): item for group in can for item in group}
    taken = {one.model: items[one.model, one.variant] for one in (*outcome.placements, *on_demand)}
    return ServingPlan(replace(outcome, refusals=(*outcome.refusals, *refused)), tuple(on_demand), taken)


_MISSING_ENGINES: Mapping[str, str] = {
    "vllm": "vLLM is not installed on this machine: `appliance engines install vllm`",
}


def _planned(
    hardware: Hardware,
    groups: Sequence[Sequence[ModelCandidate]],
    config: EngineConfig,
    records: OverheadRecords | None,
) -> Plan:
    return plan_placements(hardware, [item for group in groups for item in group], config, records)
