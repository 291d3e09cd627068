"""Reads the header of a GGUF file: what the model is, its dimensions, and whether the file is whole.

Nothing in the file is trusted: what is wrong becomes a ModelFileError that names the file and the place.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from appliance.catalog import FileSource, ModelSpec, Variant
from appliance.core import Ability
from appliance.errors import ModelFileError
from appliance.node.models.gguf_reader import (
    ARRAY,
    HEADER_LIMIT_BYTES,
    DamagedHeader,
    GgufReader,
    NeedsMoreBytes,
    Value,
)
from appliance.node.models.gguf_types import BLOCKS, FILE_TYPES

FIRST_READ_BYTES = 4 << 20
ENTRY_LIMIT = 1_000_000

TEXT_ABILITIES: tuple[Ability, ...] = ("completions", "labels", "decisions", "json_schema", "logprobs")
"""What the CPU engine can do with any model that writes text."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF says of itself. `needed_bytes` is how long the file must be to hold all its tensors."""

    path: Path
    version: int
    architecture: str
    title: str
    licence: str | None
    quantisation: str
    context_tokens: int
    layers: int
    embedding: int
    heads: int
    kv_heads: int
    """The most that any layer has."""
    head_dimension: int
    vocabulary_tokens: int
    sliding_window_tokens: int | None
    sliding_layers: int
    """0 if the file does not say which layers slide: then all are counted in full."""
    parameters: int
    tensors: int
    needed_bytes: int
    size_bytes: int
    has_chat_template: bool
    metadata: Mapping[str, Value]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of the GGUF at `path`.

    Raises ModelFileError: missing, not a GGUF, damaged, a part of a split model, or "truncated: has N bytes, needs M".
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            return _parse_growing(path, size_bytes, file)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror}); pull the model again") from error


def _parse_growing(path: Path, size_bytes: int, file: BinaryIO) -> GgufHeader:
    """Read more and more of the file until the header is whole; most headers lie in the first read."""
    window = FIRST_READ_BYTES
    while True:
        file.seek(0)
        buffer = file.read(min(window, size_bytes, HEADER_LIMIT_BYTES))
        try:
            return _parse(path, size_bytes, GgufReader(buffer))
        except NeedsMoreBytes:
            if len(buffer) >= HEADER_LIMIT_BYTES:
                raise ModelFileError(f"{path}: its header is larger than {HEADER_LIMIT_BYTES} bytes") from None
            if len(buffer) >= size_bytes:
                raise ModelFileError(
                    f"{path}: truncated: has {size_bytes} bytes and ends inside its header; pull the model again"
                ) from None
            window *= 4
        except DamagedHeader as error:
            raise ModelFileError(f"{path}: {error}; pull the model again") from None


