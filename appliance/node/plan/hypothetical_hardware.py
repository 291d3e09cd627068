"""A machine that is not at hand, as the catalogue describes its class: for planning before buying. Pure."""

from dataclasses import replace
from typing import Final

from appliance.catalog import DevicePrior
from appliance.node.hardware.cpu import Cpu, Ram
from appliance.node.hardware.nvidia import Gpus
from appliance.node.hardware.nvidia_device import Gpu
from appliance.node.hardware.probe import Hardware

_HOST_CORES: Final = 16
_HOST_BYTES_BESIDE_GPU: Final = 64 * (1 << 30)
"""RAM of the host of a GPU, besides as much again as the GPU has."""
_FREE: Final = 0.92
"""Of RAM, while nothing but the operating system runs."""


def build_hypothetical_hardware(
    prior: DevicePrior, *, gpus: int = 1, cores: int | None = None, memory_bytes: int | None = None
) -> Hardware:
    """A machine with `gpus` devices of this class, or a processor of it. `cores` and `memory_bytes` (RAM) override what
    the class is likely to have; nothing else runs on it."""
    cores = cores or prior.cores or _HOST_CORES
    own = prior.memory_bytes or 0
    if memory_bytes is None:
        is_host = prior.kind == "gpu" and not prior.unified_memory
        memory_bytes = own * gpus + _HOST_BYTES_BESIDE_GPU if is_host else own
    usable = int(memory_bytes * _FREE)
    why = f"{usable:,} of {memory_bytes:,} bytes are taken to be available"
    cpu = Cpu(
        model=prior.title if prior.kind == "cpu" else f"the host of {prior.title}",
        architecture="imagined",
        physical_cores=cores,
        logical_cores=cores,
        usable_cores=cores,
        usable_reason=f"{cores} physical cores",
        threads_per_core=1,
        numa_nodes=1,
        flags=frozenset(prior.flags),
    )
    ram = Ram(memory_bytes, usable, None, usable, why)
    if prior.kind == "cpu":
        return Hardware(cpu, ram, Gpus((), "none: it is a class of processors"))
    one = _gpu(prior, usable)
    devices = tuple(replace(one, index=index, uuid=str(index)) for index in range(gpus))
    return Hardware(cpu, ram, Gpus(devices, f"{gpus} of {gpus} devices, imagined"))


def _gpu(prior: DevicePrior, ram_usable_bytes: int) -> Gpu:
    total = prior.memory_bytes or 0
    return Gpu(
        index=0,
        name=prior.title,
        uuid="0",
        compute_capability=prior.compute_capability,
        memory_total_bytes=total,
        memory_free_bytes=ram_usable_bytes if prior.unified_memory else total,
        memory_reason="as its class is described",
        unified_memory=prior.unified_memory,
        power_watts=None,
        power_limit_watts=None if prior.power_watts is None else float(prior.power_watts),
        utilisation=0.0,
        temperature_celsius=None,
        throttled=(),
        mig_enabled=False,
        ecc_enabled=None,
        ecc_uncorrected_errors=None,
    )
