"""What a model's file says of its weights."""

import struct
from pathlib import Path

import pytest

from appliance.llamacpp.weights import has_packed_weights


def test_a_file_of_four_bit_weights_is_packed_when_it_is_loaded(smollm2_path: Path) -> None:
    assert has_packed_weights(smollm2_path)


def test_a_file_of_floats_stays_mapped(f32_path: Path) -> None:
    assert not has_packed_weights(f32_path)


def test_a_file_type_that_is_no_number_is_not_packed(tmp_path: Path) -> None:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    odd = tmp_path / "odd.gguf"
    string = 8
    odd.write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"general.file_type") + struct.pack("<I", string) + text(b"q8")
    )
    assert not has_packed_weights(odd)


def test_what_cannot_be_read_is_not_packed_and_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\xff" * 60)
    assert not has_packed_weights(broken)
    assert not has_packed_weights(tmp_path / "missing.gguf")
    assert capfd.readouterr() == ("", "")
