"""Gathers the doctor's facts from this machine. Changes nothing, and does not raise for what a check may report."""

import errno
import fcntl
import hashlib
import importlib.metadata
import itertools
import os
import re
import resource
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sqlalchemy import func, select, text
from sqlalchemy.exc import SQLAlchemyError

from appliance.config import EngineSettings, NodeConfig, Provider
from appliance.config.loader import read_secret
from appliance.errors import ApplianceError, ConfigError, LedgerUnavailable
from appliance.ledger.database import describe_place, explaining_errors, open_reader
from appliance.ledger.keys import list_keys
from appliance.ledger.tables import decisions
from appliance.node.doctor.models import (
    AddressState,
    DoctorFacts,
    EngineBuild,
    FolderFacts,
    GpuFacts,
    LedgerFacts,
    ModelFacts,
    SecretFacts,
    VllmFacts,
)
from appliance.node.energy.meters import find_rapl
from appliance.node.hardware.cgroup import read_cpu_quota
from appliance.node.hardware.kernel_files import read_kernel_file
from appliance.node.hardware.nvidia import Gpus
from appliance.node.hardware.probe import probe_hardware
from appliance.node.models.gguf_header import read_gguf_header
from appliance.node.models.hf_folder import check_weight_files
from appliance.node.models.model_store import ModelStore, StoredModel
from appliance.node.vllm.environments import select_installed
from appliance.node.vllm.install import is_complete

_QUICK_READ_BYTES: Final = 1 << 30
_QUICK_CHECK_BYTES: Final = 256 << 20
"""A ledger of this size is gone through in about two seconds."""
_THREAD_VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
)
_NVIDIA_VENDOR: Final = "0x10de"
_DISPLAY_CLASS: Final = "0x03"
_ASK_BUILD: Final = """
import importlib.util, pathlib
found = importlib.util.find_spec("llama_cpp")
if found is None:
    raise SystemExit("llama-cpp-python is not installed")
package = pathlib.Path(found.origin).parent
folders = [package / "lib", *(parent / "ggml" for parent in package.parents)]
if any(len(list(folder.glob("libggml-cpu-*.so"))) > 1 for folder in folders):
    print("variants")
import llama_cpp
llama_cpp.llama_backend_init()
print(llama_cpp.llama_print_system_info().decode())
from appliance.llamacpp.kernels import install_kernels
kernels = install_kernels()
print("kernels", kernels.summary if kernels.names else "", kernels.reason, kernels.remedy, sep="\t")
"""
_BUILD_SECONDS: Final = 60.0
_RUNTIME: Final = re.compile(r"nvidia_cuda_runtime(?:_cu\d+)?-(?P<major>\d+)\.")


