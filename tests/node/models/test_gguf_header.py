"""The header of a GGUF: read right when it is whole, refused clearly when it is not, whatever the bytes."""

import ctypes
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.catalog import load_catalog
from appliance.errors import ModelFileError
from appliance.node.models import gguf_header
from appliance.node.models.gguf_header import build_gguf_spec, read_gguf_header
from appliance.node.models.gguf_types import BLOCKS
from tests.node.gguf_bytes import Entry, gguf_bytes, text


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return path


def refusal(tmp_path: Path, content: bytes) -> str:
    path = written(tmp_path, content)
    with pytest.raises(ModelFileError) as caught:
        read_gguf_header(path)
    assert str(path) in caught.value.message
    return caught.value.message


def test_the_real_models_header_agrees_with_the_catalogue(smollm2_path: Path) -> None:
    header, spec = read_gguf_header(smollm2_path), load_catalog().embedded
    for field in ("parameters", "context_tokens", "layers", "embedding", "heads", "kv_heads", "head_dimension"):
        assert getattr(header, field) == getattr(spec, field), field
    assert header.vocabulary_tokens == spec.vocabulary_tokens
    assert header.quantisation == spec.variants[0].quantisation
    assert header.needed_bytes == header.size_bytes == spec.variants[0].size_bytes
    assert header.has_chat_template


def test_a_file_cut_short_is_named_with_both_numbers(tmp_path: Path) -> None:
    whole = gguf_bytes()
    message = refusal(tmp_path, whole[:-1])
    assert f"has {len(whole) - 1} bytes, needs {len(whole)}" in message


def test_a_file_cut_inside_its_header_is_called_truncated(tmp_path: Path) -> None:
    assert "truncated" in refusal(tmp_path, gguf_bytes()[:100])


def test_an_empty_file_and_one_that_is_missing_are_refused(tmp_path: Path) -> None:
    assert "truncated" in refusal(tmp_path, b"")
    with pytest.raises(ModelFileError, match="pull the model again"):
        read_gguf_header(tmp_path / "missing.gguf")
    with pytest.raises(ModelFileError, match="pull the model again"):
        read_gguf_header(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"PK\3\4" + bytes(100), "not a GGUF"),
        (gguf_bytes(version=1), "version 1"),
        (gguf_bytes({"split.count": 3}), "split"),
        (gguf_bytes({"general.architecture": None}), "architecture"),
        (gguf_bytes({"llama.block_count": None}), "llama.block_count"),
        (gguf_bytes({"llama.block_count": 0}), "llama.block_count"),
        (gguf_bytes({"llama.context_length": "many"}), "llama.context_length"),
        (gguf_bytes({"general.alignment": 0}), "alignment"),
        (gguf_bytes(shape=(1, 1, 1, 1, 1)), "5 dimensions"),
        (gguf_bytes(shape=(1 << 40, 1 << 40), tensor_bytes=8), "claims"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1), "claims"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q", 1 << 60) + bytes(50), "string of"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text("k") + struct.pack("<IIQ", 9, 4, 1 << 60), "array of"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text("k") + struct.pack("<I", 99), "unknown type 99"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, content: bytes, expected: str) -> None:
    assert expected in refusal(tmp_path, content)


def test_a_header_beyond_the_first_read_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "FIRST_READ_BYTES", 64)
    assert read_gguf_header(written(tmp_path, gguf_bytes())).title == "Tiny"


def test_a_vocabulary_is_counted_and_not_kept(tmp_path: Path) -> None:
    words: Entry = [f"word {number}" for number in range(5000)]
    header = read_gguf_header(written(tmp_path, gguf_bytes({"tokenizer.ggml.tokens": words})))
    assert header.vocabulary_tokens == 5000
    assert header.metadata["tokenizer.ggml.tokens"] is None


def test_heads_that_differ_by_layer_count_as_the_most_of_any(tmp_path: Path) -> None:
    header = read_gguf_header(written(tmp_path, gguf_bytes({"llama.attention.head_count_kv": [0, 4]})))
    assert header.kv_heads == 4


def test_the_head_dimension_is_what_the_file_says_or_follows_from_the_heads(tmp_path: Path) -> None:
    assert read_gguf_header(written(tmp_path, gguf_bytes())).head_dimension == 16
    given_one = gguf_bytes({"llama.attention.key_length": 32, "llama.attention.value_length": 24})
    assert read_gguf_header(written(tmp_path, given_one)).head_dimension == 32


def test_sliding_layers_are_counted_only_where_the_file_names_them(tmp_path: Path) -> None:
    window = {"llama.attention.sliding_window": 128}
    silent = read_gguf_header(written(tmp_path, gguf_bytes(window)))
    assert (silent.sliding_window_tokens, silent.sliding_layers) == (128, 0)
    named = gguf_bytes({**window, "llama.attention.sliding_window_pattern": [True, False]})
    assert read_gguf_header(written(tmp_path, named)).sliding_layers == 1
    assert build_gguf_spec(read_gguf_header(written(tmp_path, named))).kv_bytes(1000) == (1000 + 128) * 2 * 2 * 16 * 2


def test_a_tensor_type_newer_than_the_table_is_not_held_against_the_file(tmp_path: Path) -> None:
    header = read_gguf_header(
        written(tmp_path, gguf_bytes({"general.file_type": None}, tensor_type=77, tensor_bytes=0))
    )
    assert header.quantisation == "type 77"


def test_a_model_outside_the_catalogue_can_be_planned_for_from_its_header(tmp_path: Path) -> None:
    path = tmp_path / "My Model (v2).gguf"
    path.write_bytes(gguf_bytes())
    spec = build_gguf_spec(read_gguf_header(path))
    assert spec.name == "my-model-v2"
    assert spec.variants[0].quantisation == "F16"
    assert spec.variants[0].size_bytes == path.stat().st_size
    assert "chat" in spec.abilities
    path.write_bytes(gguf_bytes({"tokenizer.chat_template": None}))
    assert "chat" not in build_gguf_spec(read_gguf_header(path)).abilities


def test_the_table_of_block_sizes_agrees_with_the_built_library() -> None:
    ggml = pytest.importorskip("llama_cpp._ggml").libggml
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    for kind, (name, elements, size_bytes) in BLOCKS.items():
        assert (ggml.ggml_blck_size(kind), ggml.ggml_type_size(kind)) == (elements, size_bytes), name


WHOLE = gguf_bytes({"llama.attention.head_count_kv": [2, 2], "llama.rope.freq_base": 10000.0})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    length=st.integers(0, len(WHOLE)),
    changes=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=6),
)
def test_no_damage_gets_anything_but_a_model_file_error(
    tmp_path: Path, length: int, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(WHOLE)
    for place, value in changes:
        content[place] = value
    path = written(tmp_path, bytes(content[:length]))
    try:
        build_gguf_spec(read_gguf_header(path))
    except ModelFileError:
        return


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.binary(max_size=400))
def test_no_bytes_after_the_magic_get_anything_but_a_model_file_error(tmp_path: Path, tail: bytes) -> None:
    with pytest.raises(ModelFileError):
        read_gguf_header(written(tmp_path, b"GGUF\3\0\0\0" + tail))
