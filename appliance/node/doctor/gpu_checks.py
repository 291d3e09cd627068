"""The doctor's checks of GPUs, their driver and vLLM. Pure."""

from collections.abc import Callable, Iterator
from typing import Final

from appliance.node.doctor.models import Finding, GpuFacts, VllmFacts, error, ok, warning
from appliance.node.hardware.nvidia import Gpus
from appliance.node.hardware.nvidia_device import Gpu

_DRIVERS: Final = {11: 450, 12: 525, 13: 580}
"""CUDA's major version -> the oldest driver branch that runs programs built for it, as NVIDIA's compatibility table
has it (minor versions of one major version run on each other's drivers)."""
_OLDEST_CAPABILITY: Final = {11: 3.5, 12: 5.0, 13: 7.5}
"""The oldest devices that CUDA of a major version compiles for; 13 left Maxwell, Pascal and Volta behind."""
_MIN_SHARED_BYTES: Final = 1 << 30
_MUCH_TAKEN: Final = 0.05


def check_driver(facts: GpuFacts) -> Iterator[Finding]:
    gpus = facts.gpus
    if gpus.driver is not None and gpus.devices:
        yield ok("GPU driver", f"driver {gpus.driver}, which runs CUDA {gpus.cuda or 'of an unknown version'}")
    elif gpus.lost:
        yield error("GPU driver", f"no device can be used: {gpus.reason}", "see the devices below")
    elif "different versions" in gpus.reason:
        yield error("GPU driver", gpus.reason.removeprefix("none, because "), "reboot")
    elif not facts.pci_devices and not facts.device_files:
        yield ok("GPU driver", f"no NVIDIA device in this machine ({gpus.reason})")
    elif facts.in_container:
        text = f"the machine has {facts.pci_devices or facts.device_files} NVIDIA devices and this container has none"
        remedy = "install NVIDIA's container toolkit on the host and start it with --gpus all"
        yield error("GPU driver", f"{text}: {gpus.reason}", remedy)
    else:
        text = f"{facts.pci_devices or facts.device_files} NVIDIA devices without a working driver: {gpus.reason}"
        yield error("GPU driver", text, "install NVIDIA's driver of branch 580 or newer, and reboot")


def check_devices(facts: GpuFacts) -> Iterator[Finding]:
    for gpu in facts.gpus.devices:
        yield from _check_device(gpu, facts)


def check_lost_devices(facts: GpuFacts) -> Iterator[Finding]:
    for lost in facts.gpus.lost:
        remedy = "nvidia-smi --gpu-reset" if lost.needs_reset else "reboot, and look for Xid in the kernel's log"
        yield error(f"GPU {lost.index}", f"cannot be used: {lost.reason}", remedy)


def _check_device(gpu: Gpu, facts: GpuFacts) -> Iterator[Finding]:
    name = f"GPU {gpu.index}"
    worst = list(_find_device_faults(gpu, name))
    yield from worst
    yield from _check_capability(gpu, name, facts.vllm)
    if not worst:
        free = "memory unknown" if gpu.memory_free_bytes is None else f"{gpu.memory_free_bytes / 1e9:.1f} GB free"
        meter = "energy counted" if gpu.energy_joules is not None else "no energy counter"
        yield ok(name, f"{gpu.name}, {free}, {meter}")


def _find_device_faults(gpu: Gpu, name: str) -> Iterator[Finding]:
    if gpu.memory_total_bytes is None:
        yield error(name, f"{gpu.name}: its memory is {gpu.memory_reason}", "reboot, or update the driver")
    if gpu.ecc_uncorrected_errors:
        text = f"{gpu.name}: {gpu.ecc_uncorrected_errors} uncorrected memory errors: its answers may be wrong"
        yield error(name, text, "reset it (nvidia-smi --gpu-reset); if they come back, replace it")
    if gpu.throttled:
        text = f"{gpu.name} is slowed down: {', '.join(gpu.throttled)}"
        yield warning(name, text, "look at its cooling and power limit (nvidia-smi -q -d PERFORMANCE)")
    if gpu.mig_enabled and not gpu.mig_devices:
        text = f"{gpu.name} is in MIG mode without a part set up: nothing can compute on it"
        yield error(name, text, "nvidia-smi mig -cgi PROFILE -C, or nvidia-smi -mig 0")
    total, free = gpu.memory_total_bytes, gpu.memory_free_bytes
    if total and free is not None and not gpu.unified_memory and free < total * (1 - _MUCH_TAKEN):
        others = f" by {len(gpu.processes)} processes" if gpu.processes else ""
        text = f"{gpu.name}: {(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB are taken{others}"
        yield warning(name, text, "unless that is this node: end them (nvidia-smi lists them)")


