"""One NVIDIA device at one moment, through NVML. What it does not tell is None, and unknown memory is never free."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

_THROTTLES: Final = {
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "power brake",
    0x200: "board limit",
    0x400: "reliability voltage",
}
"""Bits of NVML's clock event reasons that mean slower than asked for; idle and chosen clocks do not."""

_GONE: Final = (
    "NVML_ERROR_GPU_IS_LOST",
    "NVML_ERROR_RESET_REQUIRED",
    "NVML_ERROR_UNINITIALIZED",
    "NVML_ERROR_DRIVER_NOT_LOADED",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH",
)
"""Answers that say that the device or its driver is no longer there."""


class NvmlSession:
    """NVML, started when it is first needed and again after it went away. Not for several threads at once."""

    def __init__(self, nvml: Any) -> None:
        self._nvml, self._is_open = nvml, False

    def open(self) -> None:
        """Start NVML unless it runs. Raises NVMLError."""
        if not self._is_open:
            self._nvml.nvmlInit()
            self._is_open = True

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            with contextlib.suppress(self._nvml.NVMLError):  # it cannot be reached: that is why it is closed
                self._nvml.nvmlShutdown()


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that computes on a device. In a container its number may be of another namespace."""

    pid: int
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class MigDevice:
    """A part of a device that is used as if it were one of its own."""

    index: int
    name: str
    uuid: str | None
    memory_total_bytes: int | None
    memory_free_bytes: int | None
    multiprocessors: int | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device at one moment."""

    index: int
    name: str
    uuid: str | None
    compute_capability: str | None
    memory_total_bytes: int | None
    memory_free_bytes: int | None
    memory_reason: str
    unified_memory: bool
    """It shares the machine's RAM, so what it takes is missing there."""
    power_watts: float | None
    power_limit_watts: float | None
    utilisation: float | None
    """Share of the last sample period in which a kernel ran, 0 to 1."""
    temperature_celsius: int | None
    throttled: tuple[str, ...] | None
    """Why clocks are held down; empty: they are not."""
    mig_enabled: bool | None
    ecc_enabled: bool | None
    ecc_uncorrected_errors: int | None
    """Since the driver was loaded."""
    energy_joules: float | None = None
    """Since the driver was loaded; what something cost is the difference of two readings."""
    nvlinks: int | None = None
    """Links to other devices that are up; None: it does not say, or has none."""
    numa_node: int | None = None
    """Of the machine's memory, the part that is nearest."""
    processes: tuple[GpuProcess, ...] | None = None
    mig_devices: tuple[MigDevice, ...] = ()
    """The parts that are set up, where it is in MIG mode. The whole then computes nothing itself."""


