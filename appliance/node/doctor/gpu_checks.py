"""The doctor's checks of GPUs, their driver and vLLM. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from appliance.node.doctor.findings import Finding
from appliance.node.hardware.nvidia import Gpus
from appliance.node.hardware.nvidia_device import Gpu

_DRIVERS: Final = {11: 450, 12: 525, 13: 580}
"""CUDA's major version -> the oldest driver branch that runs programs built for it, as NVIDIA's compatibility table
has it (minor versions of one major version run on each other's drivers)."""
_OLDEST_CAPABILITY: Final = {11: 3.5, 12: 5.0, 13: 7.5}
"""The oldest devices that CUDA of a major version compiles for; 13 left Maxwell, Pascal and Volta behind."""
_LEAST_SHARED_BYTES: Final = 1 << 30
_MUCH_TAKEN: Final = 0.05


@dataclass(frozen=True, slots=True)
class VllmFacts:
    """The vLLM that the node would launch."""

    version: str
    folder: str
    is_cpu: bool
    cuda_major: int | None
    """Of the runtime that its packages carry; None where they carry none."""
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class GpuFacts:
    gpus: Gpus
    pci_devices: int
    """NVIDIA display and compute devices that the kernel sees on its buses, driver or not."""
    device_files: int
    """/dev/nvidia0 and so on, as this process sees them."""
    in_container: bool
    vllm: VllmFacts | None
    vllm_problem: str | None = None
    shared_memory_bytes: int | None = None
    """Of /dev/shm, which several GPUs' workers talk through."""


def check_gpus(facts: GpuFacts) -> Iterator[Finding]:
    """Nothing of a GPU is wrong on a machine that has none."""
    yield from _driver(facts)
    for gpu in facts.gpus.devices:
        yield from _device(gpu, facts)
    for lost in facts.gpus.lost:
        remedy = "nvidia-smi --gpu-reset" if lost.needs_reset else "reboot, and look for Xid in the kernel's log"
        yield Finding(f"GPU {lost.index}", "error", f"cannot be used: {lost.reason}", remedy)
    yield from _vllm(facts)
    if len(facts.gpus.devices) > 1 and facts.shared_memory_bytes is not None:
        yield from _shared_memory(facts.shared_memory_bytes)


def _driver(facts: GpuFacts) -> Iterator[Finding]:
    gpus = facts.gpus
    if gpus.driver is not None and gpus.devices:
        yield Finding(
            "GPU driver", "ok", f"driver {gpus.driver}, which runs CUDA {gpus.cuda or 'of an unknown version'}"
        )
    elif gpus.lost:
        yield Finding("GPU driver", "error", f"no device can be used: {gpus.reason}", "see the devices below")
    elif "different versions" in gpus.reason:
        yield Finding("GPU driver", "error", gpus.reason.removeprefix("none, because "), "reboot")
    elif not facts.pci_devices and not facts.device_files:
        yield Finding("GPU driver", "ok", f"no NVIDIA device in this machine ({gpus.reason})")
    elif facts.in_container:
        text = f"the machine has {facts.pci_devices or facts.device_files} NVIDIA devices and this container has none"
        remedy = "install NVIDIA's container toolkit on the host and start it with --gpus all"
        yield Finding("GPU driver", "error", f"{text}: {gpus.reason}", remedy)
    else:
        text = f"{facts.pci_devices or facts.device_files} NVIDIA devices without a working driver: {gpus.reason}"
        yield Finding("GPU driver", "error", text, "install NVIDIA's driver of branch 580 or newer, and reboot")


def _device(gpu: Gpu, facts: GpuFacts) -> Iterator[Finding]:
    name = f"GPU {gpu.index}"
    worst = list(_device_faults(gpu, name))
    yield from worst
    yield from _fit(gpu, name, facts.vllm)
    if not worst:
        free = "memory unknown" if gpu.memory_free_bytes is None else f"{gpu.memory_free_bytes / 1e9:.1f} GB free"
        meter = "energy counted" if gpu.energy_joules is not None else "no energy counter"
        yield Finding(name, "ok", f"{gpu.name}, {free}, {meter}")


def _device_faults(gpu: Gpu, name: str) -> Iterator[Finding]:
    if gpu.memory_total_bytes is None:
        yield Finding(name, "error", f"{gpu.name}: its memory is {gpu.memory_reason}", "reboot, or update the driver")
    if gpu.ecc_uncorrected_errors:
        text = f"{gpu.name}: {gpu.ecc_uncorrected_errors} uncorrected memory errors: its answers may be wrong"
        yield Finding(name, "error", text, "reset it (nvidia-smi --gpu-reset); if they come back, replace it")
    if gpu.throttled:
        text = f"{gpu.name} is slowed down: {', '.join(gpu.throttled)}"
        yield Finding(name, "warning", text, "look at its cooling and power limit (nvidia-smi -q -d PERFORMANCE)")
    if gpu.mig_enabled and not gpu.mig_devices:
        text = f"{gpu.name} is in MIG mode without a part set up: nothing can compute on it"
        yield Finding(name, "error", text, "nvidia-smi mig -cgi PROFILE -C, or nvidia-smi -mig 0")
    total, free = gpu.memory_total_bytes, gpu.memory_free_bytes
    if total and free is not None and not gpu.unified_memory and free < total * (1 - _MUCH_TAKEN):
        others = f" by {len(gpu.processes)} processes" if gpu.processes else ""
        text = f"{gpu.name}: {(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB are taken{others}"
        yield Finding(name, "warning", text, "unless that is this node: end them (nvidia-smi lists them)")


def _fit(gpu: Gpu, name: str, vllm: VllmFacts | None) -> Iterator[Finding]:
    oldest = None if vllm is None or vllm.cuda_major is None else _OLDEST_CAPABILITY.get(vllm.cuda_major)
    if oldest is not None and gpu.compute_capability is not None and float(gpu.compute_capability) < oldest:
        text = f"{gpu.name} has compute capability {gpu.compute_capability}; this vLLM's CUDA begins at {oldest:g}"
        yield Finding(name, "error", text, "serve GGUF variants on the processor, or use a newer GPU")


def _vllm(facts: GpuFacts) -> Iterator[Finding]:
    gpus, vllm = facts.gpus, facts.vllm
    if facts.vllm_problem is not None:
        yield Finding("vLLM", "error", facts.vllm_problem, "appliance engines install vllm, or correct engine.vllm")
    elif vllm is None and gpus.devices:
        yield Finding("vLLM", "warning", "GPUs, and no vLLM to use them", "appliance engines install vllm")
    elif vllm is None:
        yield Finding("vLLM", "ok", "not installed, and no GPU that would need it")
    elif not vllm.is_whole:
        text = f"the environment in {vllm.folder} was not finished"
        yield Finding("vLLM", "error", text, "appliance engines install vllm")
    elif vllm.is_cpu and gpus.devices:
        text = f"vLLM {vllm.version} is the build for CPUs: the GPUs are not used"
        yield Finding("vLLM", "warning", text, "appliance engines install vllm")
    elif not vllm.is_cpu and not gpus.devices:
        text = f"vLLM {vllm.version} is the build for GPUs, and there is none: it would not start"
        yield Finding("vLLM", "warning", text, "appliance engines remove vllm, or mend the driver")
    else:
        yield _cuda(vllm, gpus)


def _cuda(vllm: VllmFacts, gpus: Gpus) -> Finding:
    said = f"vLLM {vllm.version} in {vllm.folder}"
    if vllm.is_cpu or vllm.cuda_major is None:
        return Finding("vLLM", "ok", said)
    needed = _DRIVERS.get(vllm.cuda_major)
    driver = _major(gpus.driver)
    runs = _major(gpus.cuda)
    is_old = driver is not None and needed is not None and driver < needed
    if is_old or (needed is None and runs is not None and runs < vllm.cuda_major):
        text = f"{said} is built for CUDA {vllm.cuda_major}; driver {gpus.driver} runs CUDA up to {gpus.cuda}"
        return Finding("vLLM", "error", text, f"install a driver of branch {needed or 'newest'} or newer, and reboot")
    return Finding("vLLM", "ok", f"{said}, CUDA {vllm.cuda_major}, which driver {gpus.driver} runs")


def _shared_memory(found: int) -> Iterator[Finding]:
    text = f"/dev/shm holds {found / 1e9:.1f} GB"
    if found < _LEAST_SHARED_BYTES:
        remedy = "docker --ipc=host or --shm-size=8g; Kubernetes: an emptyDir with medium: Memory"
        yield Finding("shared memory", "warning", f"{text}: models split over several GPUs need more", remedy)
    else:
        yield Finding("shared memory", "ok", text)


def _major(version: str | None) -> int | None:
    head = (version or "").partition(".")[0]
    return int(head) if head.isdigit() else None
