"""The GGUF loader against files that are not what they should be, and the vocabulary against hostile text."""

import math
import threading
from pathlib import Path

import numpy as np
import pytest

from appliance.errors import EngineFailed, ModelFileError
from appliance.llamacpp.context import ABORTED
from appliance.llamacpp.model import LlamaModel


def load(path: Path, context_tokens: int = 256) -> LlamaModel:
    return LlamaModel.load(path, threads=1, context_tokens=context_tokens, sequences=1, batch_tokens=32)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"absent\.gguf' does not exist: pull the model"):
        load(tmp_path / "absent.gguf")


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"GG", b"<!DOCTYPE html><html>not found</html>"])
def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "page.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="is not a GGUF file"):
        load(path)


@pytest.mark.parametrize("length", [4, 100, 1_000_000, 50_000_000])
def test_a_truncated_file_is_refused_with_llamas_reason_and_nothing_is_printed(
    smollm2_path: Path, tmp_path: Path, length: int, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "short.gguf"
    with smollm2_path.open("rb") as file:
        path.write_bytes(file.read(length))
    with pytest.raises(ModelFileError, match=r"short\.gguf.* pull it again\. llama\.cpp says: .+"):
        load(path)
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


def test_a_corrupt_header_is_refused(smollm2_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "corrupt.gguf"
    with smollm2_path.open("rb") as file:
        data = bytearray(file.read(2_000_000))
    data[8:4000] = bytes(range(256)) * 15 + bytes(152)
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match="corrupt"):
        load(path)


def test_a_context_that_fits_no_machine_is_an_engine_error(smollm2_path: Path) -> None:
    with pytest.raises(EngineFailed, match="ask for fewer tokens"):
        load(smollm2_path, context_tokens=2_000_000_000)


def test_closing_twice_is_harmless(smollm2_path: Path) -> None:
    loaded = load(smollm2_path)
    loaded.close()
    loaded.close()


def test_the_model_tells_what_it_is(model: LlamaModel) -> None:
    assert (model.architecture, model.vocabulary_size, model.context_tokens) == ("llama", 49152, 512)
    assert model.train_context_tokens == 8192
    assert model.sequence_context_tokens == 512
    assert {model.eos_token, *model.tokenize("<|im_end|>")} <= model.end_tokens
    assert "im_start" in model.metadata["tokenizer.chat_template"]
    assert 130_000_000 < model.n_params < 140_000_000
    assert model.size_bytes > 90_000_000


@pytest.mark.parametrize(
    "text",
    ["", "plain", "a\0b\0", "Grüße, 漢字 und 🦙", "\n\t  spaced  ", "e\u0301", "\U0010ffff", "x" * 5000],
)
def test_text_survives_tokens_and_back(model: LlamaModel, text: str) -> None:
    tokens = model.tokenize(text)
    assert b"".join(model.piece(token) for token in tokens).decode() == text


def test_a_lone_surrogate_becomes_the_replacement_character(model: LlamaModel) -> None:
    tokens = model.tokenize("a\ud800b")
    assert b"".join(model.piece(token) for token in tokens).decode() == "a\ufffdb"


def test_special_tokens_are_one_token_only_when_asked_for(model: LlamaModel) -> None:
    assert len(model.tokenize("<|im_end|>")) == 1
    spelled = model.tokenize("<|im_end|>", special=False)
    assert len(spelled) > 1
    assert not model.end_tokens.intersection(spelled)


def test_special_tokens_are_invisible_unless_asked_for(model: LlamaModel) -> None:
    (end,) = model.tokenize("<|im_end|>")
    assert model.piece(end) == b""
    assert model.piece(end, special=True) == b"<|im_end|>"


def test_tokenizing_is_safe_from_many_threads(model: LlamaModel) -> None:
    text, found = "The quick brown fox jumps over the lazy dog. " * 50, list[list[int]]()
    threads = [threading.Thread(target=lambda: found.append(model.tokenize(text))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(tokens == found[0] for tokens in found)
    assert len(found) == 8


def test_forks_share_cells_and_continue_alike(model: LlamaModel) -> None:
    model.reset()
    batch, prompt = model.batch, model.tokenize("The capital of France is")
    batch.clear()
    batch.add(prompt, 0, 0, last_output=True)
    assert model.decode() == 0
    model.memory_copy(0, 1, 0, len(prompt))
    assert model.memory_length(1) == len(prompt)
    batch.clear()
    assert batch.add_each([260, 260], [len(prompt)] * 2, [0, 1]) == 0
    assert model.decode() == 0
    np.testing.assert_allclose(model.rows[0], model.rows[1], atol=0.1)
    assert model.rows.shape == (2, model.vocabulary_size)


def test_a_token_of_several_sequences_is_computed_once_for_all(model: LlamaModel) -> None:
    model.reset()
    batch, prompt = model.batch, model.tokenize("The capital of France is")
    ids = np.array([3, 7], np.int32)
    zeros, twos = np.zeros(len(prompt), np.int32), np.full(len(prompt), 2, np.int32)
    wanted = np.zeros(len(prompt), np.int8)
    wanted[-1] = 1
    batch.clear()
    batch.add_forks(np.array(prompt, np.int32), np.arange(len(prompt), dtype=np.int32), zeros, twos, wanted, ids)
    assert model.decode() == 0
    assert [model.memory_length(sequence) for sequence in (3, 7)] == [len(prompt)] * 2
    assert model.piece(int(model.rows[0].argmax())) == b" Paris"
    assert math.isfinite(float(model.rows[0].max()))


def test_a_running_decode_gives_up_when_told(model: LlamaModel) -> None:
    model.reset()
    model.batch.clear()
    model.batch.add([100] * model.batch.capacity_tokens, 0, 0, last_output=True)
    model.abort()
    assert model.decode() == ABORTED
    model.reset()
    model.batch.clear()
    model.batch.add([100], 0, 0, last_output=True)
    assert model.decode() == 0
