"""The doctor's checks: facts in, findings with remedies out, one row a finding; and the facts as they are gathered."""

import os
import socket
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pynvml
import pytest

from appliance.config import EngineSettings, Provider
from appliance.ledger.database import sqlite_url
from appliance.ledger.store import Ledger
from appliance.node.doctor import gather
from appliance.node.doctor.checks import run_checks
from appliance.node.doctor.gpu_checks import check_gpus
from appliance.node.doctor.models import (
    DoctorFacts,
    EngineBuild,
    FolderFacts,
    GpuFacts,
    LedgerFacts,
    ModelFacts,
    SecretFacts,
    VllmFacts,
)
from appliance.node.hardware.cgroup import MemoryLimit
from appliance.node.hardware.cpu import Cpu, Ram
from appliance.node.hardware.nvidia import Gpus, LostGpu, read_gpus
from appliance.node.models.model_store import StoredModel
from tests.ledger.samples import outcome
from tests.node.gguf_bytes import gguf_bytes
from tests.node.machines import GIB, H200, Fails, FakeNvml, write_tree

NOW_AT = 1_800_000_000.0
CPU = Cpu("Some CPU", "x86_64", 8, 8, 8, "8 physical cores", 1, 1, frozenset({"avx2", "avx512f"}))
RAM = Ram(64 * GIB, 60 * GIB, None, 60 * GIB, "60 of 64 GB are available")
NO_GPU = Gpus((), "none, because the driver's library (libnvidia-ml) is not installed", state="absent")
BARE = GpuFacts(NO_GPU, 0, 0, False, None)
BUILD = EngineBuild(frozenset({"AVX2", "AVX512"}))
WELL = DoctorFacts(
    cpu=CPU,
    ram=RAM,
    gpus=BARE,
    data_dir=FolderFacts("/data", True, True, True, 0o700, 500 * GIB, None),
    ledger=LedgerFacts("/data/ledger.sqlite", last_at=NOW_AT - 10),
    build=BUILD,
    address="127.0.0.1:8080",
    address_state="free",
    has_keys=False,
    is_loopback=True,
    now_at=NOW_AT,
    clock_steps_back=False,
    files_limit=65_536,
    max_connections=1024,
    cpu_meter="2 counters",
    has_cpu_meter=True,
    packages_seen=70,
)


def data_dir(**changes: Any) -> FolderFacts:
    return replace(WELL.data_dir, **changes)


