"""NVIDIA devices through NVML: all of them, or why there is none; read once, or again and again while a node runs."""

import ctypes
from dataclasses import dataclass
from typing import Any, Final, Literal

from appliance.node.hardware.nvidia_device import (
    Gpu,
    GpuProcess,
    MigDevice,
    NvmlSession,
    decode_text,
    is_device_gone,
    query_nvml,
    read_device,
)

__all__ = ["Gpu", "GpuProcess", "GpuReader", "Gpus", "LostGpu", "MigDevice", "load_nvml", "read_gpus"]

DriverState = Literal["absent", "running", "gone"]


@dataclass(frozen=True, slots=True)
class LostGpu:
    """A device that the driver counts and that cannot be used."""

    index: int
    uuid: str | None
    """Where it was read before."""
    reason: str
    needs_reset: bool


@dataclass(frozen=True, slots=True)
class Gpus:
    """What NVML tells of this machine. `reason` says how many devices there are, or why there is none."""

    devices: tuple[Gpu, ...]
    reason: str
    driver: str | None = None
    cuda: str | None = None
    """The newest CUDA that the driver can run."""
    lost: tuple[LostGpu, ...] = ()
    state: DriverState = "running"
    """absent: there is no driver to ask. gone: there was one, and it went away."""


_NO_LIBRARY: Final = "the driver's library (libnvidia-ml) is not installed"


def load_nvml() -> Any | None:
    """The bindings, or None if the driver's library is not there: then their 12 MB need not be in memory."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    import pynvml  # noqa: PLC0415 - only where there is something to bind to

    return pynvml


def read_gpus(ram_total_bytes: int, ram_usable_bytes: int, nvml: Any | None) -> Gpus:
    """Every NVIDIA device, or none and the reason. Never raises for what NVML answers; `nvml` is what `load_nvml` gave.

    The RAM figures stand in for the memory of devices that share the machine's own.
    """
    reader = GpuReader(nvml)
    try:
        return reader.read(ram_total_bytes, ram_usable_bytes)
    finally:
        reader.close()


class GpuReader:
    """Reads the devices again and again without starting NVML anew each time, and survives what happens to them.

    A device that falls off the bus, a driver that is unloaded or replaced: each is a state of the next reading. Once
    the driver is back, so are the devices. Not for several threads at once.
    """

    def __init__(self, nvml: Any | None) -> None:
        self._nvml = nvml
        self._session = None if nvml is None else NvmlSession(nvml)
        self._was_seen = False
        self._uuids: dict[int, str | None] = {}

    def read(self, ram_total_bytes: int, ram_usable_bytes: int) -> Gpus:
        nvml, session = self._nvml, self._session
        if nvml is None or session is None:
            return Gpus((), f"none, because {_NO_LIBRARY}", state="absent")
        try:
            session.open()
            return self._read(nvml, ram_total_bytes, ram_usable_bytes)
        except nvml.NVMLError as error:
            self.close()
            return Gpus((), _why_none(error, nvml), state="gone" if self._was_seen else "absent")

    def close(self) -> None:
        if self._session is not None:
            self._session.close()

    def _read(self, nvml: Any, ram_total_bytes: int, ram_usable_bytes: int) -> Gpus:
        driver = decode_text(query_nvml(nvml, "nvmlSystemGetDriverVersion"))
        version = query_nvml(nvml, "nvmlSystemGetCudaDriverVersion_v2")
        cuda = None if version is None else f"{version // 1000}.{version % 1000 // 10}"
        try:
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            if is_device_gone(nvml, error):
                raise
            return Gpus((), f"none, because the driver cannot count its devices: {error}", driver, cuda)
        self._was_seen = True
        devices: list[Gpu] = []
        lost: list[LostGpu] = []
        for index in range(count):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                devices.append(read_device(nvml, index, handle, ram_total_bytes, ram_usable_bytes))
                self._uuids[index] = devices[-1].uuid
            except nvml.NVMLError as error:
                if error.value in (nvml.NVML_ERROR_UNINITIALIZED, nvml.NVML_ERROR_DRIVER_NOT_LOADED):
                    raise
                reset = error.value == nvml.NVML_ERROR_RESET_REQUIRED
                lost.append(LostGpu(index, self._uuids.get(index), str(error), reset))
        reason = f"{len(devices)} of {count} devices" if count else "none, because the driver sees no device"
        lost_reasons = [f"device {one.index} cannot be read: {one.reason}" for one in lost]
        return Gpus(tuple(devices), "; ".join([reason, *lost_reasons]), driver, cuda, tuple(lost))


def _why_none(error: Any, nvml: Any) -> str:
    known = {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: _NO_LIBRARY,
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded",
        nvml.NVML_ERROR_UNINITIALIZED: "the NVIDIA driver went away while it was asked",
        nvml.NVML_ERROR_NO_PERMISSION: "this user may not talk to the driver",
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
            "the driver in the kernel and its library are of different versions: reboot, or reload the driver"
        ),
        nvml.NVML_ERROR_GPU_NOT_FOUND: "the driver sees no device",
    }
    return f"none, because {known.get(error.value, f'NVML does not start: {error}')}"
