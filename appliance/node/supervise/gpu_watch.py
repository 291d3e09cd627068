"""Watches the GPUs while a node runs and warns of faults on the health page."""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from appliance.node.hardware.nvidia import GpuReader, Gpus
from appliance.node.supervise.status import StatusPublisher

_READ_SECONDS: Final = 10.0
_HOT_REASONS: Final = frozenset({"hardware slowdown", "hardware thermal slowdown", "power brake"})
"""Throttling that the operator has to mend. A power cap is how a device is meant to work."""


def find_gpu_problems(gpus: Gpus, seen: Gpus) -> Mapping[str, str]:
    """What is wrong, by device index or `driver`. `seen`: the GPUs as they were when the node started."""
    found = {}
    if gpus.state == "gone":
        found["driver"] = f"the GPUs cannot be read: {gpus.reason}; engines on them will fail"
    for lost in gpus.lost:
        reset, reboot = "reset it (nvidia-smi --gpu-reset)", "reboot, and look at the kernel's log (Xid)"
        remedy = reset if lost.needs_reset else reboot
        found[str(lost.index)] = f"GPU {lost.index} is lost: {lost.reason}; {remedy}"
    errors = {one.index: one.ecc_uncorrected_errors or 0 for one in seen.devices}
    for gpu in gpus.devices:
        faults = []
        if (gpu.ecc_uncorrected_errors or 0) > errors.get(gpu.index, 0):
            faults.append(f"{gpu.ecc_uncorrected_errors} uncorrected memory errors: its answers may be wrong")
        hot = [reason for reason in gpu.throttled or () if reason in _HOT_REASONS]
        if hot:
            at = f" at {gpu.temperature_celsius} C" if gpu.temperature_celsius is not None else ""
            faults.append(f"slowed down by {', '.join(hot)}{at}: look at its cooling and power")
        if faults:
            found[str(gpu.index)] = f"GPU {gpu.index} ({gpu.name}): {'; '.join(faults)}"
    return found


async def watch_gpus(status: StatusPublisher, nvml: Any, seconds: float = _READ_SECONDS) -> None:
    """Warn of what is wrong, and clear the warning once it is over. Runs until cancelled."""
    reader = GpuReader(nvml)
    warned: set[str] = set()
    seen: Gpus | None = None
    try:
        while True:
            gpus = await asyncio.to_thread(reader.read, 0, 0)
            seen = seen or gpus
            found = find_gpu_problems(gpus, seen)
            for about, text in found.items():
                status.warn("gpu", text, about)
            for about in warned - found.keys():
                status.clear("gpu", about)
            warned = set(found)
            await asyncio.sleep(seconds)
    finally:
        for about in warned:
            status.clear("gpu", about)  # the next run of this task does not know of them
        reader.close()
