"""Recorded and composed machines: /proc and /sys trees, and an NVML that answers from a table."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml

GIB = 1 << 30

CGROUP_V2_MOUNT = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
CGROUP_V1_MOUNTS = (
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
)
"""Lines of /proc/self/mountinfo: a systemd machine, and one with the older hierarchy."""


def write_tree(root: Path, files: Mapping[str, str]) -> Path:
    """Put `files` (path below `root` -> text) on the disk."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def topology(cores: int, threads_per_core: int = 1, packages: int = 1) -> dict[str, str]:
    """/sys/devices/system/cpu of a machine whose threads are numbered as x86 does it: all first threads come first."""
    files = {}
    for thread in range(threads_per_core):
        for core in range(cores):
            folder = f"sys/devices/system/cpu/cpu{thread * cores + core}/topology"
            siblings = ",".join(str(number * cores + core) for number in range(threads_per_core))
            files[f"{folder}/core_id"] = f"{core % (cores // packages)}\n"
            files[f"{folder}/physical_package_id"] = f"{core // (cores // packages)}\n"
            files[f"{folder}/thread_siblings_list"] = f"{siblings}\n"
    for node in range(packages):
        files[f"sys/devices/system/node/node{node}/cpulist"] = ""
    return files


def meminfo(total_bytes: int, available_bytes: int) -> dict[str, str]:
    text = f"MemTotal: {total_bytes // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available_bytes // 1024} kB\n"
    return {"proc/meminfo": text}


H200: Mapping[str, Any] = {
    "nvmlDeviceGetName": "NVIDIA H200",
    "nvmlDeviceGetUUID": "GPU-00000000-0000-0000-0000-000000000001",
    "nvmlDeviceGetCudaComputeCapability": (9, 0),
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=150_754_820_096, free=150_121_480_192, used=633_339_904),
    "nvmlDeviceGetPowerUsage": 76_512,
    "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=37, memory=12),
    "nvmlDeviceGetTemperature": 31,
    "nvmlDeviceGetCurrentClocksEventReasons": 0x1,
    "nvmlDeviceGetMigMode": (0, 0),
    "nvmlDeviceGetEccMode": (1, 1),
    "nvmlDeviceGetTotalEccErrors": 0,
}
"""Answers as an idle board gives them; figures composed from its data sheet."""


class FakeNvml:
    """NVML's functions, answering from tables: a value, or an error code to raise. Constants and errors are real."""

    def __init__(self, *devices: Mapping[str, Any], **system: Any) -> None:
        self._devices = devices
        self._system = {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlSystemGetDriverVersion": "580.95.05",
            "nvmlSystemGetCudaDriverVersion_v2": 13_000,
            "nvmlDeviceGetCount": len(devices),
            **system,
        }
        self.shut_down = 0

    def __getattr__(self, name: str) -> Any:
        if name == "nvmlShutdown":
            self.shut_down += 1
        if name == "nvmlDeviceGetHandleByIndex":
            return lambda index: self._devices[index]
        if name in self._system:
            return lambda: _answer(self._system[name])
        if name.startswith("nvmlDeviceGet"):
            return lambda device, *arguments: _answer(device.get(name, Fails(pynvml.NVML_ERROR_NOT_SUPPORTED)))
        return getattr(pynvml, name)


class Fails:
    """An answer that is an NVML error."""

    def __init__(self, code: int) -> None:
        self.code = code


def _answer(value: Any) -> Any:
    if isinstance(value, Fails):
        raise pynvml.NVMLError(value.code)
    return value
