"""The doctor's checks: one function a check, facts in, findings with their remedies out. Pure.

A new check is a function here and a place in `CHECKS`; facts it needs are fields of `DoctorFacts` that `gather` fills.
"""

from collections.abc import Callable, Iterator
from typing import Final

from appliance.node.doctor.gpu_checks import check_gpus
from appliance.node.doctor.models import DoctorFacts, Finding, error, ok, warning

_GIB: Final = 1 << 30
_MIN_FREE_BYTES: Final = _GIB
_COMFORTABLE_BYTES: Final = 10 * _GIB
_MIN_RAM_BYTES: Final = _GIB
_COMFORTABLE_RAM_BYTES: Final = 3 * _GIB
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


def check_configuration(facts: DoctorFacts) -> Iterator[Finding]:
    if facts.config_problem is not None:
        yield error("configuration", facts.config_problem, "correct the file; everything below is by defaults")
    elif facts.config_mode is not None and facts.config_mode & 0o022:
        yield error(
            "configuration",
            f"{facts.config_path} may be changed by others (mode {facts.config_mode & 0o777:o}): prompts could leave",
            f"chmod go-w {facts.config_path}",
        )
    else:
        yield ok("configuration", facts.config_path or "none: everything is by its default")


def check_data_directory(facts: DoctorFacts) -> Iterator[Finding]:
    folder = facts.data_dir
    if not folder.is_writable:
        text = f"{folder.path} cannot be written by this user"
        yield error("data directory", text, "make it writable (chown), or choose another --data-dir")
    elif folder.exists and folder.mode & 0o022:
        text = f"{folder.path} may be changed by others (mode {folder.mode & 0o777:o})"
        yield error("data directory", text, f"chmod go-w {folder.path}")
    elif folder.exists and not folder.is_mine:
        text = f"{folder.path} belongs to another user"
        yield warning("data directory", text, "run the node as its owner, or chown it")
    elif folder.exists and folder.mode & 0o005:
        text = f"{folder.path} may be read by everybody (mode {folder.mode & 0o777:o}); files of jobs hold prompts"
        yield warning("data directory", text, f"chmod o-rx {folder.path}")
    else:
        yield ok("data directory", folder.path if folder.exists else f"to be made in {folder.path}")


def check_disk(facts: DoctorFacts) -> Iterator[Finding]:
    folder = facts.data_dir
    text = f"{folder.free_bytes / 1e9:.1f} GB are free at {folder.path}"
    if folder.free_bytes < _MIN_FREE_BYTES:
        remedy = "free space: the ledger must be written before anything is sent to a hosted provider"
        yield error("disk", text, remedy)
    elif folder.free_inodes is not None and folder.free_inodes < 1000:
        yield error("disk", f"{folder.free_inodes} more files fit at {folder.path}", "delete files there")
    elif folder.free_bytes < _COMFORTABLE_BYTES:
        yield warning("disk", text, "free space before pulling models: they take 0.1 to 250 GB each")
    else:
        yield ok("disk", text)


def check_ledger(facts: DoctorFacts) -> Iterator[Finding]:
    ledger = facts.ledger
    if ledger.problem is not None:
        what, _, remedy = ledger.problem.rpartition("; ")
        yield error("ledger", what or ledger.problem, remedy if what else "check ledger.url")
    elif not ledger.exists:
        yield ok("ledger", f"none yet; it is made at {ledger.location}")
    else:
        yield ok("ledger", f"{ledger.location} is sound")


def check_clock(facts: DoctorFacts) -> Iterator[Finding]:
    last = facts.ledger.last_at
    remedy = "set it, and keep it so: timedatectl set-ntp true"
    if facts.clock_steps_back:
        yield error("clock", "the monotonic clock goes backwards", "boot with another clock source (tsc, hpet)")
    elif facts.now_at < _FIRST_SANE_AT:
        yield error("clock", "the clock is set before 2025: budgets by day and TLS cannot work", remedy)
    elif last is not None and last > facts.now_at + _SKEW_SECONDS:
        behind = last - facts.now_at
        text = f"the clock is {behind:,.0f} s behind the newest request in the ledger: it was set back"
        yield (error if behind > 3600 else warning)("clock", text, remedy)
    else:
        yield ok("clock", "not behind the ledger, and steady")


