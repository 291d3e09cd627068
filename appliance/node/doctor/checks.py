"""What is wrong with this machine, or may become so: facts in, findings with their remedies out. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

from appliance.node.doctor.findings import Finding
from appliance.node.doctor.gpu_checks import GpuFacts, check_gpus
from appliance.node.hardware.cpu import Cpu, Ram

AddressState = Literal["free", "ours", "taken", "unusable"]

_GIB: Final = 1 << 30
_LEAST_FREE_BYTES: Final = _GIB
_ROOMY_BYTES: Final = 10 * _GIB
_LEAST_RAM_BYTES: Final = _GIB
_ROOMY_RAM_BYTES: Final = 3 * _GIB
_FILES_BESIDES: Final = 256
"""Open files that are no connection: engines' sockets, the ledger, logs, libraries."""
_FILES_A_CONNECTION: Final = 2
"""The caller's, and the engine's or provider's behind it."""
_SKEW_SECONDS: Final = 5.0
_FIRST_SANE_AT: Final = 1_735_689_600.0
"""2025-01-01: before this release was written. A clock that says so was never set."""

_FASTER: Final = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "amx_int8": "AMX_INT8",
    "asimddp": "DOTPROD",
    "i8mm": "MATMUL_INT8",
    "sve": "SVE",
}
"""What the processor has, as the kernel names it -> as llama.cpp names it in what it was built with."""


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
    """None where the file system has no fixed number of them."""


@dataclass(frozen=True, slots=True)
class LedgerFacts:
    place: str
    problem: str | None = None
    """Why it cannot be read, with its remedy; None: it can, and its pages are sound."""
    exists: bool = True
    last_at: float | None = None
    """Wall clock of the newest request in it."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    name: str
    problem: str | None = None
    was_read: bool = True
    """False: too large to be read for a look; --full does."""


@dataclass(frozen=True, slots=True)
class EngineBuild:
    """llama.cpp as it was built, asked in a process of its own: one built for another processor dies of its first
    instruction."""

    features: frozenset[str] = frozenset()
    has_variants: bool = False
    """Built for many processors at once, of which it takes the best at start."""
    kernels: str = ""
    """Which of the engine's own compute beside llama.cpp's; empty: none."""
    kernels_missing: str = ""
    """Why none does."""
    kernels_remedy: str = ""
    """What would change that; empty where this machine could not run them."""
    exit_code: int | None = 0
    said: str = ""


@dataclass(frozen=True, slots=True)
class SecretFacts:
    """A provider's key or an own API key's place: whether it is there, and who may read it."""

    provider: str
    source: str
    problem: str | None = None
    mode: int | None = None
    """Of the file, where it lies in one."""


@dataclass(frozen=True, slots=True)
class DoctorFacts:
    """Everything that the checks look at."""

    cpu: Cpu
    ram: Ram
    gpus: GpuFacts
    place: FolderFacts
    ledger: LedgerFacts
    build: EngineBuild
    address: str
    """HOST:PORT that the node is to listen on."""
    address_held: AddressState
    has_keys: bool
    is_loopback: bool
    now_at: float
    monotonic_seconds: float
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
    """What is missing or of another version than it ought to be, one sentence each."""
    packages_seen: int = 0
    config_path: str | None = None
    config_mode: int | None = None
    config_problem: str | None = None
    quota_cores: float | None = None
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that steer threads, those that are set."""


def run_checks(facts: DoctorFacts) -> tuple[Finding, ...]:
    """All checks, in the order in which somebody would mend what they find."""
    checks = (
        _config,
        _place,
        _disk,
        _ledger,
        _clock,
        _address,
        _secrets,
        _processor,
        _memory,
        _build,
        _threads,
        _files,
        _packages,
        _models,
        _meter,
    )
    found = [finding for check in checks for finding in check(facts)]
    return (*found, *check_gpus(facts.gpus))


def _config(facts: DoctorFacts) -> Iterator[Finding]:
    if facts.config_problem is not None:
        yield Finding(
            "configuration", "error", facts.config_problem, "correct the file; everything below is by defaults"
        )
    elif facts.config_mode is not None and facts.config_mode & 0o022:
        yield Finding(
            "configuration",
            "error",
            f"{facts.config_path} may be changed by others (mode {facts.config_mode & 0o777:o}): prompts could leave",
            f"chmod go-w {facts.config_path}",
        )
    else:
        yield Finding("configuration", "ok", facts.config_path or "none: everything is by its default")


