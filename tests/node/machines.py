"""Recorded and composed machines: /proc and /sys trees, and an NVML that answers from a table."""

import json
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
        self.started = 0
        self.broken: int | None = None
        """An error that every call answers from now on: the driver has gone away."""

    def lose(self, index: int, code: int) -> None:
        """From now on this device answers with an error alone."""
        devices = list(self._devices)
        devices[index] = {"handle": Fails(code)}
        self._devices = tuple(devices)

    def replace_devices(self, other: "FakeNvml") -> None:
        """From now on it has the other's devices."""
        self._system["nvmlDeviceGetCount"] = len(other._devices)
        self._devices = other._devices

    def _count(self, name: str) -> Any:
        self.started += name == "nvmlInit"
        return _answer(self._system[name])

    def __getattr__(self, name: str) -> Any:
        if name == "nvmlShutdown":
            self.shut_down += 1
        if self.broken is not None and name.startswith("nvml") and name != "nvmlShutdown":
            return lambda *arguments: _answer(Fails(self.broken))
        if name == "nvmlDeviceGetHandleByIndex":
            return lambda index: _answer(self._devices[index].get("handle", self._devices[index]))
        if name == "nvmlDeviceGetNvLinkState":
            return lambda device, link: _nth(device.get("nvlinks", ()), link)
        if name == "nvmlDeviceGetMigDeviceHandleByIndex":
            return lambda device, index: _nth(device.get("mig", ()), index)
        if name in self._system:
            return lambda: self._count(name)
        if name.startswith("nvmlDeviceGet"):
            return lambda device, *arguments: _answer(device.get(name, Fails(pynvml.NVML_ERROR_NOT_SUPPORTED)))
        return getattr(pynvml, name)


class Fails:
    """An answer that is an NVML error."""

    def __init__(self, code: int) -> None:
        self.code = code


def recorded_nvml(name: str) -> FakeNvml:
    """NVML as a file under tests/data/nvml tells it; each says where its figures are from."""
    path = Path(__file__).resolve().parent.parent / "data" / "nvml" / f"{name}.json"
    recording = json.loads(path.read_text("utf-8"))
    devices = [{key: _value(value) for key, value in device.items()} for device in recording["devices"]]
    return FakeNvml(*devices, **{key: _value(value) for key, value in recording["system"].items()})


def _value(value: Any) -> Any:
    """As the bindings give it: an error, a structure, a list of structures, or the number or text itself."""
    if isinstance(value, dict) and "error" in value:
        return Fails(getattr(pynvml, value["error"]))
    if isinstance(value, dict) and any(key.startswith("nvml") for key in value):
        return {key: _value(one) for key, one in value.items()}
    if isinstance(value, dict):
        return SimpleNamespace(**value)
    return [_value(one) for one in value] if isinstance(value, list) else value


def _nth(values: Any, index: int) -> Any:
    """An element, or what NVML says of one that there is not."""
    if index >= len(values) or values[index] is None:
        raise pynvml.NVMLError(
            pynvml.NVML_ERROR_INVALID_ARGUMENT if index >= len(values) else pynvml.NVML_ERROR_NOT_FOUND
        )
    return values[index]


def _answer(value: Any) -> Any:
    if isinstance(value, Fails):
        raise pynvml.NVMLError(value.code)
    return value