def check_address(facts: DoctorFacts) -> Iterator[Finding]:
    match facts.address_state:
        case "free":
            yield ok("address", f"{facts.address} is free")
        case "ours":
            yield ok("address", f"{facts.address} is held by the node that runs with this data directory")
        case "taken":
            text = f"another program listens on {facts.address}"
            yield error("address", text, "end it (`ss -ltnp` tells which), or set server.port")
        case "unusable":
            text = f"{facts.address} cannot be listened on"
            yield error("address", text, "set server.host to an address of this machine, or a port above 1023")


def check_api_keys(facts: DoctorFacts) -> Iterator[Finding]:
    if not facts.is_loopback and not facts.has_keys:
        text = f"{facts.address} is open to others and there are no API keys"
        yield error("API keys", text, "appliance keys create NAME, or listen on 127.0.0.1")


def check_provider_keys(facts: DoctorFacts) -> Iterator[Finding]:
    for secret in facts.secrets:
        name = f"key of {secret.provider}"
        if secret.problem is not None:
            yield error(name, secret.problem, f"put the key into {secret.source}")
        elif secret.mode is not None and secret.mode & 0o077:
            text = f"{secret.source} may be read by others (mode {secret.mode & 0o777:o})"
            yield warning(name, text, f"chmod 600 {secret.source}")
        else:
            yield ok(name, f"from {secret.source}")


def check_processor(facts: DoctorFacts) -> Iterator[Finding]:
    cpu, text = facts.cpu, f"{facts.cpu.usable_cores} usable cores: {facts.cpu.usable_reason}"
    if facts.quota_cores is not None and facts.quota_cores < 1:
        yield warning(
            "processor",
            f"a cgroup allows {facts.quota_cores:g} of a core: answers will stall",
            "raise the limit (docker --cpus, systemd CPUQuota=) to at least one whole core",
        )
    elif not cpu.flags & {"avx2", "asimd"}:
        yield warning("processor", f"{text}; it has neither AVX2 nor NEON", "expect a tenth of the usual speed")
    else:
        yield ok("processor", text)


def check_memory(facts: DoctorFacts) -> Iterator[Finding]:
    usable = facts.ram.usable_bytes
    text = f"{usable / 1e9:.1f} GB usable: {facts.ram.usable_reason}"
    limited = facts.ram.limit is not None and facts.ram.limit.left_bytes <= usable
    remedy = "raise the cgroup's limit (docker --memory, systemd MemoryMax=)" if limited else "end other programs"
    if usable < _MIN_RAM_BYTES:
        yield error("memory", text, f"{remedy}: the smallest model needs 1 GB with its cache")
    elif usable < _COMFORTABLE_RAM_BYTES:
        yield warning("memory", text, f"{remedy}, or keep to models below 1B parameters")
    else:
        yield ok("memory", text)


def check_engine_build(facts: DoctorFacts) -> Iterator[Finding]:
    build = facts.build
    remedy = "rm -rf .venv ~/.cache/appliance/wheels && scripts/setup builds it for this processor"
    if build.exit_code == -4:
        text = "llama.cpp was built for another processor: it dies of an illegal instruction"
        yield error("llama.cpp", text, remedy)
        return
    if build.exit_code != 0:
        yield error("llama.cpp", f"llama.cpp does not load: {build.last_line or build.exit_code}", "scripts/setup")
        return
    missing = [name for flag, name in _FASTER.items() if flag in facts.cpu.flags and name not in build.features]
    if missing and not build.has_variants:
        text = f"llama.cpp was built without {', '.join(missing)}, which this processor has"
        yield warning("llama.cpp", text, remedy)
    else:
        yield ok("llama.cpp", f"built with {', '.join(sorted(build.features)) or 'variants'}")