def test_a_machine_that_is_well_has_nothing_but_ok() -> None:
    assert {finding.level for finding in run_checks(WELL)} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "check", "level", "text", "remedy"),
    [
        ({"config_problem": "a.toml:3: no such field"}, "configuration", "error", "a.toml:3", "correct"),
        ({"config_path": "a.toml", "config_mode": 0o666}, "configuration", "error", "mode 666", "chmod go-w a.toml"),
        ({"data_dir": data_dir(is_writable=False)}, "data directory", "error", "cannot be written", "--data-dir"),
        ({"data_dir": data_dir(mode=0o777)}, "data directory", "error", "mode 777", "chmod go-w /data"),
        ({"data_dir": data_dir(mode=0o755)}, "data directory", "warning", "prompts", "chmod o-rx /data"),
        ({"data_dir": data_dir(is_mine=False)}, "data directory", "warning", "another user", "chown"),
        ({"data_dir": data_dir(exists=False, mode=0o777)}, "data directory", "ok", "to be made", ""),
        ({"data_dir": data_dir(free_bytes=10**8)}, "disk", "error", "0.1 GB", "hosted provider"),
        ({"data_dir": data_dir(free_bytes=5 * 10**9)}, "disk", "warning", "5.0 GB", "models"),
        ({"data_dir": data_dir(free_inodes=10)}, "disk", "error", "10 more files", "delete"),
        ({"ledger": LedgerFacts("l", "it is damaged; restore a copy")}, "ledger", "error", "damaged", "restore a copy"),
        ({"ledger": LedgerFacts("l", exists=False)}, "ledger", "ok", "none yet", ""),
        ({"now_at": 1000.0, "ledger": LedgerFacts("l")}, "clock", "error", "before 2025", "timedatectl"),
        ({"now_at": NOW_AT - 90}, "clock", "warning", "80 s behind", "timedatectl"),
        ({"now_at": NOW_AT - 90_000}, "clock", "error", "set back", "timedatectl"),
        ({"clock_steps_back": True}, "clock", "error", "backwards", "clock source"),
        ({"address_state": "ours"}, "address", "ok", "the node that runs", ""),
        ({"address_state": "taken"}, "address", "error", "another program", "ss -ltnp"),
        ({"address_state": "unusable"}, "address", "error", "cannot be listened on", "server.host"),
        ({"is_loopback": False}, "API keys", "error", "no API keys", "appliance keys create"),
        (
            {"secrets": (SecretFacts("p", "the environment variable K", "K is empty"),)},
            "key of p",
            "error",
            "K is",
            "put",
        ),
        ({"secrets": (SecretFacts("p", "/k", mode=0o644),)}, "key of p", "warning", "mode 644", "chmod 600 /k"),
        ({"secrets": (SecretFacts("p", "/k", mode=0o600),)}, "key of p", "ok", "from /k", ""),
        ({"quota_cores": 0.5}, "processor", "warning", "0.5 of a core", "CPUQuota"),
        ({"cpu": replace(CPU, flags=frozenset())}, "processor", "warning", "neither AVX2", "speed"),
        ({"ram": replace(RAM, usable_bytes=10**8)}, "memory", "error", "0.1 GB", "end other programs"),
        ({"ram": replace(RAM, usable_bytes=2 * 10**9)}, "memory", "warning", "2.0 GB", "below 1B"),
        (
            {"ram": Ram(RAM.total_bytes, 60 * GIB, MemoryLimit(10**9, 10**8, "/sys/fs/cgroup"), 10**8, "a limit")},
            "memory",
            "error",
            "0.1 GB",
            "MemoryMax",
        ),
        ({"build": EngineBuild(exit_code=-4)}, "llama.cpp", "error", "illegal instruction", "scripts/setup"),
        (
            {"build": EngineBuild(exit_code=1, last_line="No module")},
            "llama.cpp",
            "error",
            "No module",
            "scripts/setup",
        ),
        ({"build": EngineBuild(frozenset({"AVX2"}))}, "llama.cpp", "warning", "without AVX512", "scripts/setup"),
        ({"build": EngineBuild(frozenset({"AVX2"}), has_variants=True)}, "llama.cpp", "ok", "AVX2", ""),
        ({"build": replace(BUILD, kernels="attention (AVX-512 VNNI)")}, "kernels", "ok", "attention", ""),
        ({"build": replace(BUILD, kernels_missing="this processor lacks fma")}, "kernels", "ok", "lacks fma", ""),
        (
            {"build": replace(BUILD, kernels_missing="they have not been built", kernels_remedy="build them")},
            "kernels",
            "warning",
            "not been built",
            "build them",
        ),
        ({"environment": {"OMP_NUM_THREADS": "64"}}, "threads", "warning", "64 is more than the 8", "unset"),
        ({"environment": {"OMP_WAIT_POLICY": "ACTIVE"}}, "threads", "warning", "router", "passive"),
        ({"environment": {"GOMP_CPU_AFFINITY": "0"}}, "threads", "warning", "GOMP_CPU_AFFINITY", "unset"),
        ({"files_limit": 1024}, "open files", "warning", "1,024", "LimitNOFILE=2304"),
        ({"files_limit": 128}, "open files", "error", "128", "ulimit -n 2304"),
        ({"packages": ("numpy is 1, pinned is 2",)}, "packages", "error", "numpy is 1", "scripts/setup"),
        ({"models": (ModelFacts("m q4", "its sha256 is x"),)}, "model", "error", "sha256", "models remove m"),
        ({"models": (ModelFacts("m q4", was_read=False),)}, "model", "ok", "too large", "--full"),
        ({"has_cpu_meter": False, "cpu_meter": "root alone"}, "energy meter", "ok", "root alone", "watts_per_busy"),
    ],
)
def test_what_is_wrong_is_found_with_its_remedy(
    changes: dict[str, Any], check: str, level: str, text: str, remedy: str
) -> None:
    found = [finding for finding in run_checks(replace(WELL, **changes)) if finding.check == check]
    assert any(one.level == level and text in one.text and remedy in one.remedy for one in found), found
    assert all(finding.remedy for finding in found if finding.level != "ok")


# --- GPUs


