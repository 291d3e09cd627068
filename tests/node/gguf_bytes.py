"""Small GGUF files, made to measure."""

import struct
from collections.abc import Mapping, Sequence

Entry = str | int | float | bool | Sequence[str] | Sequence[int] | Sequence[bool]

DIMENSIONS: Mapping[str, Entry] = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "general.file_type": 1,
    "llama.context_length": 256,
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tokenizer.ggml.tokens": [f"token {number}" for number in range(40)],
    "tokenizer.chat_template": "{{ messages }}",
}


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(value: Entry) -> bytes:
    """One value with its type number before it."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<Iq", 11, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    items = [entry(item) for item in value]
    kind = items[0][:4] if items else struct.pack("<I", 4)
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)


def gguf_bytes(
    changes: Mapping[str, Entry | None] | None = None,
    *,
    version: int = 3,
    tensor_type: int = 1,
    shape: Sequence[int] = (64, 40),
    tensor_bytes: int | None = None,
) -> bytes:
    """A whole file with one tensor. `changes` replaces header entries; None takes one out."""
    entries = {**DIMENSIONS, **(changes or {})}
    kept = {key: value for key, value in entries.items() if value is not None}
    header = b"GGUF" + struct.pack("<IQQ", version, 1, len(kept))
    header += b"".join(text(key) + entry(value) for key, value in kept.items())
    header += text("token_embd.weight") + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    header += struct.pack("<IQ", tensor_type, 0)
    header += b"\0" * (-len(header) % 32)
    elements = 1
    for size in shape:
        elements *= size
    return header + b"\1" * (elements * 2 if tensor_bytes is None else tensor_bytes)
