"""NVIDIA devices through NVML. What a device does not tell is None, and unknown memory is never called free."""

import ctypes
from collections.abc import Callable
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


@dataclass(frozen=True, slots=True)
class Gpus:
    devices: tuple[Gpu, ...]
    reason: str
    """How many there are, or why there is none."""
    driver: str | None = None
    cuda: str | None = None
    """The newest CUDA that the driver can run."""


_NO_LIBRARY: Final = "the driver's library (libnvidia-ml) is not installed"


def load_nvml() -> Any | None:
    """The bindings, or None where the driver's library is not there: then their 12 MB need not be in memory."""
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
    if nvml is None:
        return Gpus((), f"none, because {_NO_LIBRARY}")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Gpus((), _why_none(error, nvml))
    try:
        driver = _ask(nvml, nvml.nvmlSystemGetDriverVersion)
        version = _ask(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
        cuda = None if version is None else f"{version // 1000}.{version % 1000 // 10}"
        try:
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            return Gpus((), f"none, because the driver cannot count its devices: {error}", _word(driver), cuda)
        devices, lost = [], []
        for index in range(count):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                devices.append(_read_device(nvml, index, handle, ram_total_bytes, ram_usable_bytes))
            except nvml.NVMLError as error:
                lost.append(f"device {index} cannot be read: {error}")
        reason = f"{len(devices)} of {count} devices" if devices or lost else "none, because the driver sees no device"
        return Gpus(tuple(devices), "; ".join([reason, *lost]), _word(driver), cuda)
    finally:
        _ask(nvml, nvml.nvmlShutdown)


def _read_device(nvml: Any, index: int, handle: Any, ram_total_bytes: int, ram_usable_bytes: int) -> Gpu:
    def ask(function: Callable[..., Any], *arguments: Any) -> Any:
        return _ask(nvml, function, handle, *arguments)

    total, free, reason, unified = _memory(nvml, handle, ram_total_bytes, ram_usable_bytes)
    capability = ask(nvml.nvmlDeviceGetCudaComputeCapability)
    power, limit = ask(nvml.nvmlDeviceGetPowerUsage), ask(nvml.nvmlDeviceGetEnforcedPowerLimit)
    utilisation = ask(nvml.nvmlDeviceGetUtilizationRates)
    reasons = ask(nvml.nvmlDeviceGetCurrentClocksEventReasons)
    mig, ecc = ask(nvml.nvmlDeviceGetMigMode), ask(nvml.nvmlDeviceGetEccMode)
    errors = ask(nvml.nvmlDeviceGetTotalEccErrors, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
    return Gpu(
        index=index,
        # A device that cannot even tell its name is lost: the error travels up.
        name=str(_word(nvml.nvmlDeviceGetName(handle))),
        uuid=_word(ask(nvml.nvmlDeviceGetUUID)),
        compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        memory_total_bytes=total,
        memory_free_bytes=free,
        memory_reason=reason,
        unified_memory=unified,
        power_watts=None if power is None else power / 1000,
        power_limit_watts=None if limit is None else limit / 1000,
        utilisation=None if utilisation is None else utilisation.gpu / 100,
        temperature_celsius=ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        throttled=None if reasons is None else tuple(text for bit, text in _THROTTLES.items() if reasons & bit),
        mig_enabled=None if mig is None else bool(mig[0]),
        ecc_enabled=None if ecc is None else bool(ecc[0]),
        ecc_uncorrected_errors=errors,
    )


def _memory(
    nvml: Any, handle: Any, ram_total_bytes: int, ram_usable_bytes: int
) -> tuple[int | None, int | None, str, bool]:
    """Total, free, the reason, and whether the memory is the machine's own."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError as error:
        if error.value == nvml.NVML_ERROR_NOT_SUPPORTED:
            reason = "the device shares the machine's memory and reports none of its own: what RAM has usable counts"
            return ram_total_bytes, ram_usable_bytes, reason, True
        return None, None, f"unknown, so nothing counts as free: {error}", False
    return int(memory.total), int(memory.free), "as NVML reports", False


def _ask(nvml: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None where the device or the driver does not know."""
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None


def _word(text: str | bytes | None) -> str | None:
    """Older bindings answer in bytes."""
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text


def _why_none(error: Any, nvml: Any) -> str:
    known = {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: _NO_LIBRARY,
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded",
        nvml.NVML_ERROR_NO_PERMISSION: "this user may not talk to the driver",
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
            "the driver in the kernel and its library are of different versions: reboot, or reload the driver"
        ),
        nvml.NVML_ERROR_GPU_NOT_FOUND: "the driver sees no device",
    }
    return f"none, because {known.get(error.value, f'NVML does not start: {error}')}"