def _parse(path: Path, size_bytes: int, reader: GgufReader) -> GgufHeader:
    version, tensor_count, entry_count = _preamble(reader)
    metadata: dict[str, Value] = {}
    lengths: dict[str, int] = {}
    for _ in range(entry_count):
        key = reader.read_string()
        kind: int = reader.read_scalar("<I")
        lengths[key] = _length_ahead(reader, kind)
        metadata[key] = reader.read_value(kind)
    if _number(metadata, "split.count", 1) > 1:
        raise DamagedHeader("is one part of a split model; only models in one file can be served")
    tensors = _tensors(reader, tensor_count)
    alignment = _number(metadata, "general.alignment", 32)
    if not 0 < alignment <= 1 << 20:
        raise DamagedHeader(f"damaged: general.alignment is {alignment}")
    data_start = -(-reader.at // alignment) * alignment
    needed_bytes = data_start + max((tensor.offset + tensor.bytes for tensor in tensors), default=0)
    if size_bytes < needed_bytes:
        raise DamagedHeader(f"truncated: has {size_bytes} bytes, needs {needed_bytes}")
    return _describe(path, version, metadata, lengths, tensors, needed_bytes, size_bytes)


def _preamble(reader: GgufReader) -> tuple[int, int, int]:
    magic: bytes = reader.read_scalar("<4s")
    if magic != b"GGUF":
        raise DamagedHeader(f"is not a GGUF file (it starts with {magic!r})")
    version: int = reader.read_scalar("<I")
    if version not in (2, 3):
        raise DamagedHeader(f"is GGUF version {version}; versions 2 and 3 are read")
    tensor_count: int = reader.read_scalar("<Q")
    entry_count: int = reader.read_scalar("<Q")
    if max(tensor_count, entry_count) > ENTRY_LIMIT:
        raise DamagedHeader(f"damaged: it claims {tensor_count} tensors and {entry_count} header entries")
    return version, tensor_count, entry_count


def _length_ahead(reader: GgufReader, kind: int) -> int:
    """How many items the array at the cursor has; 0 if it is not one. The cursor stays."""
    if kind != ARRAY:
        return 0
    at = reader.at
    reader.read_scalar("<I")
    length: int = reader.read_scalar("<Q")
    reader.at = at
    return length


@dataclass(frozen=True, slots=True)
class _Tensor:
    kind: str
    elements: int
    offset: int
    bytes: int


def _tensors(reader: GgufReader, count: int) -> list[_Tensor]:
    tensors = []
    for _ in range(count):
        name = reader.read_string()
        dimension_count: int = reader.read_scalar("<I")
        if dimension_count > 4:
            raise DamagedHeader(f"damaged: tensor {name[:80]!r} has {dimension_count} dimensions")
        elements = math.prod([reader.read_scalar("<Q") for _ in range(dimension_count)])
        kind: int = reader.read_scalar("<I")
        offset: int = reader.read_scalar("<Q")
        if max(elements, offset) > 1 << 50:
            raise DamagedHeader(f"damaged: tensor {name[:80]!r} claims {elements} elements at offset {offset}")
        # A type newer than this table: its size is unknown, so only its start can be checked.
        label, block, block_bytes = BLOCKS.get(kind, (f"type {kind}", 1, 0))
        tensors.append(_Tensor(label, elements, offset, elements // block * block_bytes))
    return tensors


def _describe(
    path: Path,
    version: int,
    metadata: Mapping[str, Value],
    lengths: Mapping[str, int],
    tensors: Sequence[_Tensor],
    needed_bytes: int,
    size_bytes: int,
) -> GgufHeader:
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise DamagedHeader("does not say its architecture (general.architecture)")
    layers = _needed(metadata, f"{architecture}.block_count")
    embedding = _needed(metadata, f"{architecture}.embedding_length")
    heads = _needed(metadata, f"{architecture}.attention.head_count")
    window = _number(metadata, f"{architecture}.attention.sliding_window", 0)
    licence = metadata.get("general.license")
    return GgufHeader(
        path=path,
        version=version,
        architecture=architecture,
        title=str(metadata.get("general.name") or path.stem),
        licence=licence if isinstance(licence, str) else None,
        quantisation=_quantisation(metadata, tensors),
        context_tokens=_needed(metadata, f"{architecture}.context_length"),
        layers=layers,
        embedding=embedding,
        heads=heads,
        kv_heads=_number(metadata, f"{architecture}.attention.head_count_kv", heads) or heads,
        head_dimension=_head_dimension(metadata, architecture) or max(1, embedding // heads),
        vocabulary_tokens=lengths.get("tokenizer.ggml.tokens") or _number(metadata, f"{architecture}.vocab_size", 0),
        sliding_window_tokens=window or None,
        sliding_layers=_sliding_layers(metadata, architecture, layers) if window else 0,
        parameters=sum(tensor.elements for tensor in tensors),
        tensors=len(tensors),
        needed_bytes=needed_bytes,
        size_bytes=size_bytes,
        has_chat_template="tokenizer.chat_template" in metadata,
        metadata=metadata,
    )


def _number(metadata: Mapping[str, Value], key: str, default: int) -> int:
    """A whole number of the header; the largest one where there is one a layer."""
    value = metadata.get(key)
    if isinstance(value, tuple):
        value = max((item for item in value if isinstance(item, int)), default=None)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 1 << 40:
        raise DamagedHeader(f"damaged: {key} is {value!r}")
    return value


def _needed(metadata: Mapping[str, Value], key: str) -> int:
    value = _number(metadata, key, 0)
    if not 0 < value <= 1 << 31:
        raise DamagedHeader(f"its header gives no usable {key} (found {metadata.get(key)!r})")
    return value


def _head_dimension(metadata: Mapping[str, Value], architecture: str) -> int:
    """The larger one of keys and values; 0 if neither is given."""
    return max(_number(metadata, f"{architecture}.attention.{name}_length", 0) for name in ("key", "value"))


def _sliding_layers(metadata: Mapping[str, Value], architecture: str, layers: int) -> int:
    pattern = metadata.get(f"{architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, tuple):
        return min(layers, sum(item is True for item in pattern))
    return 0


def _quantisation(metadata: Mapping[str, Value], tensors: Sequence[_Tensor]) -> str:
    named = metadata.get("general.file_type")
    if isinstance(named, int) and named in FILE_TYPES:
        return FILE_TYPES[named]
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[tensor.kind] += tensor.elements
    return weights.most_common(1)[0][0] if weights else "unknown"


def build_gguf_spec(header: GgufHeader) -> ModelSpec:
    """A model that is not in the catalogue, from its own header, so that it can be planned for like any other."""
    name = re.sub(r"[^a-z0-9._-]+", "-", header.path.stem.lower()).strip("-._")[:64] or "model"
    variant = Variant(
        name=re.sub(r"[^a-z0-9._-]+", "-", header.quantisation.lower()),
        engine="llamacpp",
        format="gguf",
        quantisation=header.quantisation,
        size_bytes=header.size_bytes,
        sources=(FileSource(kind="file", path=str(header.path)),),
    )
    return ModelSpec(
        name=name,
        title=header.title,
        family=header.architecture,
        publisher="unknown",
        licence=header.licence or "unknown",
        parameters=max(1, header.parameters),
        context_tokens=header.context_tokens,
        layers=header.layers,
        embedding=header.embedding,
        heads=header.heads,
        kv_heads=header.kv_heads,
        head_dimension=header.head_dimension,
        vocabulary_tokens=max(1, header.vocabulary_tokens),
        abilities=_abilities(header),
        notes="Not in the catalogue: read from the file's own header.",
        variants=(variant,),
        sliding_layers=header.sliding_layers,
        sliding_window_tokens=header.sliding_window_tokens if header.sliding_layers else None,
    )


def _abilities(header: GgufHeader) -> tuple[Ability, ...]:
    """What its chat template speaks of; the engine finds out which of it is true."""
    if not header.has_chat_template:
        return TEXT_ABILITIES
    template = str(header.metadata.get("tokenizer.chat_template", ""))
    found: list[Ability] = ["chat", *TEXT_ABILITIES]
    if "tools" in template:
        found.append("tools")
    if "</think>" in template or "<|channel|>" in template:
        found.append("reasoning")
    return tuple(found)
