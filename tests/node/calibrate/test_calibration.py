"""Which variant follows from which figures, and when figures do not hold any more."""

import importlib.metadata
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from appliance.catalog import DevicePrior
from appliance.config import ToleranceSettings, Workload
from appliance.errors import BackendGarbage
from appliance.node.calibrate import calibration_store
from appliance.node.calibrate.calibration import (
    Calibration,
    CalibrationKey,
    MeasuredRate,
    Measurement,
    VariantFigures,
    VariantQuality,
    choose_variant,
    explain_staleness,
    merge_calibrations,
)
from appliance.node.calibrate.calibration_store import (
    CalibrationStore,
    identify_file,
    read_llama_cpp_identity,
    read_measurement,
)
from appliance.node.plan.recommendation import correct_prior

TOLERANCE = ToleranceSettings()
GOOD = VariantQuality(
    questions=122, label_agreement=1.0, same_label=0.97, positions=600, median_kl=0.004, mean_kl=0.006
)
BAD_LABELS = replace(GOOD, label_agreement=0.85)
FAR = replace(GOOD, median_kl=0.3)

MEASURED: dict[str, tuple[int, dict[int, tuple[float, float, float, float]]]] = {
    "q4_1": (98, {1: (270, 130, 200, 240), 2: (533, 243, 381, 468)}),
    "q8_0": (145, {1: (580, 100, 210, 390), 2: (1109, 189, 401, 749)}),
    "q4_0": (92, {1: (941, 170, 420, 700), 2: (1882, 313, 804, 1333)}),
    "bf16": (271, {1: (971, 70, 300, 650), 2: (1995, 135, 565, 1249)}),
}
"""Variant -> size, and by threads: prefill, and decode at 1, 8 and 32 sequences. With two threads as measured for
SmolLM2-135M on a 2-core machine; decoding with one is composed."""

KEY = CalibrationKey(hardware="aaaa", file="sha256:f00", llama_cpp="0.3.36+12345678")


def figure(
    kind: str, threads: int, sequences: int, rate: float, *, disturbed: bool = False, by_cpu: float | None = None
) -> MeasuredRate:
    assert kind in ("prefill", "decode")
    return MeasuredRate(
        kind="prefill" if kind == "prefill" else "decode",
        threads=threads,
        sequences=sequences,
        tokens_per_second=rate,
        tokens_per_core_second=(rate if by_cpu is None else by_cpu) / threads,
        repeats=5,
        disturbed=disturbed,
        waited_share=0.9 if disturbed else 0.01,
    )


def variant(name: str, quality: VariantQuality | None, threads: tuple[int, ...] = (2, 1)) -> VariantFigures:
    size, rates = MEASURED[name]
    figures = []
    for count in threads:
        figures.append(figure("prefill", count, 1, rates[count][0]))
        figures += [figure("decode", count, n, rate) for n, rate in zip((1, 8, 32), rates[count][1:], strict=True)]
    return VariantFigures(name, size, size, None, quality, tuple(figures))


def measurement(*variants: VariantFigures) -> Measurement:
    return Measurement(
        source=variants[0].name,
        parameters=134_515_008,
        variants=variants,
        left_out=(),
        llama_cpp="0.3.36",
        system="AVX512 = 1",
        load_average=0.1,
        stolen_seconds=0.0,
        seconds=18.0,
    )


EVERYTHING = measurement(
    variant("q4_1", None), variant("bf16", GOOD), variant("q8_0", GOOD), variant("q4_0", BAD_LABELS)
)


def calibration(of: Measurement = EVERYTHING, key: CalibrationKey = KEY) -> Calibration:
    return Calibration(key, "short", "2026-11-20T06:00:00+00:00", of)


