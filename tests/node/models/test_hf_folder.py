"""Models that are not in the catalogue, read from folders as their publishers lay them out."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from appliance.catalog import load_catalog
from appliance.config import EngineSettings
from appliance.engines.vllm_memory import explain_refusal
from appliance.errors import ModelFileError
from appliance.node.models.candidates import read_folder_candidate
from appliance.node.models.hf_folder import read_folder_spec
from appliance.node.plan.hypothetical_hardware import build_hypothetical_hardware
from appliance.node.plan.planner import plan_placements

PLAIN = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "sliding_window": None,
}
"""As the publisher's config.json of Qwen3 8B has it."""


def weights(path: Path, tensors: Mapping[str, tuple[str, list[int], int]], missing_bytes: int = 0) -> None:
    """A safetensors file: name -> type, shape, bytes."""
    header, offset = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"\0" * (offset - missing_bytes))


def folder(tmp_path: Path, config: Mapping[str, Any], **files: Any) -> Path:
    place = tmp_path / "My-Model"
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(config))
    weights(place / "model.safetensors", {"a": ("BF16", [10, 20], 400), "b": ("F32", [5], 20)})
    for name, content in files.items():
        (place / name.replace("__", ".")).write_text(json.dumps(content))
    return place


def test_a_folder_tells_its_dimensions_weights_and_size(tmp_path: Path) -> None:
    place = folder(tmp_path, PLAIN, tokenizer_config__json={"chat_template": "{{ messages }}"})
    spec = read_folder_spec(place)
    assert (spec.name, spec.architecture, spec.parameters) == ("my-model", "Qwen3ForCausalLM", 205)
    assert spec.kv_bytes(1000) == load_catalog().get_model("qwen3-8b").kv_bytes(1000)
    assert "chat" in spec.abilities
    (variant,) = spec.variants
    assert (variant.engine, variant.quantisation, variant.name) == ("vllm", "BF16", "bf16")
    assert variant.size_bytes == (place / "model.safetensors").stat().st_size


def test_a_folder_can_be_planned_for(tmp_path: Path) -> None:
    wanted = read_folder_candidate(folder(tmp_path, PLAIN))
    (placement,) = plan_placements(
        build_hypothetical_hardware(load_catalog().get_device("l4")), [wanted], EngineSettings()
    ).placements
    assert (placement.model, placement.path) == ("my-model", (tmp_path / "My-Model").resolve())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"layer_types": ["sliding_attention", "full_attention"] * 18, "sliding_window": 128}, (18, 128, 0, None)),
        ({"sliding_window_pattern": 6, "sliding_window": 1024}, (30, 1024, 0, None)),
        ({"sliding_window": 4096, "use_sliding_window": False}, (0, None, 0, None)),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, (0, None, 0, 576)),
        (
            {
                "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 9,
                "linear_num_value_heads": 32,
                "linear_num_key_heads": 16,
                "linear_key_head_dim": 128,
                "linear_value_head_dim": 128,
                "linear_conv_kernel_dim": 4,
            },
            (0, None, 27, None),
        ),
    ],
)
def test_layers_that_keep_less_are_understood(
    tmp_path: Path, config: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    spec = read_folder_spec(folder(tmp_path, PLAIN | config))
    found = (spec.sliding_layers, spec.sliding_window_tokens, spec.linear_layers, spec.latent_elements)
    assert found == expected
    if spec.linear_layers:
        assert spec.state_bytes == 27 * (32 * 128 * 128 * 4 + (2 * 16 * 128 + 32 * 128) * 3 * 2)


def test_the_text_part_of_a_model_that_sees_is_what_counts(tmp_path: Path) -> None:
    config = {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "vision_config": {}}
    text = PLAIN | {
        "layer_types": ["sliding_attention"] * 30 + ["full_attention"] * 6,
        "sliding_window": 1024,
        "global_head_dim": 512,
        "num_global_key_value_heads": 2,
    }
    spec = read_folder_spec(folder(tmp_path, config | {"text_config": text}))
    assert (spec.layers, spec.global_kv_heads, spec.global_head_dimension) == (36, 2, 512)
    assert "vision" in spec.abilities


@pytest.mark.parametrize(
    ("quantisation", "expected"),
    [
        ({"quant_method": "fp8"}, "FP8"),
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            "FP8",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
            },
            "GPTQ",
        ),
    ],
)
def test_the_precision_is_read_from_the_configuration(
    tmp_path: Path, quantisation: dict[str, Any], expected: str
) -> None:
    spec = read_folder_spec(folder(tmp_path, PLAIN | {"quantization_config": quantisation}))
    assert spec.variants[0].quantisation == expected


def test_weights_in_half_precision_run_on_older_devices_than_bfloat16(tmp_path: Path) -> None:
    half = read_folder_spec(folder(tmp_path, PLAIN | {"torch_dtype": "float16"})).variants[0]
    assert half.quantisation == "F16"
    assert explain_refusal(half, "7.5", "auto") is None
    brain = read_folder_spec(folder(tmp_path, PLAIN)).variants[0]
    assert explain_refusal(brain, "7.5", "auto") == "BF16 needs compute capability 8.0; the device has 7.5"


def test_packed_weights_are_counted_one_by_one(tmp_path: Path) -> None:
    place = folder(tmp_path, PLAIN | {"quantization_config": {"quant_method": "awq"}})
    weights(place / "model.safetensors", {"a.qweight": ("I32", [10, 10], 400)})
    assert read_folder_spec(place).parameters == 800


def test_a_folder_made_for_embeddings_writes_nothing(tmp_path: Path) -> None:
    assert read_folder_spec(folder(tmp_path, PLAIN, modules__json={})).abilities == ("embeddings",)


def test_a_weight_file_that_the_index_names_and_that_is_not_there_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    place = folder(tmp_path, PLAIN, model__safetensors__index__json=index)
    (place / "model.safetensors").rename(place / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelFileError, match="1 of 2 weight files are missing, the first is model-00002"):
        read_folder_spec(place)


def test_a_weight_file_that_is_cut_off_or_no_such_file_is_refused(tmp_path: Path) -> None:
    place = folder(tmp_path, PLAIN)
    weights(place / "model.safetensors", {"a": ("BF16", [10, 20], 400)}, missing_bytes=1)
    with pytest.raises(ModelFileError, match="is cut off"):
        read_folder_spec(place)
    for content in (b"", b"\xff" * 100, struct.pack("<Q", 2) + b"[]"):
        (place / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelFileError, match="safetensors"):
            read_folder_spec(place)
    (place / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"holds no \.safetensors file"):
        read_folder_spec(place)


@pytest.mark.parametrize("missing", ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"])
def test_a_dimension_that_is_missing_is_named(tmp_path: Path, missing: str) -> None:
    config = {key: value for key, value in PLAIN.items() if key != missing}
    with pytest.raises(ModelFileError, match=missing):
        read_folder_spec(folder(tmp_path, config))


def test_a_folder_without_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"config\.json"):
        read_folder_spec(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelFileError, match="holds no table"):
        read_folder_spec(tmp_path)
