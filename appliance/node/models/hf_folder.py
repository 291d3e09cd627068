"""A folder of safetensors that is not in the catalogue, read so that it can be planned for: its config.json, and the
heads of its weight files. Nothing is loaded, nothing is fetched."""

import json
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from appliance.catalog import FileSource, ModelSpec, Variant
from appliance.core import Ability
from appliance.core.json_types import JsonObject
from appliance.errors import ModelFileError

_MOST_HEADER_BYTES: Final = 100 << 20
_PACKED: Final = {"I32": 8, "I64": 16}
"""4-bit weights lie eight to an int32."""
_LINEAR: Final = frozenset({"linear_attention", "mamba", "mamba2", "recurrent", "conv", "short_conv"})
_QUANTISATIONS: Final = {
    "fp8": "FP8",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "mxfp4": "MXFP4",
    "modelopt": "FP8",
    "modelopt_fp4": "NVFP4",
}


def read_folder_spec(folder: Path) -> ModelSpec:
    """The model in `folder`. Raises ModelFileError if it is none, is cut off, or does not tell its dimensions."""
    config = _json(folder / "config.json")
    text = config.get("text_config")
    dimensions: JsonObject = text if isinstance(text, dict) else config
    elements, size_bytes = _weights(folder)
    layers, heads = _number(folder, dimensions, "num_hidden_layers"), _number(folder, dimensions, "num_attention_heads")
    embedding = _number(folder, dimensions, "hidden_size")
    kinds = _layer_kinds(dimensions, layers)
    linear, sliding = (sum(kind == one for kind in kinds) for one in ("linear", "sliding"))
    quantisation = _quantisation(config, dimensions)
    name = re.sub(r"[^a-z0-9._-]+", "-", folder.name.lower()).strip("-._")[:64] or "model"
    return ModelSpec(
        name=name,
        title=folder.name,
        family=str(config.get("model_type", "unknown")),
        publisher="unknown",
        licence="unknown",
        parameters=max(1, elements),
        context_tokens=int(dimensions.get("max_position_embeddings") or 2048),
        layers=layers,
        embedding=embedding,
        heads=heads,
        kv_heads=int(dimensions.get("num_key_value_heads") or heads),
        head_dimension=int(dimensions.get("head_dim") or max(1, embedding // heads)),
        vocabulary_tokens=_number(folder, dimensions, "vocab_size"),
        abilities=_abilities(folder, config),
        notes="Not in the catalogue: read from its own config.json.",
        variants=(_describe_variant(folder, quantisation, max(1, size_bytes)),),
        sliding_layers=sliding,
        sliding_window_tokens=int(dimensions["sliding_window"]) if sliding else None,
        architecture=next(iter(config.get("architectures") or ()), None),
        linear_layers=linear,
        state_bytes=_state_bytes(dimensions) * linear,
        latent_elements=_latent(dimensions),
        global_kv_heads=_global(dimensions, "num_global_key_value_heads", "num_key_value_heads") if sliding else None,
        global_head_dimension=_global(dimensions, "global_head_dim", "head_dim") if sliding else None,
    )


def _describe_variant(folder: Path, quantisation: str, size_bytes: int) -> Variant:
    return Variant(
        name=quantisation.lower(),
        engine="vllm",
        format="safetensors",
        quantisation=quantisation,
        size_bytes=size_bytes,
        sources=(FileSource(kind="file", path=str(folder)),),
    )


def check_weight_files(folder: Path) -> None:
    """ModelFileError if the weights' index names files that are not there, or a weight file is cut off."""
    for file in _weight_files(folder):
        for _ in _tensors(file):
            pass


def _layer_kinds(dimensions: JsonObject, layers: int) -> list[str]:
    """Of each layer: full, sliding or linear. What is not understood counts as full, which needs the most memory."""
    named = dimensions.get("layer_types") or dimensions.get("layers_block_type")
    if isinstance(named, list):
        # Blocks that only compute (mlp, moe) remember nothing and are no layers here; they count as full all the same.
        return ["linear" if one in _LINEAR else "sliding" if "sliding" in str(one) else "full" for one in named]
    window, every = dimensions.get("sliding_window"), dimensions.get("sliding_window_pattern")
    if window and isinstance(every, int) and every > 1:
        return ["full" if (index + 1) % every == 0 else "sliding" for index in range(layers)]
    interval = dimensions.get("full_attention_interval")
    if isinstance(interval, int) and interval > 1:
        return ["full" if (index + 1) % interval == 0 else "linear" for index in range(layers)]
    if window and dimensions.get("use_sliding_window", True) is True and dimensions.get("model_type") == "mistral":
        return ["sliding"] * layers
    return ["full"] * layers


def _state_bytes(dimensions: JsonObject) -> int:
    """What one linear layer keeps of a sequence: a matrix a head in f32, and the last inputs of a short convolution."""
    width = int(dimensions["hidden_size"])
    heads = _first(dimensions, 0, "linear_num_value_heads", "mamba_num_heads", "mamba_n_heads")
    if not heads:
        return 4 * 16 * width  # not understood: what the first Mamba kept, rather than nothing
    inner = _first(dimensions, 2, "mamba_expand", "expand") * width
    value = _first(dimensions, inner // heads, "linear_value_head_dim", "mamba_head_dim")
    key = _first(dimensions, 128, "linear_key_head_dim", "ssm_state_size", "mamba_d_state")
    groups = _first(dimensions, 1, "linear_num_key_heads", "n_groups", "mamba_n_groups")
    kernel = _first(dimensions, 4, "linear_conv_kernel_dim", "conv_kernel", "mamba_d_conv")
    convolution = (2 * groups * key + heads * value) * (kernel - 1) * 2
    return heads * value * key * 4 + convolution


def _first(dimensions: JsonObject, default: int, *names: str) -> int:
    """The number under the first of these names that has one: each family has names of its own."""
    return next((dimensions[name] for name in names if isinstance(dimensions.get(name), int)), default)


def _global(dimensions: JsonObject, name: str, layer_name: str) -> int | None:
    """What layers that keep every token have instead, as older and as newer files tell it."""
    layers = dimensions.get("per_layer_config")
    one: JsonObject = next(iter(layers.values()), {}) if isinstance(layers, dict) else {}
    return _first(dimensions, _first(one, 0, layer_name), name) or None


def _latent(dimensions: JsonObject) -> int | None:
    rank = dimensions.get("kv_lora_rank")
    return int(rank) + int(dimensions.get("qk_rope_head_dim") or 0) if rank else None


def _quantisation(config: JsonObject, dimensions: JsonObject) -> str:
    quantization = config.get("quantization_config") or dimensions.get("quantization_config")
    if not isinstance(quantization, dict):
        dtype = dimensions.get("dtype") or dimensions.get("torch_dtype") or config.get("torch_dtype")
        return "F16" if dtype == "float16" else "BF16"
    method = str(quantization.get("quant_method", ""))
    if method == "compressed-tensors":
        groups = json.dumps(quantization.get("config_groups", {}))
        bits = re.search(r'"num_bits": (\d+)', groups)
        is_float = '"type": "float"' in groups
        return ("NVFP4" if is_float else "GPTQ") if bits and bits[1] == "4" else "FP8" if is_float else "INT8"
    if method == "modelopt" and "FP4" in str(quantization.get("quant_algo", "")):
        return "NVFP4"
    return _QUANTISATIONS.get(method, method.upper() or "BF16")


def _abilities(folder: Path, config: JsonObject) -> tuple[Ability, ...]:
    writes = any("ForCausalLM" in str(one) or "Generation" in str(one) for one in config.get("architectures") or ())
    if not writes or (folder / "modules.json").is_file():  # modules.json: made for sentence-transformers
        return ("embeddings",)
    found: list[Ability] = ["completions", "labels", "decisions", "json_schema", "logprobs"]
    tokenizer = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file() or (tokenizer.is_file() and "chat_template" in _json(tokenizer)):
        found.insert(0, "chat")
    if "vision_config" in config:
        found.append("vision")
    return tuple(found)


def _weights(folder: Path) -> tuple[int, int]:
    """Weights, and bytes on disk."""
    files = _weight_files(folder)
    elements = sum(count * _PACKED.get(dtype, 1) for file in files for dtype, count in _tensors(file))
    return elements, sum(file.stat().st_size for file in files)


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(_json(index).get("weight_map", {}).values())
        missing = sorted(named - {file.name for file in files})
        if missing:
            lacking = f"{len(missing)} of {len(named)} weight files are missing"
            raise ModelFileError(f"{folder}: {lacking}, the first is {missing[0]}; pull again")
        files = [file for file in files if file.name in named]
    if not files:
        raise ModelFileError(f"{folder}: holds no .safetensors file")
    return files


def _tensors(file: Path) -> Iterator[tuple[str, int]]:
    """Type and number of elements of each tensor. ModelFileError unless the file is as long as it says."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, _MOST_HEADER_BYTES):
                raise ModelFileError(f"{file}: is cut off or damaged; pull again")
            header = json.loads(stream.read(length))
        needed = 8 + length
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            count = math.prod(tensor["shape"])
            needed = max(needed, 8 + length + tensor["data_offsets"][1])
            yield tensor["dtype"], count
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{file}: is no safetensors file: {error}") from error
    if needed > size:
        raise ModelFileError(f"{file}: is cut off: {needed:,} bytes are needed, {size:,} are there; pull again")


def _number(folder: Path, dimensions: JsonObject, key: str) -> int:
    value = dimensions.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelFileError(f"{folder / 'config.json'}: gives no usable {key} (found {value!r})")
    return value


def _json(path: Path) -> JsonObject:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelFileError(f"{path}: holds no table")
    return found
