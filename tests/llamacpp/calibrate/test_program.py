"""Measuring variants: derived files, compared answers, speeds, and the program around them."""

import json
import shutil
import threading
from pathlib import Path

import pytest

from appliance.errors import ConfigError, EngineFailed
from appliance.llamacpp.calibrate import program, variant_quality
from appliance.llamacpp.calibrate.interference import InterferenceSample, InterferenceStopwatch
from appliance.llamacpp.calibrate.quantise import SPARE_BYTES, derive_variant, estimate_bytes
from appliance.llamacpp.calibrate.speed import measure_decode, measure_prefill
from appliance.llamacpp.calibrate.variant_quality import compare_variant, load_quality_texts, read_source_model
from appliance.llamacpp.model import LlamaModel

PARAMETERS = 134_515_008


# ---- the texts ----


def test_the_texts_are_many_short_and_in_many_languages_and_each_is_asked_two_questions() -> None:
    assert len(load_quality_texts()) >= 60
    assert len({text.language for text in load_quality_texts()}) >= 10
    assert len({text.text for text in load_quality_texts()}) == len(load_quality_texts())
    for text in load_quality_texts():
        assert len(text.questions) == 2
        assert len(text.text) < 200
        for question in text.questions:
            assert len(set(question.labels)) == len(question.labels) >= 2


def test_the_first_few_texts_are_a_fair_sample() -> None:
    first = load_quality_texts()[:16]
    assert len({text.questions for text in first}) == len({text.questions for text in load_quality_texts()})
    assert len({text.language for text in first}) >= 3


# ---- disturbance ----


def test_waiting_is_told_as_a_share_of_the_time_and_unknown_stays_unknown() -> None:
    assert InterferenceSample(2.0, 1.0, 0.5).waited_share == 0.25
    assert InterferenceSample(1.0, 1.0, 3.0).waited_share == 1.0  # three threads that all waited
    assert InterferenceSample(1.0, 1.0, None).waited_share is None


def test_a_lap_counts_time_and_cpu_time_since_the_last_one() -> None:
    stopwatch = InterferenceStopwatch()
    sum(range(200_000))
    first = stopwatch.lap()
    assert first.cpu_seconds > 0
    threading.Event().wait(0.02)
    second = stopwatch.lap()
    assert second.seconds >= 0.02
    assert second.cpu_seconds < second.seconds


# ---- deriving ----


def test_an_unknown_form_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'q3'.*bf16"):
        derive_variant(tmp_path / "a.gguf", tmp_path / "b.gguf", "q3", parameters=1, threads=1)


def test_a_disk_that_is_too_full_is_told_in_bytes_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=SPARE_BYTES + 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(EngineFailed, match=r"bf16 takes about .* bytes and .* has .* free"):
        derive_variant(tmp_path / "a.gguf", tmp_path / "b.gguf", "bf16", parameters=PARAMETERS, threads=1)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_cannot_be_converted_leaves_nothing_behind(tmp_path: Path) -> None:
    source = tmp_path / "a.gguf"
    source.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(EngineFailed, match=r"cannot make bf16 from a\.gguf"):
        derive_variant(source, tmp_path / "b.gguf", "bf16", parameters=1, threads=1)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["bf16", "q8_0", "q4_0"])
def test_a_derived_file_is_about_as_large_as_estimated_and_no_larger(
    variant: str, smollm2_path: Path, tmp_path: Path
) -> None:
    target = tmp_path / f"{variant}.gguf"
    derive_variant(smollm2_path, target, variant, parameters=PARAMETERS, threads=1)
    assert 0.75 * estimate_bytes(PARAMETERS, variant) < target.stat().st_size <= estimate_bytes(PARAMETERS, variant)
    assert list(tmp_path.iterdir()) == [target]


# ---- comparing ----


@pytest.fixture
def four_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variant_quality, "_FEWEST_TEXTS", 4)


@pytest.mark.slow
@pytest.mark.usefixtures("four_texts")
def test_a_model_agrees_with_itself_and_a_coarser_one_lies_further_off(
    model: LlamaModel, smollm2_path: Path, tmp_path: Path
) -> None:
    source = read_source_model(model, 4, 60.0)
    same = compare_variant(model, source)
    assert (same.questions, same.label_agreement, same.same_label) == (8, 1.0, 1.0)
    assert same.median_kl < 1e-6
    path = tmp_path / "q4_0.gguf"
    derive_variant(smollm2_path, path, "q4_0", parameters=PARAMETERS, threads=1)
    coarse = LlamaModel.load(path, threads=1, context_tokens=512, sequences=4, batch_tokens=256)
    try:
        other = compare_variant(coarse, source)
    finally:
        coarse.close()
    assert other.median_kl > 0.02
    assert other.positions == same.positions
    model.memory_clear()


@pytest.mark.slow
def test_no_time_left_means_the_fewest_texts_that_say_something(model: LlamaModel) -> None:
    assert len(read_source_model(model, 61, 0.0).texts) == 8
    model.memory_clear()


# ---- speed ----


@pytest.mark.slow
def test_figures_name_what_they_were_measured_with(model: LlamaModel) -> None:
    prefill, decode = measure_prefill(model, 0.05), measure_decode(model, 4, 0.05)
    assert (prefill.kind, prefill.threads, prefill.sequences) == ("prefill", 1, 1)
    assert (decode.kind, decode.threads, decode.sequences) == ("decode", 1, 4)
    for figure in (prefill, decode):
        assert figure.repeats >= 3
        assert figure.tokens_per_second > 1
        # One thread cannot use more CPU time than the clock shows.
        assert figure.tokens_per_core_second >= 0.9 * figure.tokens_per_second
    assert model.memory_length(0) == 0


# ---- the program ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--variant", "q3=b.gguf"], "'q3' is not there and cannot be derived"),
        (["--variant", "q4_1=b.gguf"], "named twice"),
        (["--sequences", "64"], "at most 32"),
    ],
)
def test_arguments_that_cannot_be_are_refused_in_words(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code = program.main(["--source", "q4_1=a.gguf", "--threads", "1", *arguments])
    assert code == 2
    assert words in json.loads(capfd.readouterr().err.splitlines()[-1])["reason"]


def test_a_missing_source_ends_the_program_with_the_code_for_model_files(capfd: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--source", "q4_1=/nowhere/a.gguf", "--threads", "1", "--plain-kernels"]) == 3
    assert "does not exist" in json.loads(capfd.readouterr().err.splitlines()[-1])["reason"]
