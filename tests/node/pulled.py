"""A small model, what it can be pulled from, and a pull of it."""

import hashlib
import json
import struct
from dataclasses import replace

from appliance.catalog import (
    ModelSpec,
    Source,
    Variant,
    load_catalog,
)
from appliance.node.models.download import PullProgress
from appliance.node.models.model_store import ModelStore
from tests.node.gguf_bytes import gguf_bytes


def safetensors_bytes(size: int = 400) -> bytes:
    """A file with one tensor of so many bytes."""
    head = json.dumps({"a": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(head)) + head + bytes(size)


CONTENT = gguf_bytes()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FOLDER = {"config.json": b"{}", "model.safetensors": safetensors_bytes(), "tokenizer.json": b"[]"}


def variant_from(*sources: Source, sha256: str | None = SHA256, size_bytes: int = len(CONTENT)) -> Variant:
    return Variant("f16", "llamacpp", "gguf", "F16", size_bytes, sources, sha256)


def spec_with(variant: Variant) -> ModelSpec:
    return replace(load_catalog().embedded, name="tiny", variants=(variant,), embedded=False)


def pull(store: ModelStore, variant: Variant) -> list[PullProgress]:
    reports: list[PullProgress] = []
    stored = store.pull(spec_with(variant), variant, reports.append)
    assert stored.unchanged
    assert store.find("tiny", variant.name) == stored
    return reports


def left_over(store: ModelStore) -> list[str]:
    return sorted(path.name for path in (store.folder / "tiny").iterdir())


def folder_variant(source: Source) -> Variant:
    return Variant("bf16", "vllm", "safetensors", "BF16", 100, (source,))
