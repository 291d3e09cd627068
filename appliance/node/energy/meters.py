"""What this machine has used of energy, as its own meters tell it: NVML for GPUs, RAPL for processors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from appliance.node.hardware.kernel_files import read_kernel_file
from appliance.node.hardware.nvidia_device import NvmlSession, decode_text, list_mig_handles, query_nvml

CPU_METER: Final = "cpu"
"""All processor packages together, with their memory where that is metered apart."""


@dataclass(frozen=True, slots=True)
class MeterReading:
    """One meter at one moment. A meter without a counter tells its power alone."""

    meter: str
    joules: float | None
    """Since some moment in the past; what something cost is the difference of two readings."""
    watts: float | None = None
    wraps_joules: float | None = None
    """Where the counter begins again at 0."""
    covers: frozenset[str] = frozenset()
    """Devices whose use it counts, by the names that CUDA_VISIBLE_DEVICES takes: a GPU, and the parts of it."""
    limit_watts: float | None = None


class NvmlMeters:
    """The GPUs' meters. A driver or a device that goes away has no reading, and one again when it is back."""

    def __init__(self, nvml: Any | None) -> None:
        self._nvml = nvml
        self._session = None if nvml is None else NvmlSession(nvml)

    def read(self) -> Sequence[MeterReading]:
        """Microseconds a device. Not for several threads at once."""
        nvml, session = self._nvml, self._session
        if nvml is None or session is None:
            return ()
        found = []
        try:
            session.open()
            for index in range(nvml.nvmlDeviceGetCount()):
                try:
                    found.append(_gpu_reading(nvml, index))
                except nvml.NVMLError as error:
                    if error.value in (nvml.NVML_ERROR_UNINITIALIZED, nvml.NVML_ERROR_DRIVER_NOT_LOADED):
                        raise
        except nvml.NVMLError:
            session.close()
            return ()
        return found

    def close(self) -> None:
        if self._session is not None:
            self._session.close()


def _gpu_reading(nvml: Any, index: int) -> MeterReading:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    uuid = decode_text(query_nvml(nvml, "nvmlDeviceGetUUID", handle)) or str(index)
    millijoules = query_nvml(nvml, "nvmlDeviceGetTotalEnergyConsumption", handle)
    milliwatts = query_nvml(nvml, "nvmlDeviceGetPowerUsage", handle)
    parts = {decode_text(query_nvml(nvml, "nvmlDeviceGetUUID", part)) for _, part in list_mig_handles(nvml, handle)}
    limit = query_nvml(nvml, "nvmlDeviceGetEnforcedPowerLimit", handle)
    return MeterReading(
        meter=f"gpu {uuid}",
        joules=None if millijoules is None else millijoules / 1000,
        watts=None if milliwatts is None else milliwatts / 1000,
        covers=frozenset({uuid, str(index), *filter(None, parts)}),
        limit_watts=None if limit is None else limit / 1000,
    )


@dataclass(frozen=True, slots=True)
class RaplZone:
    """One RAPL counter."""

    name: str
    folder: Path
    wraps_joules: float | None


@dataclass(frozen=True, slots=True)
class RaplZones:
    """The processors' counters, or why there are none that can be read."""

    zones: tuple[RaplZone, ...]
    reason: str


def find_rapl(root: Path = Path("/")) -> RaplZones:
    """Packages, and memory where it is metered apart (it is not in its package's counter). Intel's and AMD's processors
    both stand under the name intel-rapl; psys and cores are left out, since they would be counted twice.

    Since 2020 kernels let root alone read the counters: fine-grained power tells other programs' secrets.
    """
    folder = root / "sys/class/powercap"
    found = [zone for path in sorted(folder.glob("intel-rapl:*")) if (zone := _zone(path)) is not None]
    if not found:
        return RaplZones(
            (), "the kernel shows no power meter of the processor (/sys/class/powercap is empty or not there)"
        )
    for zone in found:
        try:
            (zone.folder / "energy_uj").read_bytes()
        except OSError as error:
            path = "/" + str((zone.folder / "energy_uj").relative_to(root))
            return RaplZones(
                (), f"{path} cannot be read ({error.strerror}): root alone may, unless others are allowed to"
            )
    return RaplZones(tuple(found), f"{len(found)} counters: {', '.join(zone.name for zone in found)}")


def _zone(folder: Path) -> RaplZone | None:
    name = read_kernel_file(folder / "name")
    if not name.startswith("package") and name != "dram":
        return None
    span = read_kernel_file(folder / "max_energy_range_uj")
    return RaplZone(name, folder, int(span) / 1e6 if span.isdigit() else None)


class RaplMeters:
    """The processors as one meter: readings that a counter's new beginning does not disturb."""

    def __init__(self, rapl: RaplZones) -> None:
        self._zones = rapl.zones
        self._before: dict[str, float] = {}
        self._joules = 0.0

    def read(self) -> Sequence[MeterReading]:
        """One reading for all zones, or none where one of them could not be read."""
        now: dict[str, float] = {}
        for zone in self._zones:
            text = read_kernel_file(zone.folder / "energy_uj")
            if not text.isdigit():
                self._before = {}
                return ()
            now[zone.folder.name] = int(text) / 1e6
        if not now:
            return ()
        for zone in self._zones:
            name = zone.folder.name
            grown = now[name] - self._before.get(name, now[name])
            self._joules += grown if grown >= 0 else grown + (zone.wraps_joules or -grown)
        self._before = now
        return (MeterReading(CPU_METER, self._joules),)