@pytest.mark.parametrize("workload", ["balanced", "prefill", "decode"])
def test_the_quickest_variant_within_the_tolerance_is_chosen(workload: Workload) -> None:
    choice = choose_variant(EVERYTHING, workload, TOLERANCE)
    assert choice is not None
    assert (choice.variant, choice.threads) == ("bf16", 2)
    assert "1,995 prompt tokens/s and 565 generated tokens/s" in choice.reason
    assert "q4_1 (533 prompt tokens/s and 381 generated tokens/s)" in choice.reason


@pytest.mark.parametrize(
    ("tolerance", "chosen", "words"),
    [
        (
            ToleranceSettings(),
            "bf16",
            "q4_0 would be 1.4 times as quick, but it agreed with q4_1 on 85.0% of 122 labels",
        ),
        (ToleranceSettings(label_agreement=0.8), "q4_0", "agrees with it on 85.0% of 122 labels"),
        (ToleranceSettings(median_kl=0.001), "q4_1", "its median KL from q4_1 is 0.0040 (at most 0.001)"),
        (ToleranceSettings(label_agreement=1.0), "bf16", "agrees with it on 100.0%"),
    ],
)
def test_the_tolerance_decides_what_may_be_served(tolerance: ToleranceSettings, chosen: str, words: str) -> None:
    choice = choose_variant(EVERYTHING, "decode", tolerance)
    assert choice is not None
    assert choice.variant == chosen
    assert words in choice.reason


@pytest.mark.parametrize(
    ("questions", "differing", "tolerance", "served"),
    [
        (16, 1, 0.97, "bf16"),
        (16, 2, 0.97, "q4_1"),
        (122, 3, 0.97, "bf16"),
        (122, 4, 0.97, "q4_1"),
        (122, 1, 1.0, "q4_1"),
        (122, 0, 1.0, "bf16"),
    ],
)
def test_one_of_few_questions_may_differ_and_of_many_the_share_that_is_tolerated(
    questions: int, differing: int, tolerance: float, served: str
) -> None:
    quality = replace(GOOD, questions=questions, label_agreement=round(1 - differing / questions, 4))
    found = measurement(variant("q4_1", None), variant("bf16", quality))
    choice = choose_variant(found, "balanced", ToleranceSettings(label_agreement=tolerance))
    assert choice is not None
    assert choice.variant == served


def test_a_variant_that_was_not_compared_is_never_served() -> None:
    choice = choose_variant(measurement(variant("q4_1", None), variant("bf16", None)), "prefill", TOLERANCE)
    assert choice is not None
    assert choice.variant == "q4_1"
    assert "bf16 would be 3.7 times as quick, but its answers were not compared" in choice.reason


def test_a_variant_whose_file_is_gone_is_named_and_the_next_best_is_served() -> None:
    choice = choose_variant(EVERYTHING, "balanced", TOLERANCE, available={"q4_1", "q8_0"})
    assert choice is not None
    assert choice.variant == "q8_0"
    assert "its file is not here" in choice.reason


def test_the_source_wins_where_nothing_is_plainly_quicker() -> None:
    twin = replace(variant("q4_1", GOOD), name="q5_1", size_bytes=120)
    choice = choose_variant(measurement(variant("q4_1", None), twin), "balanced", TOLERANCE)
    assert choice is not None
    assert choice.variant == "q4_1"
    assert "no other variant that answers as it does is quicker" in choice.reason


def test_fewer_threads_are_chosen_where_more_bring_nothing() -> None:
    size, figures = 98, []
    for threads, rate in ((4, 500.0), (3, 505.0), (2, 499.0), (1, 250.0)):
        figures += [figure("prefill", threads, 1, rate), figure("decode", threads, 8, rate)]
    only = VariantFigures("q4_1", size, size, None, None, tuple(figures))
    choice = choose_variant(measurement(only), "balanced", TOLERANCE)
    assert choice is not None
    assert choice.threads == 2
    assert "no other variant was measured" in choice.reason


