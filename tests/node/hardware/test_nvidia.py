"""NVIDIA devices as recorded readings tell them, and as missing drivers and lost devices do."""

import json
from pathlib import Path
from typing import Any

import pynvml
import pytest

from appliance.node.hardware.nvidia import GpuReader, read_gpus
from appliance.node.hardware.probe import probe_hardware
from tests.node.machines import GIB, H200, Fails, FakeNvml, meminfo, recorded_nvml, topology, write_tree

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


MIB = 1 << 20


def test_eight_boards_are_read_with_their_links_nodes_and_energy() -> None:
    gpus = read_gpus(0, 0, recorded_nvml("h200-x8"))
    assert [gpu.index for gpu in gpus.devices] == list(range(8))
    assert {gpu.nvlinks for gpu in gpus.devices} == {18}
    assert [gpu.numa_node for gpu in gpus.devices] == [0] * 4 + [1] * 4
    assert gpus.devices[0].energy_joules == 912_345.678
    assert len({gpu.uuid for gpu in gpus.devices}) == 8
    assert gpus.devices[0].processes == ()


def test_processes_tell_what_they_hold_where_they_are_asked_in_their_own_namespace() -> None:
    (gpu,) = read_gpus(0, 0, recorded_nvml("h200-busy")).devices
    assert gpu.processes is not None
    assert [(one.pid, one.memory_bytes) for one in gpu.processes] == [(4242, 130_000 * MIB), (4343, None)]
    assert (gpu.throttled, gpu.utilisation) == (("power cap",), 1.0)


def test_the_parts_of_a_divided_board_have_their_own_memory_and_empty_slots_are_none() -> None:
    (gpu,) = read_gpus(0, 0, recorded_nvml("h200-mig")).devices
    assert gpu.mig_enabled and gpu.utilisation is None
    assert [part.index for part in gpu.mig_devices] == [0, 2]
    assert {part.memory_total_bytes for part in gpu.mig_devices} == {71_424 * MIB}
    assert all(part.uuid and part.uuid.startswith("MIG-") and part.multiprocessors == 60 for part in gpu.mig_devices)


def test_a_board_that_is_lost_in_the_middle_of_its_reading_is_lost_and_not_half_known() -> None:
    gpus = read_gpus(0, 0, recorded_nvml("h200-one-lost"))
    assert [gpu.index for gpu in gpus.devices] == [1]
    assert [(one.index, one.needs_reset) for one in gpus.lost] == [(0, False)]
    assert gpus.reason == "1 of 2 devices; device 0 cannot be read: GPU is lost"


def test_a_board_that_wants_a_reset_says_so() -> None:
    gpus = read_gpus(0, 0, recorded_nvml("h200-needs-reset"))
    assert [gpu.index for gpu in gpus.devices] == [0]
    assert [(one.index, one.needs_reset) for one in gpus.lost] == [(1, True)]


@pytest.mark.parametrize(("recording", "cuda"), [("dgx-spark", "12.1"), ("jetson-orin", "8.7")])
def test_machines_with_one_memory_are_read_from_ram(recording: str, cuda: str) -> None:
    (gpu,) = read_gpus(119 * GIB, 100 * GIB, recorded_nvml(recording)).devices
    assert gpu.unified_memory and gpu.compute_capability == cuda
    assert (gpu.memory_total_bytes, gpu.memory_free_bytes) == (119 * GIB, 100 * GIB)
    assert (gpu.nvlinks, gpu.energy_joules, gpu.mig_devices) == (None, None, ())


@pytest.mark.parametrize(
    ("recording", "words"),
    [
        ("driver-unloaded", "the NVIDIA driver is not loaded"),
        ("driver-mismatch", "different versions"),
        ("container-without-permission", "this user may not"),
    ],
)
def test_a_machine_without_a_working_driver_is_a_state_and_no_crash(recording: str, words: str) -> None:
    gpus = read_gpus(0, 0, recorded_nvml(recording))
    assert (gpus.devices, gpus.state) == ((), "absent")
    assert words in gpus.reason


@pytest.mark.parametrize(
    "code",
    [
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
        pynvml.NVML_ERROR_GPU_IS_LOST,
    ],
)
def test_a_driver_that_goes_away_is_gone_until_it_is_back(code: int) -> None:
    nvml = recorded_nvml("h200-x8")
    reader = GpuReader(nvml)
    assert len(reader.read(0, 0).devices) == 8
    nvml.broken = code
    for _ in range(3):
        away = reader.read(0, 0)
        assert (away.devices, away.state) == ((), "gone")
        assert away.reason.startswith("none, because")
    nvml.broken = None
    assert len(reader.read(0, 0).devices) == 8
    assert nvml.started == 2


def test_a_board_that_falls_off_while_a_node_runs_keeps_its_name() -> None:
    nvml = recorded_nvml("h200-x8")
    reader = GpuReader(nvml)
    uuid = reader.read(0, 0).devices[3].uuid
    nvml.lose(3, pynvml.NVML_ERROR_GPU_IS_LOST)
    gpus = reader.read(0, 0)
    assert len(gpus.devices) == 7
    assert [(one.index, one.uuid) for one in gpus.lost] == [(3, uuid)]
    assert nvml.started == 1, "the other boards go on"


def test_a_reader_starts_nvml_once_and_ends_it_once() -> None:
    nvml = recorded_nvml("h200")
    reader = GpuReader(nvml)
    for _ in range(5):
        reader.read(0, 0)
    reader.close()
    reader.close()
    assert (nvml.started, nvml.shut_down) == (1, 1)


def _hardware(root: Path, nvml: Any) -> Any:
    files = topology(4) | meminfo(64 * GIB, 40 * GIB) | {"proc/cpuinfo": "model name : A CPU\nflags : avx2\n"}
    return probe_hardware(write_tree(root, files), nvml)


def test_the_fingerprint_stays_while_load_changes_and_moves_with_the_hardware(tmp_path: Path) -> None:
    idle = _hardware(tmp_path, FakeNvml(H200))
    write_tree(tmp_path, meminfo(64 * GIB, 3 * GIB))
    busy = probe_hardware(tmp_path, FakeNvml({**H200, "nvmlDeviceGetPowerUsage": 690_000}))
    assert idle.fingerprint == busy.fingerprint
    assert probe_hardware(tmp_path, FakeNvml(H200, H200)).fingerprint != idle.fingerprint
    assert probe_hardware(tmp_path, FakeNvml()).fingerprint != idle.fingerprint


def test_hardware_can_be_written_as_json(tmp_path: Path) -> None:
    table = json.loads(json.dumps(_hardware(tmp_path, FakeNvml(H200)).to_dict()))
    assert table["cpu"]["flags"] == ["avx2"]
    assert table["gpus"]["devices"][0]["name"] == "NVIDIA H200"
    assert len(table["fingerprint"]) == 16