def gather_facts(
    config: NodeConfig,
    home: Path,
    *,
    ledger_url: str,
    is_loopback: bool,
    config_path: Path | None,
    config_problem: str | None,
    full: bool,
) -> DoctorFacts:
    """Read everything. Seconds: models up to 1 GB are read, all of them with `full`."""
    hardware, rapl, quota = probe_hardware(), find_rapl(), read_cpu_quota(Path("/"))
    (missing, seen), server = _packages(), config.server
    return DoctorFacts(
        cpu=hardware.cpu,
        ram=hardware.ram,
        gpus=read_gpu_facts(hardware.gpus, config.engine, home),
        data_dir=read_folder_facts(home),
        ledger=read_ledger_facts(ledger_url, full=full),
        build=read_engine_build(),
        address=f"{server.host}:{server.port}",
        address_state=read_address_state(server.host, server.port, home),
        has_keys=bool(config.keys) or _has_stored_keys(ledger_url),
        is_loopback=is_loopback,
        now_at=time.time(),
        clock_steps_back=_steps_back(),
        files_limit=_files_limit(),
        max_connections=server.max_connections,
        cpu_meter=rapl.reason,
        has_cpu_meter=bool(rapl.zones),
        secrets=tuple(read_secret_facts(one) for one in config.providers if one.key_env or one.key_file),
        models=tuple(read_model_facts(one, full=full) for one in _stored(home)),
        packages=tuple(missing),
        packages_seen=seen,
        config_path=None if config_path is None else str(config_path),
        config_mode=_mode(config_path),
        config_problem=config_problem,
        quota_cores=None if quota is None else quota.cores,
        environment={name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
    )


def read_folder_facts(home: Path) -> FolderFacts:
    """The data directory, or what is there of its path."""
    found = next((folder for folder in (home, *home.parents) if folder.exists()), Path("/"))
    state, room = found.stat(), os.statvfs(found)
    return FolderFacts(
        path=str(found),
        exists=found == home,
        is_writable=os.access(found, os.W_OK | os.X_OK),
        is_mine=state.st_uid == os.geteuid(),
        mode=stat.S_IMODE(state.st_mode),
        free_bytes=shutil.disk_usage(found).free,
        free_inodes=room.f_favail if room.f_files else None,
    )


def read_ledger_facts(url: str, *, full: bool) -> LedgerFacts:
    """Whether it can be read and its pages are sound, and when its last request came."""
    where = describe_place(url)
    try:
        path = Path(where.strip("'\"")) if url.startswith("sqlite") else None
        if path is not None and not path.exists():
            return LedgerFacts(where, exists=False)
        with explaining_errors(url, "read"):
            engine = open_reader(url)
            try:
                with engine.connect() as connection:
                    if path is not None and (full or path.stat().st_size <= _QUICK_CHECK_BYTES):
                        found = str(connection.execute(text("PRAGMA quick_check(1)")).scalar_one())
                        if found != "ok":
                            return LedgerFacts(
                                where, f"the ledger {where} is damaged ({found.splitlines()[-1]}); restore a copy"
                            )
                    last = connection.execute(select(func.max(decisions.c.received_at))).scalar()
            finally:
                engine.dispose()
    except (LedgerUnavailable, SQLAlchemyError, OSError) as error:
        return LedgerFacts(where, str(error))
    return LedgerFacts(where, last_at=last)


def read_address_state(host: str, port: int, home: Path) -> AddressState:
    """Who has the address that the node is to listen on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe_socket:
            probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe_socket.bind(address)
            # Two programs may have bound an address that neither listens on yet.
            probe_socket.listen(1)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return "unusable"
        return "ours" if _is_running(home) else "taken"
    return "free"


def read_secret_facts(provider: Provider) -> SecretFacts:
    source = f"the environment variable {provider.key_env}" if provider.key_env else str(provider.key_file)
    try:
        read_secret(provider)
    except ConfigError as error:
        return SecretFacts(provider.name, source, str(error))
    return SecretFacts(provider.name, source, mode=None if provider.key_env else _mode(Path(source).expanduser()))


def read_model_facts(model: StoredModel, *, full: bool) -> ModelFacts:
    """Whether it is whole, and what its checksum says where it is read."""
    name = f"{model.model} {model.variant}"
    try:
        if model.path.is_dir():
            if any(model.path.glob("*.safetensors")):
                check_weight_files(model.path)
            return ModelFacts(name)
        read_gguf_header(model.path)
        if model.sha256 is None:
            return ModelFacts(name)
        if model.path.stat().st_size > _QUICK_READ_BYTES and not full:
            return ModelFacts(name, was_read=False)
        with model.path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (ApplianceError, OSError) as error:
        return ModelFacts(name, str(error))
    problem = None if found == model.sha256 else f"its sha256 is {found}, recorded was {model.sha256}"
    return ModelFacts(name, problem)


def read_gpu_facts(gpus: Gpus, engine: EngineSettings, home: Path, root: Path = Path("/")) -> GpuFacts:
    vllm, problem = None, None
    try:
        found = select_installed(engine, os.environ)
        if found is not None:
            vllm = VllmFacts(
                found.version,
                str(found.folder),
                found.is_cpu,
                read_cuda_major(found.folder),
                is_complete=is_complete(found),
            )
    except ConfigError as error:
        problem = str(error)
    shared = Path("/dev/shm")
    return GpuFacts(
        gpus=gpus,
        pci_devices=sum(_is_nvidia(folder) for folder in (root / "sys/bus/pci/devices").glob("*")),
        device_files=len(list((root / "dev").glob("nvidia[0-9]*"))),
        in_container=any((root / name).exists() for name in (".dockerenv", "run/.containerenv"))
        or "KUBERNETES_SERVICE_HOST" in os.environ,
        vllm=vllm,
        vllm_problem=problem,
        shared_memory_bytes=shutil.disk_usage(shared).total if shared.is_dir() else None,
    )


def read_cuda_major(folder: Path) -> int | None:
    """Which CUDA an environment's packages bring along."""
    for distribution in sorted(folder.glob("lib/python3*/site-packages/nvidia_cuda_runtime*.dist-info")):
        match = _RUNTIME.match(distribution.name)
        if match:
            return int(match["major"])
    return None


def read_engine_build(command: Sequence[str] = (sys.executable, "-c", _ASK_BUILD)) -> EngineBuild:
    """In a process of its own, which an illegal instruction may end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return EngineBuild(exit_code=None, last_line=str(error))
    words = (done.stderr or done.stdout).strip().splitlines()
    rows = [line.split("\t")[1:] for line in done.stdout.splitlines() if line.startswith("kernels\t")]
    names, missing, remedy = rows[-1] if rows else ("", "", "")
    return EngineBuild(
        features=frozenset(re.findall(r"(\w+) = 1", done.stdout)),
        has_variants="variants" in done.stdout.splitlines()[:1],
        kernels=names,
        kernels_missing=missing,
        kernels_remedy=remedy,
        exit_code=done.returncode,
        last_line=words[-1] if words else "",
    )


def _packages() -> tuple[list[str], int]:
    """What is installed against what is pinned, where the project's folder is at hand, else what the wheel asks for."""
    pins = Path(__file__).resolve().parents[3] / "scripts/requirements/default.txt"
    try:
        lines = pins.read_text("utf-8").splitlines()
    except OSError:
        lines = importlib.metadata.requires("appliance") or []
    wrong, seen = [], 0
    for line in lines:
        match = re.match(r"(?P<name>[A-Za-z0-9][\w.-]*)(?:==(?P<version>[^\s;]+))?", line)
        if match is None or ";" in line:
            continue
        seen += 1
        try:
            here = importlib.metadata.version(match["name"])
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{match['name']} is not installed")
            continue
        if match["version"] and here != match["version"]:
            wrong.append(f"{match['name']} is {here}, pinned is {match['version']}")
    return wrong, seen


def _has_stored_keys(ledger_url: str) -> bool:
    try:
        return any(key.revoked_at is None for key in list_keys(ledger_url))
    except LedgerUnavailable:
        return False


def _stored(home: Path) -> Sequence[StoredModel]:
    try:
        return ModelStore(home).list_stored()
    except (ApplianceError, OSError):
        return ()


def _is_running(home: Path) -> bool:
    """Whether a node holds the data directory."""
    try:
        with (home / "node.lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _is_nvidia(folder: Path) -> bool:
    vendor, kind = (read_kernel_file(folder / name) for name in ("vendor", "class"))
    return vendor == _NVIDIA_VENDOR and kind.startswith(_DISPLAY_CLASS)


def _files_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def _steps_back() -> bool:
    readings = [time.monotonic() for _ in range(1000)]
    return any(later < earlier for earlier, later in itertools.pairwise(readings))


def _mode(path: Path | None) -> int | None:
    try:
        return None if path is None else stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return None