def test_threads_that_the_operator_fixed_are_kept_and_the_nearest_measured_count_speaks_for_them() -> None:
    choice = choose_variant(EVERYTHING, "prefill", TOLERANCE, threads=6)
    assert choice is not None
    assert (choice.variant, choice.threads) == ("bf16", 6)
    assert "1,995 prompt tokens/s" in choice.reason


def test_figures_taken_while_others_held_the_cores_are_compared_by_cpu_time() -> None:
    """By the clock the source looks twice as quick, because somebody else was busy when the variant had its turn."""
    source = VariantFigures(
        "q4_1",
        98,
        98,
        None,
        None,
        (figure("prefill", 2, 1, 500), figure("decode", 2, 8, 380), figure("decode", 1, 8, 900)),
    )
    quick = VariantFigures(
        "bf16",
        271,
        271,
        1.0,
        GOOD,
        (
            figure("prefill", 2, 1, 250, disturbed=True, by_cpu=1900),
            figure("decode", 2, 8, 100, disturbed=True, by_cpu=550),
            figure("prefill", 1, 1, 2000),
            figure("decode", 1, 8, 2000),
        ),
    )
    choice = choose_variant(measurement(source, quick), "balanced", TOLERANCE)
    assert choice is not None
    assert (choice.variant, choice.threads) == ("bf16", 2)
    assert "reckoned from CPU time" in choice.reason


def test_decode_between_measured_counts_is_a_straight_line_and_beyond_them_the_nearest() -> None:
    def at(*counts: tuple[int, float]) -> str:
        figures = (figure("prefill", 1, 1, 100), *(figure("decode", 1, n, rate) for n, rate in counts))
        choice = choose_variant(measurement(VariantFigures("a", 1, 1, None, None, figures)), "balanced", TOLERANCE)
        assert choice is not None
        return choice.reason

    assert "300 generated tokens/s" in at((4, 200), (16, 500))
    assert "200 generated tokens/s" in at((4, 200))
    assert "500 generated tokens/s" in at((16, 500))


def test_a_source_without_figures_leaves_nothing_to_choose() -> None:
    empty = replace(variant("q4_1", None), figures=())
    assert choose_variant(measurement(empty, variant("bf16", GOOD)), "balanced", TOLERANCE) is None


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (KEY, None),
        (replace(KEY, hardware="bbbb"), "on other hardware (aaaa; this is bbbb)"),
        (replace(KEY, file="sha256:bad"), "with another model file"),
        (replace(KEY, llama_cpp="0.3.37+1"), "with llama.cpp 0.3.36+12345678 (this is 0.3.37+1)"),
        (replace(KEY, file="x", llama_cpp="y"), "with another model file and with llama.cpp 0.3.36+12345678"),
    ],
)
def test_what_changed_since_figures_were_taken_is_named(now: CalibrationKey, words: str | None) -> None:
    reason = explain_staleness(KEY, now)
    assert (reason is None) if words is None else (reason is not None and words in reason)


def test_a_new_measurement_keeps_what_only_an_older_one_of_the_same_key_has() -> None:
    old = calibration(measurement(variant("q4_1", None), variant("q4_0", BAD_LABELS)))
    half = replace(variant("q4_1", None, threads=(1,)), size_bytes=99)
    new = replace(calibration(measurement(half, variant("bf16", GOOD))), extent="full")
    both = merge_calibrations(old, new)
    assert both.extent == "full"
    assert {one.name for one in both.measurement.variants} == {"q4_1", "q4_0", "bf16"}
    source = next(one for one in both.measurement.variants if one.name == "q4_1")
    assert source.size_bytes == 99
    assert {one.threads for one in source.figures} == {1, 2}
    assert merge_calibrations(replace(old, key=replace(KEY, file="other")), new) == new


