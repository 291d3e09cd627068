"""What a model's file says of its weights."""

from pathlib import Path

import pytest

from appliance.llamacpp.weights import is_packed


def test_a_file_of_four_bit_weights_is_packed_when_it_is_loaded(smollm2_path: Path) -> None:
    assert is_packed(smollm2_path)


def test_a_file_of_floats_stays_mapped(f32_path: Path) -> None:
    assert not is_packed(f32_path)


def test_what_cannot_be_read_is_not_packed_and_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\xff" * 60)
    assert not is_packed(broken)
    assert not is_packed(tmp_path / "missing.gguf")
    assert capfd.readouterr() == ("", "")