def _place(facts: DoctorFacts) -> Iterator[Finding]:
    place = facts.place
    if not place.is_writable:
        text = f"{place.path} cannot be written by this user"
        yield Finding("data directory", "error", text, "make it writable (chown), or choose another --data-dir")
    elif place.exists and place.mode & 0o022:
        text = f"{place.path} may be changed by others (mode {place.mode & 0o777:o})"
        yield Finding("data directory", "error", text, f"chmod go-w {place.path}")
    elif place.exists and not place.is_mine:
        text = f"{place.path} belongs to another user"
        yield Finding("data directory", "warning", text, "run the node as its owner, or chown it")
    elif place.exists and place.mode & 0o005:
        text = f"{place.path} may be read by everybody (mode {place.mode & 0o777:o}); files of jobs hold prompts"
        yield Finding("data directory", "warning", text, f"chmod o-rx {place.path}")
    else:
        yield Finding("data directory", "ok", place.path if place.exists else f"to be made in {place.path}")


def _disk(facts: DoctorFacts) -> Iterator[Finding]:
    place = facts.place
    text = f"{place.free_bytes / 1e9:.1f} GB are free at {place.path}"
    if place.free_bytes < _LEAST_FREE_BYTES:
        remedy = "free space: the ledger must be written before anything is sent to a hosted provider"
        yield Finding("disk", "error", text, remedy)
    elif place.free_inodes is not None and place.free_inodes < 1000:
        yield Finding("disk", "error", f"{place.free_inodes} more files fit at {place.path}", "delete files there")
    elif place.free_bytes < _ROOMY_BYTES:
        yield Finding("disk", "warning", text, "free space before pulling models: they take 0.1 to 250 GB each")
    else:
        yield Finding("disk", "ok", text)


def _ledger(facts: DoctorFacts) -> Iterator[Finding]:
    ledger = facts.ledger
    if ledger.problem is not None:
        what, _, remedy = ledger.problem.rpartition("; ")
        yield Finding("ledger", "error", what or ledger.problem, remedy if what else "check ledger.url")
    elif not ledger.exists:
        yield Finding("ledger", "ok", f"none yet; it is made at {ledger.place}")
    else:
        yield Finding("ledger", "ok", f"{ledger.place} is sound")


def _clock(facts: DoctorFacts) -> Iterator[Finding]:
    last = facts.ledger.last_at
    remedy = "set it, and keep it so: timedatectl set-ntp true"
    if facts.clock_steps_back:
        yield Finding(
            "clock", "error", "the monotonic clock goes backwards", "boot with another clock source (tsc, hpet)"
        )
    elif facts.now_at < _FIRST_SANE_AT:
        yield Finding("clock", "error", "the clock is set before 2025: budgets by day and TLS cannot work", remedy)
    elif last is not None and last > facts.now_at + _SKEW_SECONDS:
        behind = last - facts.now_at
        text = f"the clock is {behind:,.0f} s behind the newest request in the ledger: it was set back"
        yield Finding("clock", "error" if behind > 3600 else "warning", text, remedy)
    else:
        yield Finding("clock", "ok", "not behind the ledger, and steady")


def _address(facts: DoctorFacts) -> Iterator[Finding]:
    match facts.address_held:
        case "free":
            yield Finding("address", "ok", f"{facts.address} is free")
        case "ours":
            yield Finding("address", "ok", f"{facts.address} is held by the node that runs with this data directory")
        case "taken":
            text = f"another program listens on {facts.address}"
            yield Finding("address", "error", text, "end it (`ss -ltnp` tells which), or set server.port")
        case "unusable":
            text = f"{facts.address} cannot be listened on"
            yield Finding(
                "address", "error", text, "set server.host to an address of this machine, or a port above 1023"
            )
    if not facts.is_loopback and not facts.has_keys:
        text = f"{facts.address} is open to others and there are no API keys"
        yield Finding("API keys", "error", text, "appliance keys create NAME, or listen on 127.0.0.1")


def _secrets(facts: DoctorFacts) -> Iterator[Finding]:
    for secret in facts.secrets:
        name = f"key of {secret.provider}"
        if secret.problem is not None:
            yield Finding(name, "error", secret.problem, f"put the key into {secret.source}")
        elif secret.mode is not None and secret.mode & 0o077:
            text = f"{secret.source} may be read by others (mode {secret.mode & 0o777:o})"
            yield Finding(name, "warning", text, f"chmod 600 {secret.source}")
        else:
            yield Finding(name, "ok", f"from {secret.source}")


def _processor(facts: DoctorFacts) -> Iterator[Finding]:
    cpu, text = facts.cpu, f"{facts.cpu.usable_cores} usable cores: {facts.cpu.usable_reason}"
    if facts.quota_cores is not None and facts.quota_cores < 1:
        yield Finding(
            "processor",
            "warning",
            f"a cgroup allows {facts.quota_cores:g} of a core: answers will stall",
            "raise the limit (docker --cpus, systemd CPUQuota=) to at least one whole core",
        )
    elif not cpu.flags & {"avx2", "asimd"}:
        yield Finding(
            "processor", "warning", f"{text}; it has neither AVX2 nor NEON", "expect a tenth of the usual speed"
        )
    else:
        yield Finding("processor", "ok", text)


