"""What the doctor's checks look at, and what they find."""

from dataclasses import dataclass, field
from typing import Literal

from appliance.node.hardware.cpu import Cpu, Ram
from appliance.node.hardware.nvidia import Gpus

Level = Literal["ok", "warning", "error"]
AddressState = Literal["free", "ours", "taken", "unusable"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding of one check. `remedy` is empty only when there is nothing to do."""

    check: str
    level: Level
    text: str
    remedy: str = ""


def ok(check: str, text: str, remedy: str = "") -> Finding:
    return Finding(check, "ok", text, remedy)


def warning(check: str, text: str, remedy: str) -> Finding:
    return Finding(check, "warning", text, remedy)


def error(check: str, text: str, remedy: str) -> Finding:
    return Finding(check, "error", text, remedy)


@dataclass(frozen=True, slots=True)
class FolderFacts:
    """The data directory, or the nearest folder above it that exists."""

    path: str
    exists: bool
    is_writable: bool
    is_mine: bool
    mode: int
    free_bytes: int
    free_inodes: int | None
    """None if the file system has no fixed number of them."""


@dataclass(frozen=True, slots=True)
class LedgerFacts:
    """Whether the ledger can be read."""

    location: str
    problem: str | None = None
    """Why it cannot be read, with its remedy; None: it can, and its pages are sound."""
    exists: bool = True
    last_at: float | None = None
    """Wall clock of the newest request in it."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One model file or folder in the data directory."""

    name: str
    problem: str | None = None
    was_read: bool = True
    """False: too large to be read without --full."""


@dataclass(frozen=True, slots=True)
class EngineBuild:
    """llama.cpp as it was built.

    Read in a process of its own: a build for another processor dies of its first instruction.
    """

    features: frozenset[str] = frozenset()
    has_variants: bool = False
    """Built for many processors at once, of which it takes the best at start."""
    kernels: str = ""
    """Which of the engine's own compute beside llama.cpp's; empty: none."""
    kernels_missing: str = ""
    """Why none does."""
    kernels_remedy: str = ""
    """What would change that; empty if this machine could not run them."""
    exit_code: int | None = 0
    last_line: str = ""
    """Of what it wrote."""


@dataclass(frozen=True, slots=True)
class SecretFacts:
    """Where a provider's key lies, whether it is there, and who may read it."""

    provider: str
    source: str
    problem: str | None = None
    mode: int | None = None
    """Permissions of the file; None for a key in a variable."""


@dataclass(frozen=True, slots=True)
class VllmFacts:
    """The vLLM that the node would launch."""

    version: str
    folder: str
    is_cpu: bool
    cuda_major: int | None
    """Of the runtime that its packages carry; None if they carry none."""
    is_complete: bool = True


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """GPUs, their driver and the vLLM that would use them."""

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


@dataclass(frozen=True, slots=True)
class DoctorFacts:
    """Everything that the checks look at."""

    cpu: Cpu
    ram: Ram
    gpus: GpuFacts
    data_dir: FolderFacts
    ledger: LedgerFacts
    build: EngineBuild
    address: str
    """HOST:PORT that the node is to listen on."""
    address_state: AddressState
    has_keys: bool
    is_loopback: bool
    now_at: float
    clock_steps_back: bool
    """Whether the monotonic clock was seen to go backwards."""
    files_limit: int
    max_connections: int
    cpu_meter: str
    """Why energy of processors is or is not metered."""
    has_cpu_meter: bool
    secrets: tuple[SecretFacts, ...] = ()
    models: tuple[ModelFacts, ...] = ()
    packages: tuple[str, ...] = ()
    """Packages that are missing or of another version than pinned, one sentence each."""
    packages_seen: int = 0
    config_path: str | None = None
    config_mode: int | None = None
    config_problem: str | None = None
    quota_cores: float | None = None
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that steer threads, those that are set."""