def test_a_calibration_is_found_again_and_only_for_its_own_key(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path)
    assert store.read("small", "q4_1", KEY) == (None, None)
    store.write("small", calibration())
    assert store.read("small", "q4_1", KEY) == (calibration(), None)
    found, stale = store.read("small", "q4_1", replace(KEY, hardware="bbbb"))
    assert found is None
    assert stale == "measured on other hardware (aaaa; this is bbbb)"
    assert store.read("small", "q8_0", KEY) == (None, None)
    # Two machines that share a data directory do not take turns in overwriting each other.
    other = replace(KEY, hardware="bbbb")
    store.write("small", calibration(key=other))
    assert store.read("small", "q4_1", KEY)[0] == calibration()
    assert store.read("small", "q4_1", other)[0] == calibration(key=other)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1}', '{"format": 99}'])
def test_a_file_that_cannot_be_understood_counts_as_none(tmp_path: Path, text: str) -> None:
    store = CalibrationStore(tmp_path)
    store.write("small", calibration())
    (path,) = (tmp_path / "calibration" / "small").iterdir()
    path.write_text(text)
    assert store.read("small", "q4_1", KEY) == (None, None)


def test_a_proven_file_is_known_by_its_checksum_and_another_by_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    assert identify_file(path, "abc") == "sha256:abc"
    before = identify_file(path, None)
    path.write_bytes(b"GGUF2")
    assert before != identify_file(path, None)


def test_another_build_of_the_same_version_is_another_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed:
        version = "0.3.36"
        record = "llama_cpp/lib/libllama.so,sha256=AAA,1\n"

        def read_text(self, name: str) -> str | None:
            return self.record if name == "RECORD" else None

    installed = Installed()
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: installed)
    read_llama_cpp_identity.cache_clear()
    first = read_llama_cpp_identity()
    installed.record = "llama_cpp/lib/libllama.so,sha256=BBB,1\n"
    read_llama_cpp_identity.cache_clear()
    second = read_llama_cpp_identity()
    read_llama_cpp_identity.cache_clear()
    assert first != second
    assert first.startswith("0.3.36+")


def test_kernels_that_appear_make_another_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    for identity in ("plain", "kernels-01234567"):
        read_llama_cpp_identity.cache_clear()
        monkeypatch.setattr(calibration_store, "identify_kernels", lambda identity=identity: identity)
        told.append(read_llama_cpp_identity())
    read_llama_cpp_identity.cache_clear()
    assert told[0].endswith("+plain") and told[1].endswith("+kernels-01234567")


def test_a_result_that_is_not_what_the_program_promises_is_refused_by_field() -> None:
    table = json.loads(json.dumps(asdict(EVERYTHING)))
    assert read_measurement(table) == EVERYTHING
    table["variants"][1]["figures"][0]["tokens_per_second"] = "quick"
    with pytest.raises(BackendGarbage, match=r"variants\.1\.figures\.0\.tokens_per_second"):
        read_measurement(table)


def test_what_was_measured_here_takes_the_place_of_the_priors() -> None:
    prior = DevicePrior(
        name="some-cpu",
        title="Some CPU",
        kind="cpu",
        basis="assumed",
        source="assumed",
        memory_bandwidth_bytes_per_second=20_000,
        prefill_operations_per_second={"Q4_1": 10**12, "Q6_K": 7},
    )
    found = correct_prior(prior, EVERYTHING)
    assert found is not None
    operations = found.prefill_operations_per_second
    assert operations is not None
    # The best of all thread counts, for each thread: 270 tokens/s of Q4_1, less than was thought; 997 of BF16.
    assert operations["Q4_1"] == 2 * 134_515_008 * 270
    assert operations["BF16"] == 2 * 134_515_008 * 1995 // 2
    assert operations["Q6_K"] == 7
    # 135 tokens/s of 271 bytes each prove more bandwidth than the prior says.
    assert found.memory_bandwidth_bytes_per_second == 135 * 271
    disturbed = measurement(replace(EVERYTHING.variants[0], figures=(figure("prefill", 1, 1, 1, disturbed=True),)))
    assert correct_prior(prior, disturbed) == prior
    assert correct_prior(None, EVERYTHING) is None