def gpus(**changes: Any) -> Gpus:
    device = {**H200, "nvmlDeviceGetMemoryInfo": _memory(free=150_000_000_000), **changes}
    return read_gpus(0, 0, FakeNvml(device))


def _memory(free: int) -> Any:
    return type(H200["nvmlDeviceGetMemoryInfo"])(total=150_754_820_096, free=free, used=0)


VLLM = VllmFacts("0.33.0", "/opt/vllm", False, 13)
GOOD = GpuFacts(gpus(), 1, 1, False, VLLM, shared_memory_bytes=64 * GIB)


def test_an_h200_with_a_fitting_driver_and_vllm_is_well() -> None:
    found = list(check_gpus(GOOD))
    assert {one.level for one in found} == {"ok"}
    assert "driver 580.95.05, which runs CUDA 13.0" in found[0].text and "CUDA 13" in found[-1].text


def test_a_machine_without_any_gpu_is_well() -> None:
    assert {one.level for one in check_gpus(BARE)} == {"ok"}


OLD_DRIVER = read_gpus(
    0,
    0,
    FakeNvml(
        {**H200, "nvmlDeviceGetMemoryInfo": _memory(free=150_000_000_000)},
        nvmlSystemGetDriverVersion="570.86.15",
        nvmlSystemGetCudaDriverVersion_v2=12_080,
    ),
)
MISMATCH = read_gpus(0, 0, FakeNvml(nvmlInit=Fails(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)))
PARTS = {"nvmlDeviceGetMigMode": (1, 1), "nvmlDeviceGetMaxMigDeviceCount": 7}
TWO = replace(GOOD.gpus, devices=GOOD.gpus.devices * 2)


@pytest.mark.parametrize(
    ("changes", "check", "level", "text", "remedy"),
    [
        ({"gpus": OLD_DRIVER}, "vLLM", "error", "built for CUDA 13; driver 570.86.15", "branch 580"),
        ({"gpus": OLD_DRIVER, "vllm": replace(VLLM, cuda_major=12)}, "vLLM", "ok", "CUDA 12", ""),
        ({"gpus": NO_GPU, "device_files": 0}, "GPU driver", "error", "1 NVIDIA devices without", "branch 580"),
        ({"gpus": NO_GPU, "in_container": True}, "GPU driver", "error", "this container", "--gpus all"),
        ({"gpus": MISMATCH}, "GPU driver", "error", "different versions", "reboot"),
        (
            {"gpus": Gpus((), "0 of 1", "580", "13.0", (LostGpu(0, None, "fell off the bus", True),))},
            "GPU 0",
            "error",
            "fell off the bus",
            "gpu-reset",
        ),
        ({"gpus": gpus(nvmlDeviceGetTotalEccErrors=3)}, "GPU 0", "error", "3 uncorrected", "replace"),
        ({"gpus": gpus(nvmlDeviceGetCurrentClocksEventReasons=0x40)}, "GPU 0", "warning", "thermal", "cooling"),
        ({"gpus": gpus(**PARTS)}, "GPU 0", "error", "MIG mode without a part", "nvidia-smi mig"),
        ({"gpus": gpus(nvmlDeviceGetMemoryInfo=_memory(10**9))}, "GPU 0", "warning", "are taken", "nvidia-smi"),
        (
            {"gpus": gpus(nvmlDeviceGetMemoryInfo=Fails(pynvml.NVML_ERROR_UNKNOWN))},
            "GPU 0",
            "error",
            "unknown",
            "driver",
        ),
        (
            {"gpus": gpus(nvmlDeviceGetCudaComputeCapability=(7, 0))},
            "GPU 0",
            "error",
            "compute capability 7.0",
            "newer GPU",
        ),
        ({"vllm": None}, "vLLM", "warning", "no vLLM", "engines install vllm"),
        ({"vllm": None, "vllm_problem": "/x is no environment"}, "vLLM", "error", "/x", "engine.vllm"),
        ({"vllm": replace(VLLM, is_complete=False)}, "vLLM", "error", "not finished", "install"),
        ({"vllm": replace(VLLM, is_cpu=True)}, "vLLM", "warning", "build for CPUs", "install"),
        ({"gpus": NO_GPU, "pci_devices": 0, "device_files": 0}, "vLLM", "warning", "there is none", "remove"),
        ({"gpus": TWO, "shared_memory_bytes": 64 << 20}, "shared memory", "warning", "0.1 GB", "--ipc=host"),
        ({"gpus": TWO}, "shared memory", "ok", "68.7 GB", ""),
    ],
)
def test_what_is_wrong_with_gpus_is_found_with_its_remedy(
    changes: dict[str, Any], check: str, level: str, text: str, remedy: str
) -> None:
    found = [finding for finding in check_gpus(replace(GOOD, **changes)) if finding.check == check]
    assert any(one.level == level and text in one.text and remedy in one.remedy for one in found), found
    assert all(finding.remedy for finding in found if finding.level != "ok")


