"""The GPUs of a machine as the planner sees them: who they are and how much of their memory may be given away. Pure."""

from dataclasses import dataclass
from typing import Final

from appliance.node.hardware.nvidia_device import Gpu
from appliance.node.hardware.probe import Hardware

_MOST_OF_TOTAL: Final = 0.95
"""vLLM's shares of one device ought to stay below this together: what frameworks allocate comes in pieces."""
_SPARE_BYTES: Final = 300_000_000
"""Of what is free: the driver takes some for each new process."""
_MOST_OF_UNIFIED: Final = 0.85
"""Of a memory that the operating system, its page cache and all other programs live in as well."""


@dataclass(frozen=True, slots=True)
class GpuDevice:
    """One GPU, or one part of a divided one, that an engine can be given."""

    key: str
    """As CUDA_VISIBLE_DEVICES takes it: its UUID, or its index where it tells none."""
    index: int
    """Of the board."""
    name: str
    compute_capability: str | None
    total_bytes: int
    usable_bytes: int
    is_part: bool = False
    """A MIG part: it computes alone, no copy can be split over several."""
    unified_memory: bool = False


def list_usable_devices(hardware: Hardware) -> tuple[tuple[GpuDevice, ...], tuple[str, ...]]:
    """Those that can be used, and why others cannot."""
    devices: list[GpuDevice] = []
    problems = [f"GPU {lost.index} cannot be used: {lost.reason}" for lost in hardware.gpus.lost]
    for gpu in hardware.gpus.devices:
        if gpu.mig_enabled:
            parts = _parts(gpu)
            devices += parts
            if not parts:
                problems.append(f"GPU {gpu.index} ({gpu.name}) is in MIG mode and has no part with known memory")
        elif gpu.memory_total_bytes is None or gpu.memory_free_bytes is None:
            problems.append(f"GPU {gpu.index} ({gpu.name}) does not tell its memory: {gpu.memory_reason}")
        else:
            devices.append(_device(gpu, gpu.memory_total_bytes, gpu.memory_free_bytes))
    return tuple(devices), tuple(problems)


def _device(gpu: Gpu, total: int, free: int) -> GpuDevice:
    most = int(total * (_MOST_OF_UNIFIED if gpu.unified_memory else _MOST_OF_TOTAL))
    return GpuDevice(
        key=gpu.uuid or str(gpu.index),
        index=gpu.index,
        name=gpu.name,
        compute_capability=gpu.compute_capability,
        total_bytes=total,
        usable_bytes=max(0, min(most, free - _SPARE_BYTES)),
        unified_memory=gpu.unified_memory,
    )


def _parts(gpu: Gpu) -> list[GpuDevice]:
    found = []
    for part in gpu.mig_devices:
        total, free = part.memory_total_bytes, part.memory_free_bytes
        if part.uuid is None or total is None or free is None:
            continue
        found.append(
            GpuDevice(
                key=part.uuid,
                index=gpu.index,
                name=part.name,
                compute_capability=gpu.compute_capability,
                total_bytes=total,
                usable_bytes=max(0, min(int(total * _MOST_OF_TOTAL), free - _SPARE_BYTES)),
                is_part=True,
            )
        )
    return found
