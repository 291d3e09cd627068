"""What is placed on which GPUs, and what is refused, in bytes."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.catalog import DevicePrior, ModelSpec, load_catalog
from appliance.config import EngineModel, EngineSettings
from appliance.engines.base import Placement
from appliance.engines.vllm_memory import VllmOverheads, can_split, estimate_device_memory
from appliance.node.hardware.probe import Hardware, probe_hardware
from appliance.node.plan.hypothetical_hardware import build_hypothetical_hardware
from appliance.node.plan.models import ModelCandidate, Plan
from appliance.node.plan.planner import plan_placements
from tests.node.machines import GIB, meminfo, recorded_nvml, topology, write_tree

CATALOG = load_catalog()
GPUS = tuple(device for device in CATALOG.devices if device.kind == "gpu")
MODELS = tuple(model for model in CATALOG.models if model.list_variants("vllm"))


def machine(device: str, gpus: int = 1) -> Hardware:
    return build_hypothetical_hardware(CATALOG.get_device(device), gpus=gpus)


def recorded(tmp_path: Path, name: str, ram: int = 256 * GIB) -> Hardware:
    return probe_hardware(write_tree(tmp_path, topology(32) | meminfo(ram, ram - 8 * GIB)), recorded_nvml(name))


def wanted(name: str, demand: float = 1.0, variant: str | None = None, **wish: Any) -> list[ModelCandidate]:
    model = CATALOG.get_model(name)
    variants = model.variants if variant is None else (model.get_variant(variant),)
    own = EngineModel.model_validate({"name": name, **wish})
    return [
        ModelCandidate(model, one, Path("/models") / name / one.name, overrides=own, demand=demand) for one in variants
    ]


def placed(hardware: Hardware, *items: Sequence[ModelCandidate], config: EngineSettings | None = None) -> Plan:
    return plan_placements(hardware, [one for group in items for one in group], config or EngineSettings())


def only(outcome: Plan) -> Placement:
    (placement,) = outcome.placements
    return placement


def test_a_model_on_one_gpu_gets_what_weights_and_overheads_leave_as_kv_cache() -> None:
    placement = only(placed(machine("h200"), wanted("llama-3.3-70b-instruct", variant="fp8")))
    assert placement.engine == "vllm" and placement.gpu is not None
    memory, gpu, model = placement.memory, placement.gpu, CATALOG.get_model("llama-3.3-70b-instruct")
    assert memory.total_bytes <= 0.95 * CATALOG.get_device("h200").memory_bytes  # type: ignore[operator]
    assert memory.total_bytes >= 0.94 * CATALOG.get_device("h200").memory_bytes  # type: ignore[operator]
    assert gpu.kv_cache_bytes == memory.kv_bytes
    overheads = memory.buffers_bytes + memory.program_bytes
    assert 3 * GIB < overheads < 6 * GIB
    tokens = memory.kv_bytes / (2 * 80 * 8 * 128 * 2)
    assert placement.shape.context_tokens == pytest.approx(tokens, rel=0.001)
    assert 2 * model.kv_bytes(placement.shape.sequence_context_tokens) <= memory.kv_bytes
    assert placement.reasons[0].startswith(f"needs {memory.total_bytes:,} bytes (weights ")


def test_eight_bits_are_preferred_to_four_and_one_device_to_two() -> None:
    assert only(placed(machine("h200"), wanted("llama-3.3-70b-instruct"))).variant == "fp8"
    two = only(placed(machine("h200", 2), wanted("llama-3.3-70b-instruct")))
    assert two.gpu and (two.variant, two.gpu.tensor_parallel, two.gpu.data_parallel) == ("fp8", 1, 2)
    small = only(placed(machine("l40s"), wanted("llama-3.3-70b-instruct")))
    assert small.variant == "awq"


def test_a_model_too_large_for_one_device_is_split_over_the_fewest_that_hold_it() -> None:
    placement = only(placed(machine("l40s", 8), wanted("llama-3.3-70b-instruct", variant="bf16")))
    assert placement.gpu is not None
    assert (placement.gpu.tensor_parallel, placement.gpu.data_parallel) == (4, 2)
    assert placement.memory.weights_bytes == pytest.approx(70_553_706_496 * 2 * 1.02 / 4, rel=0.001)
    whole = estimate_device_memory(
        CATALOG.get_model("llama-3.3-70b-instruct"),
        CATALOG.get_model("llama-3.3-70b-instruct").get_variant("bf16"),
        tensor_parallel=1,
        batch_tokens=2048,
        sequences=256,
    )
    assert placement.memory.program_bytes > whole.program_bytes, "devices of one copy need buffers for each other"


@pytest.mark.parametrize(
    ("name", "devices", "can"),
    [
        ("llama-3.3-70b-instruct", 8, True),
        ("smollm2-135m-instruct", 2, False),
        ("qwen3-30b-a3b-instruct-2507", 8, True),
        ("phi-4", 4, False),
        ("glm-4.7-flash", 4, True),
        ("glm-4.7-flash", 8, False),
    ],
)
def test_only_whole_heads_or_copies_of_them_are_split(name: str, devices: int, can: bool) -> None:
    assert can_split(CATALOG.get_model(name), devices) is can


@pytest.mark.parametrize(
    ("device", "variant", "words"),
    [
        ("a100-80gb-sxm", "fp8", "FP8 needs compute capability 8.9; the device has 8.0"),
        ("jetson-agx-orin", "fp8", "FP8 needs compute capability 8.9; the device has 8.7"),
    ],
)
def test_a_precision_that_a_device_cannot_compute_is_refused(device: str, variant: str, words: str) -> None:
    outcome = placed(machine(device), wanted("qwen3-8b", variant=variant))
    assert outcome.placements == ()
    assert outcome.refusals[0].reason == words


def test_a_cache_in_eight_bits_holds_twice_the_tokens_where_the_device_can() -> None:
    plain = only(placed(machine("l4"), wanted("llama-3.2-3b-instruct", variant="bf16")))
    halved = only(placed(machine("l4"), wanted("llama-3.2-3b-instruct", variant="bf16", kv_dtype="fp8")))
    assert halved.gpu and halved.gpu.kv_dtype == "fp8"
    assert halved.shape.context_tokens == pytest.approx(2 * plain.shape.context_tokens, rel=0.01)
    refused = placed(machine("a100-40gb"), wanted("llama-3.2-3b-instruct", variant="bf16", kv_dtype="fp8")).refusals
    assert "KV cache in fp8" in refused[0].reason


def test_four_bit_weights_say_where_they_save_no_time() -> None:
    remark = "no 4-bit arithmetic"
    assert any(remark in reason for reason in only(placed(machine("h200"), wanted("gpt-oss-120b"))).reasons)
    assert not any(remark in reason for reason in only(placed(machine("b200"), wanted("gpt-oss-120b"))).reasons)


def test_a_refusal_tells_bytes_and_the_device() -> None:
    (refusal,) = placed(machine("l4"), wanted("gpt-oss-120b")).refusals
    figures = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]{6,}", refusal.reason)]
    needed, *parts, usable = figures
    assert needed == sum(parts) and needed > usable
    assert usable == machine("l4").gpus.devices[0].memory_total_bytes * 95 // 100  # type: ignore[operator]
    assert "NVIDIA L4" in refusal.reason and "2,048 tokens of context" in refusal.reason


def test_several_models_share_a_device_and_never_more_than_there_is() -> None:
    hardware = machine("h200")
    names = ("gpt-oss-20b", "qwen3-8b", "qwen3-embedding-0.6b", "qwen3-vl-8b-instruct")
    outcome = placed(hardware, *(wanted(name) for name in names))
    assert [one.model for one in outcome.placements] == list(names)
    total = hardware.gpus.devices[0].memory_total_bytes
    assert total is not None
    assert sum(one.memory.total_bytes for one in outcome.placements) <= 0.95 * total
    assert sum(one.gpu.memory_utilization for one in outcome.placements if one.gpu) <= 0.951
    for one in outcome.placements:
        assert one.gpu and one.gpu.memory_utilization * total >= one.memory.total_bytes
        assert one.gpu.data_parallel == 1


def test_who_is_asked_more_gets_more_of_a_shared_device() -> None:
    def caches(demand: float) -> tuple[int, int]:
        items = wanted("qwen3-8b", demand), wanted("llama-3.1-8b-instruct")
        first, second = placed(machine("h100-sxm"), *items).placements
        return first.memory.kv_bytes, second.memory.kv_bytes

    even, busy = caches(1.0), caches(4.0)
    assert busy[0] > even[0] and busy[1] < even[1]
    assert sum(busy) == pytest.approx(sum(even), rel=0.01)


def test_models_spread_over_devices_and_are_packed_where_only_that_serves_all() -> None:
    spread = placed(machine("h100-sxm", 2), wanted("qwen3-8b"), wanted("llama-3.1-8b-instruct"))
    used = [one.gpu.devices for one in spread.placements if one.gpu]
    assert sorted(used) == [("0",), ("1",)]
    # Spread out, the two small ones would leave no device that holds the large one.
    names = ("qwen3-8b", "llama-3.1-8b-instruct", "gpt-oss-120b")
    packed = placed(machine("h100-sxm", 2), *(wanted(name) for name in names))
    assert [one.model for one in packed.placements] == list(names)


def test_a_small_model_leaves_memory_that_it_could_not_use() -> None:
    placement = only(placed(machine("h200"), wanted("smollm2-135m-instruct", variant="bf16-safetensors")))
    assert placement.memory.total_bytes < 0.5 * 143_771 * (1 << 20)
    assert placement.shape.sequences == 512


def test_what_the_operator_wishes_is_kept() -> None:
    wish: dict[str, Any] = {
        "gpus": (1, 2),
        "tensor_parallel": 2,
        "context_tokens": 8192,
        "sequences": 48,
        "gpu_memory_share": 0.5,
    }
    placement = only(placed(machine("h100-sxm", 4), wanted("qwen3-32b", variant="fp8", **wish)))
    assert placement.gpu is not None
    assert placement.gpu.devices == ("1", "2")
    assert (placement.gpu.tensor_parallel, placement.gpu.data_parallel) == (2, 1)
    assert (placement.shape.sequence_context_tokens, placement.shape.sequences) == (8192, 48)
    assert placement.gpu.memory_utilization == pytest.approx(0.5, abs=0.001)
    copies = only(placed(machine("h100-sxm", 4), wanted("qwen3-8b"), config=EngineSettings())).gpu
    assert copies and copies.data_parallel == 4
    asked = only(placed(machine("h100-sxm", 4), wanted("qwen3-8b", data_parallel=2))).gpu
    assert asked and (asked.data_parallel, len(asked.devices)) == (2, 2)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"gpus": (7,)}, "no GPU has one of the indices 7"),
        ({"tensor_parallel": 3}, "cannot be split over 3 devices"),
        ({"tensor_parallel": 4}, "4 devices of one kind were asked for; 2 can be used"),
        ({"data_parallel": 4}, "4 copies on 1 devices each were asked for; 2 of the devices"),
    ],
)
def test_a_wish_that_cannot_be_met_is_named(wish: dict[str, Any], words: str) -> None:
    outcome = placed(machine("h100-sxm", 2), wanted("qwen3-8b", variant="bf16", **wish))
    assert words in outcome.refusals[0].reason


def test_a_gpu_model_and_a_cpu_model_are_served_side_by_side() -> None:
    outcome = placed(machine("l4"), wanted("qwen3-8b"), wanted("smollm2-1.7b-instruct"))
    assert [(one.engine, one.gpu is None) for one in outcome.placements] == [("vllm", False), ("llamacpp", True)]


def test_what_finds_no_room_on_a_gpu_falls_back_to_the_processor() -> None:
    outcome = placed(machine("l4"), wanted("llama-3.1-8b-instruct", variant="bf16"), wanted("qwen3-8b"))
    assert [(one.model, one.engine) for one in outcome.placements] == [
        ("llama-3.1-8b-instruct", "vllm"),
        ("qwen3-8b", "llamacpp"),
    ]
    assert {refusal.variant for refusal in outcome.refusals} == {"bf16", "fp8", "awq"}


def test_one_memory_for_processor_and_gpu_is_not_given_away_twice() -> None:
    hardware = machine("dgx-spark")
    outcome = placed(
        hardware, wanted("smollm2-1.7b-instruct"), wanted("gpt-oss-120b"), wanted("qwen3-8b", variant="fp8")
    )
    assert len(outcome.placements) == 3
    assert sum(one.memory.total_bytes for one in outcome.placements) <= hardware.ram.usable_bytes
    assert [one.gpu.unified_memory for one in outcome.placements if one.gpu] == [True, True]


def test_parts_of_a_divided_board_are_devices_of_their_own_and_no_copy_is_split_over_them(tmp_path: Path) -> None:
    hardware = recorded(tmp_path, "h200-mig")
    outcome = placed(hardware, wanted("qwen3-32b"), wanted("qwen3-8b"), wanted("llama-3.3-70b-instruct", variant="fp8"))
    assert [one.model for one in outcome.placements] == ["qwen3-32b", "qwen3-8b"]
    assert all(one.gpu and len(one.gpu.devices) == 1 for one in outcome.placements)
    assert all(one.gpu and one.gpu.devices[0].startswith("MIG-") for one in outcome.placements)


def test_a_busy_board_is_planned_for_with_what_is_free(tmp_path: Path) -> None:
    placement = only(placed(recorded(tmp_path, "h200-busy"), wanted("llama-3.2-1b-instruct")))
    assert placement.memory.total_bytes <= 9000 * (1 << 20)


def test_a_lost_board_is_not_planned_for_and_is_told_where_it_is_missed(tmp_path: Path) -> None:
    hardware = recorded(tmp_path, "h200-one-lost")
    placement = only(placed(hardware, wanted("gpt-oss-120b")))
    assert placement.gpu and placement.gpu.data_parallel == 1
    gone = replace(hardware, gpus=replace(hardware.gpus, devices=()))
    refused = placed(gone, wanted("gpt-oss-120b", variant="mxfp4")).refusals
    assert "GPU 0 cannot be used: GPU is lost" in refused[0].reason


def test_what_was_measured_takes_the_place_of_what_is_assumed() -> None:
    hardware = machine("h200")
    items = wanted("qwen3-8b", variant="bf16")
    name = hardware.gpus.devices[0].name
    records = {("qwen3-8b", "bf16", name, 1): VllmOverheads(weights_bytes=16_400_000_000, other_bytes=2_000_000_000)}
    placement = only(plan_placements(hardware, items, EngineSettings(), records))
    assert (placement.memory.weights_bytes, placement.memory.buffers_bytes) == (16_400_000_000, 2_000_000_000)
    assert placement.memory.kv_bytes > only(plan_placements(hardware, items, EngineSettings())).memory.kv_bytes


def test_the_same_number_of_sequences_is_planned_while_free_memory_wavers() -> None:
    hardware = machine("l40s")
    (gpu,) = hardware.gpus.devices
    counts = set()
    for missing in range(0, 800, 100):
        free = (gpu.memory_free_bytes or 0) - missing * (1 << 20)
        less = replace(hardware, gpus=replace(hardware.gpus, devices=(replace(gpu, memory_free_bytes=free),)))
        counts.add(only(placed(less, wanted("qwen3-8b", variant="bf16"))).shape.sequences)
    assert len(counts) == 1, "another number makes the engine compile anew"


def test_options_of_family_catalogue_and_operator_reach_the_engine() -> None:
    config = EngineSettings(vllm_options=("--enforce-eager",))
    placement = only(placed(machine("h200"), wanted("qwen3-8b", options=("--seed", "7")), config=config))
    settings = dict(placement.settings)
    assert settings["--reasoning-parser"] == "qwen3" and settings["--tool-call-parser"] == "hermes"
    assert settings["--enforce-eager"] == "" and settings["--seed"] == "7"
    embedding = only(placed(machine("h200"), wanted("qwen3-embedding-0.6b")))
    assert embedding.abilities == {"embeddings"} and dict(embedding.settings)["--runner"] == "pooling"


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_model_on_every_device_fits_or_is_refused_in_bytes(device: DevicePrior, model: ModelSpec) -> None:
    hardware = build_hypothetical_hardware(device)
    items = [ModelCandidate(model, one, Path(one.name)) for one in model.list_variants("vllm")]
    outcome = plan_placements(hardware, items, EngineSettings())
    total, capability = device.memory_bytes or 0, float(device.compute_capability or 0)
    for placement in outcome.placements:
        gpu, shape, variant = placement.gpu, placement.shape, model.get_variant(placement.variant)
        assert gpu is not None
        assert placement.memory.total_bytes <= gpu.memory_utilization * total <= 0.951 * total
        assert placement.memory.weights_bytes >= variant.size_bytes
        # vLLM does not start unless its cache holds one sequence of the longest length.
        element = 2
        longest = model.kv_bytes(shape.sequence_context_tokens, element, in_flight_tokens=gpu.max_batched_tokens)
        assert longest <= gpu.kv_cache_bytes
        assert 2048 <= shape.sequence_context_tokens <= model.context_tokens
        assert shape.sequences & (shape.sequences - 1) == 0
        assert variant.quantisation != "FP8" or capability >= 8.9
    if not outcome.placements:
        assert len(outcome.refusals) == len(items)
        for refusal in outcome.refusals:
            assert re.search(r"needs [\d,]+ bytes|compute capability", refusal.reason)