def _check_capability(gpu: Gpu, name: str, vllm: VllmFacts | None) -> Iterator[Finding]:
    oldest = None if vllm is None or vllm.cuda_major is None else _OLDEST_CAPABILITY.get(vllm.cuda_major)
    if oldest is not None and gpu.compute_capability is not None and float(gpu.compute_capability) < oldest:
        text = f"{gpu.name} has compute capability {gpu.compute_capability}; this vLLM's CUDA begins at {oldest:g}"
        yield error(name, text, "serve GGUF variants on the processor, or use a newer GPU")


def check_vllm(facts: GpuFacts) -> Iterator[Finding]:
    gpus, vllm = facts.gpus, facts.vllm
    if facts.vllm_problem is not None:
        yield error("vLLM", facts.vllm_problem, "appliance engines install vllm, or correct engine.vllm")
    elif vllm is None and gpus.devices:
        yield warning("vLLM", "GPUs, and no vLLM to use them", "appliance engines install vllm")
    elif vllm is None:
        yield ok("vLLM", "not installed, and no GPU that would need it")
    elif not vllm.is_complete:
        text = f"the environment in {vllm.folder} was not finished"
        yield error("vLLM", text, "appliance engines install vllm")
    elif vllm.is_cpu and gpus.devices:
        text = f"vLLM {vllm.version} is the build for CPUs: the GPUs are not used"
        yield warning("vLLM", text, "appliance engines install vllm")
    elif not vllm.is_cpu and not gpus.devices:
        text = f"vLLM {vllm.version} is the build for GPUs, and there is none: it would not start"
        yield warning("vLLM", text, "appliance engines remove vllm, or mend the driver")
    else:
        yield _check_cuda(vllm, gpus)


def _check_cuda(vllm: VllmFacts, gpus: Gpus) -> Finding:
    name = f"vLLM {vllm.version} in {vllm.folder}"
    if vllm.is_cpu or vllm.cuda_major is None:
        return ok("vLLM", name)
    needed = _DRIVERS.get(vllm.cuda_major)
    driver = _major(gpus.driver)
    runs = _major(gpus.cuda)
    is_old = driver is not None and needed is not None and driver < needed
    if is_old or (needed is None and runs is not None and runs < vllm.cuda_major):
        text = f"{name} is built for CUDA {vllm.cuda_major}; driver {gpus.driver} runs CUDA up to {gpus.cuda}"
        return error("vLLM", text, f"install a driver of branch {needed or 'newest'} or newer, and reboot")
    return ok("vLLM", f"{name}, CUDA {vllm.cuda_major}, which driver {gpus.driver} runs")


def check_shared_memory(facts: GpuFacts) -> Iterator[Finding]:
    """Only machines with several GPUs need any."""
    found = facts.shared_memory_bytes
    if len(facts.gpus.devices) < 2 or found is None:
        return
    text = f"/dev/shm holds {found / 1e9:.1f} GB"
    if found < _MIN_SHARED_BYTES:
        remedy = "docker --ipc=host or --shm-size=8g; Kubernetes: an emptyDir with medium: Memory"
        yield warning("shared memory", f"{text}: models split over several GPUs need more", remedy)
    else:
        yield ok("shared memory", text)


def _major(version: str | None) -> int | None:
    head = (version or "").partition(".")[0]
    return int(head) if head.isdigit() else None


GPU_CHECKS: Final[tuple[Callable[[GpuFacts], Iterator[Finding]], ...]] = (
    check_driver,
    check_devices,
    check_lost_devices,
    check_vllm,
    check_shared_memory,
)


def check_gpus(facts: GpuFacts) -> Iterator[Finding]:
    """All checks of GPUs. On a machine without any, nothing is wrong with them."""
    for check in GPU_CHECKS:
        yield from check(facts)
