"""Reads GGUF values from bytes that are not trusted: every count is checked against what is there before allocating."""

import struct
from collections.abc import Mapping
from typing import Any, Final

HEADER_LIMIT_BYTES = 256 << 20
"""Far above real headers: 150,000 tokens with their merges take about 6 MB."""
KEPT_STRING_BYTES = 1 << 20
KEPT_ARRAY_LENGTH = 4096
"""Longer arrays are vocabularies; of them only the length is kept."""

_SCALARS: Final[Mapping[int, str]] = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING: Final = 8
ARRAY: Final = 9

Scalar = int | float | bool | str
Value = Scalar | tuple[Scalar, ...] | None
"""None: an array too long to keep."""


class NeedsMoreBytes(Exception):
    """The bytes read so far end inside the header."""


class DamagedHeader(Exception):
    """What is wrong, without the file's name."""


class GgufReader:
    """A cursor over the bytes that were read; every step is checked against their end."""

    def __init__(self, buffer: bytes) -> None:
        self.buffer = buffer
        self.at = 0

    def read_scalar(self, pattern: str) -> Any:
        start = self.at
        self.skip(struct.calcsize(pattern))
        return struct.unpack_from(pattern, self.buffer, start)[0]

    def skip(self, length: int) -> None:
        if self.at + length > len(self.buffer):
            raise NeedsMoreBytes
        self.at += length

    def read_string(self) -> str:
        length: int = self.read_scalar("<Q")
        if length > HEADER_LIMIT_BYTES:
            raise DamagedHeader(f"damaged: a string of {length} bytes at byte {self.at}")
        start = self.at
        self.skip(length)
        return self.buffer[start : start + min(length, KEPT_STRING_BYTES)].decode("utf-8", "replace")

    def read_value(self, kind: int, depth: int = 0) -> Value:
        if kind == STRING:
            return self.read_string()
        if kind == ARRAY:
            return self._read_array(depth)
        if kind not in _SCALARS:
            raise DamagedHeader(f"damaged: a value of unknown type {kind} at byte {self.at}")
        number: Scalar = self.read_scalar(_SCALARS[kind])
        return number

    def _read_array(self, depth: int) -> Value:
        kind: int = self.read_scalar("<I")
        length: int = self.read_scalar("<Q")
        if length > HEADER_LIMIT_BYTES or (kind == ARRAY and (depth > 1 or length > KEPT_ARRAY_LENGTH)):
            raise DamagedHeader(f"damaged: an array of {length} items of type {kind} at byte {self.at}")
        if kind in _SCALARS and length > KEPT_ARRAY_LENGTH:
            self.skip(length * struct.calcsize(_SCALARS[kind]))
            return None
        if kind == STRING and length > KEPT_ARRAY_LENGTH:
            self._skip_strings(length)
            return None
        items = [self.read_value(kind, depth + 1) for _ in range(length)]
        return tuple(item for item in items if isinstance(item, Scalar))

    def _skip_strings(self, count: int) -> None:
        buffer, at, end = self.buffer, self.at, len(self.buffer)
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > end:
                raise NeedsMoreBytes
            at += 8 + unpack(buffer, at)[0]
        self.at = at
        self.skip(0)