def _memory(facts: DoctorFacts) -> Iterator[Finding]:
    usable = facts.ram.usable_bytes
    text = f"{usable / 1e9:.1f} GB usable: {facts.ram.usable_reason}"
    limited = facts.ram.limit is not None and facts.ram.limit.left_bytes <= usable
    remedy = "raise the cgroup's limit (docker --memory, systemd MemoryMax=)" if limited else "end other programs"
    if usable < _LEAST_RAM_BYTES:
        yield Finding("memory", "error", text, f"{remedy}: the smallest model needs 1 GB with its cache")
    elif usable < _ROOMY_RAM_BYTES:
        yield Finding("memory", "warning", text, f"{remedy}, or keep to models below 1B parameters")
    else:
        yield Finding("memory", "ok", text)


def _build(facts: DoctorFacts) -> Iterator[Finding]:
    build = facts.build
    remedy = "rm -rf .venv ~/.cache/appliance/wheels && scripts/setup builds it for this processor"
    if build.exit_code == -4:
        text = "llama.cpp was built for another processor: it dies of an illegal instruction"
        yield Finding("llama.cpp", "error", text, remedy)
        return
    if build.exit_code != 0:
        yield Finding(
            "llama.cpp", "error", f"llama.cpp does not load: {build.said or build.exit_code}", "scripts/setup"
        )
        return
    missing = [name for flag, name in _FASTER.items() if flag in facts.cpu.flags and name not in build.features]
    if missing and not build.has_variants:
        text = f"llama.cpp was built without {', '.join(missing)}, which this processor has"
        yield Finding("llama.cpp", "warning", text, remedy)
    else:
        yield Finding("llama.cpp", "ok", f"built with {', '.join(sorted(build.features)) or 'variants'}")
    if build.kernels_remedy:
        text = f"the quicker kernels are not in use: {build.kernels_missing}"
        yield Finding("kernels", "warning", text, build.kernels_remedy)
    else:
        yield Finding("kernels", "ok", build.kernels or f"llama.cpp's own: {build.kernels_missing}")


def _threads(facts: DoctorFacts) -> Iterator[Finding]:
    set_here, cores = facts.environment, facts.cpu.usable_cores
    wanted = set_here.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > cores:
        text = f"OMP_NUM_THREADS={wanted} is more than the {cores} usable cores: threads would wait for each other"
        yield Finding("threads", "warning", text, "unset it: the node chooses its threads")
    elif set_here.get("OMP_WAIT_POLICY", "").lower() == "active":
        text = "OMP_WAIT_POLICY=active: waiting threads take the processor from the router"
        yield Finding("threads", "warning", text, "unset it, or set it to passive")
    elif pinned := sorted(set_here.keys() & {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"}):
        text = f"{', '.join(pinned)} would pin every engine to the same cores"
        yield Finding("threads", "warning", text, f"unset {' '.join(pinned)}")
    else:
        yield Finding("threads", "ok", "nothing in the environment steers them")


def _files(facts: DoctorFacts) -> Iterator[Finding]:
    needed = facts.max_connections * _FILES_A_CONNECTION + _FILES_BESIDES
    text = f"{facts.files_limit:,} open files are allowed, {needed:,} may be needed"
    if facts.files_limit < needed:
        remedy = f"ulimit -n {needed} (systemd: LimitNOFILE={needed}), or lower server.max_connections"
        level: Literal["error", "warning"] = "error" if facts.files_limit < _FILES_BESIDES else "warning"
        yield Finding("open files", level, text, remedy)
    else:
        yield Finding("open files", "ok", text)


def _packages(facts: DoctorFacts) -> Iterator[Finding]:
    for sentence in facts.packages:
        yield Finding("packages", "error", sentence, "scripts/setup")
    if not facts.packages:
        yield Finding("packages", "ok", f"{facts.packages_seen} are as pinned")


def _models(facts: DoctorFacts) -> Iterator[Finding]:
    for model in facts.models:
        if model.problem is not None:
            remedy = f"appliance models remove {model.name.split()[0]}, then pull it again"
            yield Finding("model", "error", f"{model.name}: {model.problem}", remedy)
    unread = [model.name for model in facts.models if not model.was_read]
    sound = len([model for model in facts.models if model.problem is None and model.was_read])
    if unread:
        text = f"{', '.join(unread)}: too large to be read just for a look"
        yield Finding("model", "ok", text, "appliance doctor --full reads all of them")
    if sound or not facts.models:
        yield Finding("model", "ok", f"{sound} lie here and are what was pulled" if sound else "none here yet")


def _meter(facts: DoctorFacts) -> Iterator[Finding]:
    if facts.has_cpu_meter:
        yield Finding("energy meter", "ok", f"processors are metered: {facts.cpu_meter}")
    else:
        text = f"the processors' energy is not metered: {facts.cpu_meter}"
        yield Finding("energy meter", "ok", text, "set watts_per_busy_core under [cost]")