def read_device(nvml: Any, index: int, handle: Any, ram_total_bytes: int, ram_usable_bytes: int) -> Gpu:
    """Everything that one device tells. Raises NVMLError if it is lost, or the driver went away meanwhile."""

    def asked(function: str, *arguments: Any) -> Any:
        return query_nvml(nvml, function, handle, *arguments)

    # A device that cannot even tell its name is lost: the error travels up.
    name = str(decode_text(nvml.nvmlDeviceGetName(handle)))
    total, free, reason, unified = _memory(nvml, handle, ram_total_bytes, ram_usable_bytes)
    capability = asked("nvmlDeviceGetCudaComputeCapability")
    power, limit = asked("nvmlDeviceGetPowerUsage"), asked("nvmlDeviceGetEnforcedPowerLimit")
    energy, utilisation = asked("nvmlDeviceGetTotalEnergyConsumption"), asked("nvmlDeviceGetUtilizationRates")
    reasons = asked("nvmlDeviceGetCurrentClocksEventReasons")
    mig, ecc = asked("nvmlDeviceGetMigMode"), asked("nvmlDeviceGetEccMode")
    errors = asked("nvmlDeviceGetTotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
    processes = asked("nvmlDeviceGetComputeRunningProcesses")
    return Gpu(
        index=index,
        name=name,
        uuid=decode_text(asked("nvmlDeviceGetUUID")),
        compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        memory_total_bytes=total,
        memory_free_bytes=free,
        memory_reason=reason,
        unified_memory=unified,
        power_watts=None if power is None else power / 1000,
        power_limit_watts=None if limit is None else limit / 1000,
        utilisation=None if utilisation is None else utilisation.gpu / 100,
        temperature_celsius=asked("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        throttled=None if reasons is None else tuple(text for bit, text in _THROTTLES.items() if reasons & bit),
        mig_enabled=None if mig is None else bool(mig[0]),
        ecc_enabled=None if ecc is None else bool(ecc[0]),
        ecc_uncorrected_errors=errors,
        energy_joules=None if energy is None else energy / 1000,
        nvlinks=_links(nvml, handle),
        numa_node=asked("nvmlDeviceGetNumaNodeId"),
        processes=None if processes is None else tuple(GpuProcess(one.pid, one.usedGpuMemory) for one in processes),
        mig_devices=tuple(_read_mig_device(nvml, part, found) for part, found in list_mig_handles(nvml, handle)),
    )


def query_nvml(nvml: Any, function: str, *arguments: Any) -> Any:
    """The answer, or None if the device, the driver or the bindings do not know. Raises where they are gone."""
    asked: Callable[..., Any] | None = getattr(nvml, function, None)
    if asked is None:
        return None
    try:
        return asked(*arguments)
    except nvml.NVMLError as error:
        if is_device_gone(nvml, error):
            raise
        return None


def is_device_gone(nvml: Any, error: Any) -> bool:
    """Whether the error means that the device or the driver is no longer there, rather than that it does not know."""
    return error.value in {getattr(nvml, name) for name in _GONE}


def decode_text(text: str | bytes | None) -> str | None:
    """Older bindings answer in bytes."""
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text


def _memory(
    nvml: Any, handle: Any, ram_total_bytes: int, ram_usable_bytes: int
) -> tuple[int | None, int | None, str, bool]:
    """Total, free, the reason, and whether the memory is the machine's own."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError as error:
        if is_device_gone(nvml, error):
            raise
        if error.value == nvml.NVML_ERROR_NOT_SUPPORTED:
            reason = "the device shares the machine's memory and reports none of its own: what RAM has usable counts"
            return ram_total_bytes, ram_usable_bytes, reason, True
        return None, None, f"unknown, so nothing counts as free: {error}", False
    return int(memory.total), int(memory.free), "as NVML reports", False


def _links(nvml: Any, handle: Any) -> int | None:
    states = []
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        state = query_nvml(nvml, "nvmlDeviceGetNvLinkState", handle, link)
        if state is None:  # no such link: they are numbered without gaps
            break
        states.append(state)
    return sum(state == nvml.NVML_FEATURE_ENABLED for state in states) if states else None


def list_mig_handles(nvml: Any, handle: Any) -> Iterator[tuple[int, Any]]:
    """Index and handle of each part of a device in MIG mode. Raises NVMLError if the device is gone."""
    mode = query_nvml(nvml, "nvmlDeviceGetMigMode", handle)
    if not mode or not mode[0]:
        return
    for index in range(query_nvml(nvml, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
        part = query_nvml(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
        if part is not None:  # else this slot is not set up
            yield index, part


def _read_mig_device(nvml: Any, index: int, part: Any) -> MigDevice:
    memory, attributes = (
        query_nvml(nvml, function, part) for function in ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetAttributes_v2")
    )
    return MigDevice(
        index=index,
        name=str(decode_text(query_nvml(nvml, "nvmlDeviceGetName", part)) or "MIG device"),
        uuid=decode_text(query_nvml(nvml, "nvmlDeviceGetUUID", part)),
        memory_total_bytes=None if memory is None else int(memory.total),
        memory_free_bytes=None if memory is None else int(memory.free),
        multiprocessors=None if attributes is None else int(attributes.multiprocessorCount),
    )
