"""What engines were measured to hold, from readings to the next plan."""

from dataclasses import replace
from pathlib import Path

from appliance.catalog import load_catalog
from appliance.config import EngineSettings
from appliance.engines.base import Placement
from appliance.node.calibrate.gpu_memory_records import add_gpu_records, measure_overheads, read_gpu_records
from appliance.node.hardware.nvidia import Gpus
from appliance.node.hardware.probe import Hardware
from appliance.node.plan.hypothetical_hardware import build_hypothetical_hardware
from appliance.node.plan.models import ModelCandidate
from appliance.node.plan.planner import plan_placements

CATALOG = load_catalog()
WEIGHTS = 16_300_000_000


def placed(hardware: Hardware, home: Path) -> Placement:
    model = CATALOG.get_model("qwen3-8b")
    (placement,) = plan_placements(
        hardware, [ModelCandidate(model, model.get_variant("bf16"), Path())], EngineSettings(), read_gpu_records(home)
    ).placements
    return placement


def less(gpus: Gpus, held_bytes: int) -> Gpus:
    devices = (replace(one, memory_free_bytes=(one.memory_free_bytes or 0) - held_bytes) for one in gpus.devices)
    return replace(gpus, devices=tuple(devices))


def test_a_start_is_measured_and_the_next_plan_uses_it(tmp_path: Path) -> None:
    hardware = build_hypothetical_hardware(CATALOG.get_device("h200"))
    first = placed(hardware, tmp_path)
    held = WEIGHTS + first.memory.kv_bytes + 2_100_000_000
    found = measure_overheads(first, WEIGHTS, hardware.gpus, less(hardware.gpus, held))
    assert found is not None
    add_gpu_records(tmp_path, [found])
    second = placed(hardware, tmp_path)
    assert (second.memory.weights_bytes, second.memory.buffers_bytes) == (WEIGHTS, 2_100_000_000)
    assert second.memory.total_bytes == first.memory.total_bytes, "what was assumed too much is cache now"
    assert second.memory.kv_bytes > first.memory.kv_bytes


def test_the_newest_figure_counts_and_another_device_has_its_own(tmp_path: Path) -> None:
    hardware = build_hypothetical_hardware(CATALOG.get_device("h200"))
    placement = placed(hardware, tmp_path)
    for other in (2_000_000_000, 3_000_000_000):
        held = WEIGHTS + placement.memory.kv_bytes + other
        found = measure_overheads(placement, WEIGHTS, hardware.gpus, less(hardware.gpus, held))
        assert found
        add_gpu_records(tmp_path, [found])
    assert [one.other_bytes for one in read_gpu_records(tmp_path).values()] == [3_000_000_000]
    elsewhere = placed(build_hypothetical_hardware(CATALOG.get_device("l40s")), tmp_path)
    assert elsewhere.memory.weights_bytes != WEIGHTS


def test_a_reading_that_cannot_be_true_is_not_remembered(tmp_path: Path) -> None:
    hardware = build_hypothetical_hardware(CATALOG.get_device("h200"))
    placement = placed(hardware, tmp_path)
    too_little = WEIGHTS + placement.memory.kv_bytes
    assert measure_overheads(placement, WEIGHTS, hardware.gpus, less(hardware.gpus, too_little)) is None
    assert measure_overheads(placement, WEIGHTS, hardware.gpus, replace(hardware.gpus, devices=())) is None
    assert measure_overheads(replace(placement, gpu=None), WEIGHTS, hardware.gpus, hardware.gpus) is None


def test_a_record_that_cannot_be_read_counts_as_none(tmp_path: Path) -> None:
    for text in ("", "[1]", '[{"model": "a"}]', "\x00"):
        (tmp_path / "gpu_records.json").write_text(text)
        assert read_gpu_records(tmp_path) == {}