# --- facts


def test_who_holds_an_address_is_told_apart(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert gather.read_address_state("127.0.0.1", port, tmp_path) == "taken"
        import fcntl

        with (tmp_path / "node.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert gather.read_address_state("127.0.0.1", port, tmp_path) == "ours"
    assert gather.read_address_state("127.0.0.1", port, tmp_path) == "free"
    assert gather.read_address_state("192.0.2.1", port, tmp_path) == "unusable"


@pytest.mark.anyio
async def test_a_ledger_is_read_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    url = sqlite_url(path)
    assert not gather.read_ledger_facts(url, full=False).exists
    ledger = await Ledger.open(url)
    ledger.record(outcome())
    await ledger.close()
    sound = gather.read_ledger_facts(url, full=True)
    assert sound.problem is None and sound.last_at == pytest.approx(NOW_AT)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 4096))
    assert gather.read_ledger_facts(url, full=False).problem is not None


def test_another_database_is_no_ledger(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (id)")
    connection.close()
    problem = gather.read_ledger_facts(sqlite_url(path), full=False).problem
    assert problem is not None and "decisions" in problem


def stored(path: Path, sha256: str | None) -> StoredModel:
    return StoredModel("m", "q4", path, path.stat().st_size, sha256, None, None, True)


def test_a_models_checksum_is_compared(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes())
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert gather.read_model_facts(stored(path, right), full=False) == ModelFacts("m q4")
    wrong = gather.read_model_facts(stored(path, "0" * 64), full=False)
    assert wrong.problem is not None and right in wrong.problem
    path.write_bytes(b"GGUF")
    assert gather.read_model_facts(stored(path, right), full=False).problem


def test_an_engine_that_dies_of_an_illegal_instruction_is_a_fact_and_no_crash() -> None:
    import sys

    dies = (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    assert gather.read_engine_build(dies).exit_code == -4
    real = gather.read_engine_build()
    assert real.exit_code == 0 and real.features
    assert bool(real.kernels) != bool(real.kernels_missing)


def test_a_missing_key_and_the_mode_of_a_keys_file_are_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    given: dict[str, Any] = {
        "name": "p",
        "location": "onsite",
        "base_url": "http://127.0.0.1:1/v1",
        "models": ({"name": "m"},),
    }
    by_variable = Provider.model_validate({**given, "key_env": "NO_SUCH_KEY"})
    assert "NO_SUCH_KEY" in (gather.read_secret_facts(by_variable).problem or "")
    path = tmp_path / "key"
    path.write_text("secret")
    path.chmod(0o640)
    found = gather.read_secret_facts(Provider.model_validate({**given, "key_file": str(path)}))
    assert found.mode == 0o640 and "secret" not in repr(found)


def test_gpus_that_the_kernel_sees_and_the_cuda_of_an_environment_are_counted(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
            "sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n",
            "sys/bus/pci/devices/0000:01:00.1/vendor": "0x10de\n",
            "sys/bus/pci/devices/0000:01:00.1/class": "0x040300\n",
            "dev/nvidia0": "",
            "dev/nvidiactl": "",
            ".dockerenv": "",
            "env/lib/python3.12/site-packages/nvidia_cuda_runtime-13.0.96.dist-info/METADATA": "",
        },
    )
    found = gather.read_gpu_facts(NO_GPU, EngineSettings(), tmp_path, tmp_path)
    assert (found.pci_devices, found.device_files, found.in_container) == (1, 1, True)
    assert gather.read_cuda_major(tmp_path / "env") == 13
    assert gather.read_cuda_major(tmp_path) is None


def test_of_a_data_directory_that_is_not_there_the_folder_above_is_looked_at(tmp_path: Path) -> None:
    found = gather.read_folder_facts(tmp_path / "a" / "b")
    assert not found.exists and found.path == str(tmp_path) and found.free_bytes > 0
