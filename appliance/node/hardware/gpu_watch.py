"""Looks at the GPUs while a node runs, and says on the health page what has become of them."""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from appliance.node.hardware.nvidia import GpuReader, Gpus
from appliance.node.supervise.status import StatusPublisher

_SECONDS: Final = 10.0
_HOT_REASONS: Final = frozenset({"hardware slowdown", "hardware thermal slowdown", "power brake"})
"""What slows a device down that somebody ought to see to; a power cap is how it is meant to work."""


def find_gpu_problems(gpus: Gpus, seen: Gpus) -> Mapping[str, str]:
    """What is wrong, by device or `driver`. `seen`: as they were when the node started."""
    found = {}
    if gpus.state == "gone":
        found["driver"] = f"the GPUs cannot be read: {gpus.reason}; engines on them will fail"
    for lost in gpus.lost:
        reset, reboot = "reset it (nvidia-smi --gpu-reset)", "reboot, and look at the kernel's log (Xid)"
        remedy = reset if lost.needs_reset else reboot
        found[str(lost.index)] = f"GPU {lost.index} is lost: {lost.reason}; {remedy}"
    errors = {one.index: one.ecc_uncorrected_errors or 0 for one in seen.devices}
    for gpu in gpus.devices:
        told = []
        if (gpu.ecc_uncorrected_errors or 0) > errors.get(gpu.index, 0):
            told.append(f"{gpu.ecc_uncorrected_errors} uncorrected memory errors: its answers may be wrong")
        hot = [reason for reason in gpu.throttled or () if reason in _HOT_REASONS]
        if hot:
            at = f" at {gpu.temperature_celsius} C" if gpu.temperature_celsius is not None else ""
            told.append(f"slowed down by {', '.join(hot)}{at}: look at its cooling and power")
        if told:
            found[str(gpu.index)] = f"GPU {gpu.index} ({gpu.name}): {'; '.join(told)}"
    return found


async def watch_gpus(signals: StatusPublisher, nvml: Any, seconds: float = _SECONDS) -> None:
    """Warn of what is wrong and take the warning back once it is over. Runs until cancelled."""
    reader = GpuReader(nvml)
    said: set[str] = set()
    seen: Gpus | None = None
    try:
        while True:
            gpus = await asyncio.to_thread(reader.read, 0, 0)
            seen = seen or gpus
            found = find_gpu_problems(gpus, seen)
            for about, text in found.items():
                signals.warn("gpu", text, about)
            for about in said - found.keys():
                signals.clear("gpu", about)
            said = set(found)
            await asyncio.sleep(seconds)
    finally:
        reader.close()