def check_kernels(facts: DoctorFacts) -> Iterator[Finding]:
    build = facts.build
    if build.exit_code != 0:
        return  # then nothing is known of them
    if build.kernels_remedy:
        text = f"the quicker kernels are not in use: {build.kernels_missing}"
        yield warning("kernels", text, build.kernels_remedy)
    else:
        yield ok("kernels", build.kernels or f"llama.cpp's own: {build.kernels_missing}")


def check_thread_variables(facts: DoctorFacts) -> Iterator[Finding]:
    variables, cores = facts.environment, facts.cpu.usable_cores
    wanted = variables.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > cores:
        text = f"OMP_NUM_THREADS={wanted} is more than the {cores} usable cores: threads would wait for each other"
        yield warning("threads", text, "unset it: the node chooses its threads")
    elif variables.get("OMP_WAIT_POLICY", "").lower() == "active":
        text = "OMP_WAIT_POLICY=active: waiting threads take the processor from the router"
        yield warning("threads", text, "unset it, or set it to passive")
    elif pinned := sorted(variables.keys() & {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"}):
        text = f"{', '.join(pinned)} would pin every engine to the same cores"
        yield warning("threads", text, f"unset {' '.join(pinned)}")
    else:
        yield ok("threads", "nothing in the environment steers them")


def check_open_files(facts: DoctorFacts) -> Iterator[Finding]:
    needed = facts.max_connections * _FILES_A_CONNECTION + _FILES_BESIDES
    text = f"{facts.files_limit:,} open files are allowed, {needed:,} may be needed"
    if facts.files_limit < needed:
        remedy = f"ulimit -n {needed} (systemd: LimitNOFILE={needed}), or lower server.max_connections"
        yield (error if facts.files_limit < _FILES_BESIDES else warning)("open files", text, remedy)
    else:
        yield ok("open files", text)


def check_packages(facts: DoctorFacts) -> Iterator[Finding]:
    for sentence in facts.packages:
        yield error("packages", sentence, "scripts/setup")
    if not facts.packages:
        yield ok("packages", f"{facts.packages_seen} are as pinned")


def check_models(facts: DoctorFacts) -> Iterator[Finding]:
    for model in facts.models:
        if model.problem is not None:
            remedy = f"appliance models remove {model.name.split()[0]}, then pull it again"
            yield error("model", f"{model.name}: {model.problem}", remedy)
    unread = [model.name for model in facts.models if not model.was_read]
    sound = len([model for model in facts.models if model.problem is None and model.was_read])
    if unread:
        text = f"{', '.join(unread)}: too large to be read just for a look"
        yield ok("model", text, "appliance doctor --full reads all of them")
    if sound or not facts.models:
        yield ok("model", f"{sound} lie here and are what was pulled" if sound else "none here yet")


def check_energy_meter(facts: DoctorFacts) -> Iterator[Finding]:
    if facts.has_cpu_meter:
        yield ok("energy meter", f"processors are metered: {facts.cpu_meter}")
    else:
        text = f"the processors' energy is not metered: {facts.cpu_meter}"
        yield ok("energy meter", text, "set watts_per_busy_core under [cost]")


CHECKS: Final[tuple[Callable[[DoctorFacts], Iterator[Finding]], ...]] = (
    check_configuration,
    check_data_directory,
    check_disk,
    check_ledger,
    check_clock,
    check_address,
    check_api_keys,
    check_provider_keys,
    check_processor,
    check_memory,
    check_engine_build,
    check_kernels,
    check_thread_variables,
    check_open_files,
    check_packages,
    check_models,
    check_energy_meter,
    lambda facts: check_gpus(facts.gpus),
)
"""In the order in which an operator would mend what they find."""


def run_checks(facts: DoctorFacts) -> tuple[Finding, ...]:
    """The findings of all checks."""
    return tuple(finding for check in CHECKS for finding in check(facts))
