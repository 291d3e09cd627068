"""What vLLM holds on each device, in bytes, before it has run there. Pure.

It takes a share of a device's memory and fills what weights, activations, graphs and its own buffers leave with the KV
cache. Weights and KV cache follow from the model; the rest is assumed until it is measured (`VllmOverheads`).
"""

from dataclasses import dataclass
from typing import Final

from appliance.catalog import ModelSpec, Variant
from appliance.engines.base import EngineMemory

_CONTEXT_BYTES: Final = 800_000_000
"""CUDA context, libraries and kernels of one process on one device."""
_NCCL_BYTES: Final = 1_000_000_000
"""Buffers for what the devices of one copy tell each other."""
_GRAPH_BYTES: Final = 500_000_000
_GRAPH_BYTES_PER_SEQUENCE: Final = 2_000_000
_GRAPH_SEQUENCES: Final = 512
"""Graphs are captured for batches up to so many sequences."""
_ACTIVATION_WIDTHS: Final = 20
"""Rows as wide as the hidden state that a token of the largest step needs at once, in 16 bits."""
_LOGIT_COPIES: Final = 3
"""Rows of f32 as long as the vocabulary that sampling needs for each sequence: logits, probabilities, sorted ones."""
_VISION_BYTES: Final = 1_500_000_000
"""The largest images of one step, and what was computed of them."""
_COMPUTED_SIZE_MARGIN: Final = 0.02
"""Of weights whose size follows from the parameters: what a repository holds besides."""


@dataclass(frozen=True, slots=True)
class VllmOverheads:
    """What one start of vLLM with one model on one kind of device really held, for the next plan.

    `weights_bytes` as its log says (`Model loading took`), `other_bytes` everything that is neither weights nor KV.
    """

    weights_bytes: int
    other_bytes: int


def estimate_device_memory(
    model: ModelSpec,
    variant: Variant,
    *,
    tensor_parallel: int,
    batch_tokens: int,
    sequences: int,
    kv_bytes: int = 0,
    measured: VllmOverheads | None = None,
) -> EngineMemory:
    """On each of the devices that one copy is split over. `kv_bytes` is on each device, too.

    Activations are split, the hidden state itself is not; half of the rows are counted as split.
    """
    if measured is not None:
        return EngineMemory(measured.weights_bytes, kv_bytes, measured.other_bytes, 0)
    weights = variant.size_bytes
    if variant.size_basis == "computed":
        weights = int(weights * (1 + _COMPUTED_SIZE_MARGIN))
    rows = _ACTIVATION_WIDTHS / 2 * (1 + 1 / tensor_parallel)
    activations = int(2 * batch_tokens * rows * model.embedding)
    logits = 4 * _LOGIT_COPIES * sequences * model.vocabulary_tokens
    graphs = _GRAPH_BYTES + _GRAPH_BYTES_PER_SEQUENCE * min(sequences, _GRAPH_SEQUENCES)
    vision = _VISION_BYTES if "vision" in model.abilities else 0
    nccl = _NCCL_BYTES if tensor_parallel > 1 else 0
    return EngineMemory(
        weights_bytes=-(-weights // tensor_parallel),
        kv_bytes=kv_bytes,
        buffers_bytes=activations + logits + graphs + vision,
        program_bytes=_CONTEXT_BYTES + nccl,
    )


def can_split(model: ModelSpec, devices: int) -> bool:
    """Whether one copy can be split over so many devices: whole query heads, and whole KV heads or copies of them."""
    if model.heads % devices:
        return False
    return model.latent_elements is not None or model.kv_heads % devices == 0 or devices % model.kv_heads == 0


def explain_refusal(variant: Variant, compute_capability: str | None, kv_dtype: str) -> str | None:
    """Why a device cannot compute this precision; None if it can. Limits as vLLM 0.33 has them, except FP8: below
    8.9 it would be unpacked on the way, which costs the speed that it is chosen for."""
    if compute_capability is None:
        return "the device does not tell its compute capability"
    capability = tuple(int(part) for part in compute_capability.split("."))
    least = _LEAST.get(variant.quantisation)
    if least is None:
        return f"vLLM does not serve {variant.quantisation}; it serves {', '.join(_LEAST)}"
    if capability < least:
        needed = ".".join(map(str, least))
        return f"{variant.quantisation} needs compute capability {needed}; the device has {compute_capability}"
    if kv_dtype == "fp8" and capability < _LEAST["FP8"]:
        return f"a KV cache in fp8 needs compute capability 8.9; the device has {compute_capability}"
    return None


def describe_precision(variant: Variant, compute_capability: str | None) -> str:
    """What is to be known of a precision that a device only unpacks; empty if it computes with it."""
    if variant.quantisation in ("MXFP4", "NVFP4") and float(compute_capability or 0) < 10:
        return f"{variant.quantisation} saves memory here and no time: the device has no 4-bit arithmetic"
    return ""


_LEAST: Final = {
    "BF16": (8, 0),
    "F16": (7, 5),
    "INT8": (7, 5),
    "FP8": (8, 9),
    "AWQ": (7, 5),
    "GPTQ": (7, 5),
    "MXFP4": (8, 0),
    "NVFP4": (8, 0),
}
"""Compute capability that a precision needs at least."""
