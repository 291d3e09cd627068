"""NVIDIA devices as recorded readings tell them, and as missing drivers and lost devices do."""

import json
from pathlib import Path
from typing import Any

import pynvml
import pytest

from appliance.node.nvidia import read_gpus
from appliance.node.probe import probe
from tests.node.machines import GIB, H200, Fails, FakeNvml, meminfo, topology, write_tree

NOT_SUPPORTED = Fails(pynvml.NVML_ERROR_NOT_SUPPORTED)


def test_a_device_is_read_in_whole_units() -> None:
    gpus = read_gpus(0, 0, FakeNvml(H200))
    (gpu,) = gpus.devices
    assert (gpus.reason, gpus.driver, gpus.cuda) == ("1 of 1 devices", "580.95.05", "13.0")
    assert (gpu.name, gpu.compute_capability) == ("NVIDIA H200", "9.0")
    assert (gpu.memory_total_bytes, gpu.memory_free_bytes) == (150_754_820_096, 150_121_480_192)
    assert (gpu.power_watts, gpu.power_limit_watts, gpu.utilisation, gpu.temperature_celsius) == (76.512, 700, 0.37, 31)
    assert (gpu.mig_enabled, gpu.ecc_enabled, gpu.ecc_uncorrected_errors) == (False, True, 0)
    assert gpu.throttled == ()


def test_throttling_is_named_and_an_idle_clock_is_not_throttling() -> None:
    (gpu,) = read_gpus(0, 0, FakeNvml({**H200, "nvmlDeviceGetCurrentClocksEventReasons": 0x1 | 0x4 | 0x40})).devices
    assert gpu.throttled == ("power cap", "hardware thermal slowdown")


def test_what_a_device_does_not_tell_is_unknown() -> None:
    bare = {"nvmlDeviceGetName": b"Old Board", "nvmlDeviceGetMemoryInfo": H200["nvmlDeviceGetMemoryInfo"]}
    (gpu,) = read_gpus(0, 0, FakeNvml(bare)).devices
    assert gpu.name == "Old Board"
    unknown = (gpu.power_watts, gpu.utilisation, gpu.throttled, gpu.mig_enabled, gpu.ecc_enabled, gpu.uuid)
    assert unknown == (None,) * 6


def test_unified_memory_counts_what_ram_has_usable() -> None:
    spark = {**H200, "nvmlDeviceGetName": "NVIDIA GB10", "nvmlDeviceGetMemoryInfo": NOT_SUPPORTED}
    (gpu,) = read_gpus(128 * GIB, 90 * GIB, FakeNvml(spark)).devices
    assert (gpu.memory_total_bytes, gpu.memory_free_bytes, gpu.unified_memory) == (128 * GIB, 90 * GIB, True)
    assert "shares the machine's memory" in gpu.memory_reason


def test_memory_that_cannot_be_read_is_never_free() -> None:
    broken = {**H200, "nvmlDeviceGetMemoryInfo": Fails(pynvml.NVML_ERROR_UNKNOWN)}
    (gpu,) = read_gpus(128 * GIB, 90 * GIB, FakeNvml(broken)).devices
    assert (gpu.memory_total_bytes, gpu.memory_free_bytes, gpu.unified_memory) == (None, None, False)
    assert gpu.memory_reason.startswith("unknown, so nothing counts as free")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "none, because the driver's library"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "none, because the NVIDIA driver is not loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "none, because the driver in the kernel and its library"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "none, because this user may not"),
    ],
)
def test_no_device_has_a_reason(code: int, words: str) -> None:
    gpus = read_gpus(0, 0, FakeNvml(nvmlInit=Fails(code)))
    assert gpus.devices == ()
    assert gpus.reason.startswith(words)


def test_a_driver_without_devices_says_so_and_is_closed() -> None:
    nvml = FakeNvml()
    gpus = read_gpus(0, 0, nvml)
    assert (gpus.reason, gpus.driver) == ("none, because the driver sees no device", "580.95.05")
    assert nvml.shut_down == 1


def test_a_lost_device_does_not_hide_the_others() -> None:
    gpus = read_gpus(0, 0, FakeNvml({"nvmlDeviceGetName": Fails(pynvml.NVML_ERROR_GPU_IS_LOST)}, H200))
    assert [gpu.index for gpu in gpus.devices] == [1]
    assert gpus.reason.startswith("1 of 2 devices; device 0 cannot be read")


def _hardware(root: Path, nvml: Any) -> Any:
    files = topology(4) | meminfo(64 * GIB, 40 * GIB) | {"proc/cpuinfo": "model name : A CPU\nflags : avx2\n"}
    return probe(write_tree(root, files), nvml)


def test_the_fingerprint_stays_while_load_changes_and_moves_with_the_hardware(tmp_path: Path) -> None:
    idle = _hardware(tmp_path, FakeNvml(H200))
    write_tree(tmp_path, meminfo(64 * GIB, 3 * GIB))
    busy = probe(tmp_path, FakeNvml({**H200, "nvmlDeviceGetPowerUsage": 690_000}))
    assert idle.fingerprint == busy.fingerprint
    assert probe(tmp_path, FakeNvml(H200, H200)).fingerprint != idle.fingerprint
    assert probe(tmp_path, FakeNvml()).fingerprint != idle.fingerprint


def test_hardware_can_be_written_as_json(tmp_path: Path) -> None:
    table = json.loads(json.dumps(_hardware(tmp_path, FakeNvml(H200)).to_dict()))
    assert table["cpu"]["flags"] == ["avx2"]
    assert table["gpus"]["devices"][0]["name"] == "NVIDIA H200"
    assert len(table["fingerprint"]) == 16
