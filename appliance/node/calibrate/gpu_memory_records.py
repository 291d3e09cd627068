"""What engines were measured to hold on this machine's GPUs, remembered for the next plan.

DATA_DIR/gpu_records.json: a list of rows, one for each model, variant, kind of device and number of devices a copy is
split over. What stands there takes the place of what is assumed (`engines/vllm_memory.py`).
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field, TypeAdapter, ValidationError

from appliance.engines.base import Placement
from appliance.engines.vllm_memory import VllmOverheads
from appliance.files import replace_file
from appliance.node.hardware.nvidia import Gpus
from appliance.node.plan.gpu_fit import OverheadKey

_LEAST_OTHER_BYTES: Final = 300_000_000
"""No process computes on a device with less than this: a smaller figure was measured of something else."""
_Bytes = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class _Row:
    model: str
    variant: str
    device: str
    tensor_parallel: int
    weights_bytes: _Bytes
    other_bytes: _Bytes


_ROWS: TypeAdapter[list[_Row]] = TypeAdapter(list[_Row])


def measure_overheads(
    placement: Placement, weights_bytes: int, before: Gpus, after: Gpus
) -> tuple[OverheadKey, VllmOverheads] | None:
    """What `placement` holds on each of its devices, from readings before its start and once it was ready.

    `weights_bytes`: on each device, as its log says. None if a device did not tell its memory or others came and
    went meanwhile, as far as that shows.
    """
    if placement.gpu is None or placement.gpu.unified_memory:
        return None
    free = [{one.uuid or str(one.index): one.memory_free_bytes for one in gpus.devices} for gpus in (before, after)]
    held = []
    for key in placement.gpu.devices:
        first, last = free[0].get(key), free[1].get(key)
        if first is None or last is None:
            return None
        held.append(first - last)
    other = max(held) - weights_bytes - placement.memory.kv_bytes
    if other < _LEAST_OTHER_BYTES:
        return None
    names = {one.uuid or str(one.index): one.name for one in before.devices}
    kind, split = names[placement.gpu.devices[0]], placement.gpu.tensor_parallel
    return (placement.model, placement.variant, kind, split), VllmOverheads(weights_bytes, other)


def read_gpu_records(home: Path) -> dict[OverheadKey, VllmOverheads]:
    """What was measured so far; nothing if the file is missing or cannot be understood: then it is measured anew."""
    try:
        rows = _ROWS.validate_json((home / "gpu_records.json").read_bytes())
    except (OSError, ValidationError):
        return {}
    return {
        (row.model, row.variant, row.device, row.tensor_parallel): VllmOverheads(row.weights_bytes, row.other_bytes)
        for row in rows
    }


def add_gpu_records(home: Path, found: Iterable[tuple[OverheadKey, VllmOverheads]]) -> None:
    """Add to what was measured; the newest figure of each key counts. Raises OSError if the folder is not ours."""
    records = {**read_gpu_records(home), **dict(found)}
    rows = [asdict(_Row(*key, one.weights_bytes, one.other_bytes)) for key, one in sorted(records.items())]
    replace_file(home / "gpu_records.json", json.dumps(rows, indent=1) + "\n")
