"""Calibration orders, the program that carries them out, and what is kept of it."""

import fcntl
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.catalog import load_catalog
from appliance.config import EngineSettings, ToleranceSettings
from appliance.errors import ApplianceError, EngineFailed, ModelFileError, UnknownModel
from appliance.node.calibrate import calibrator as module
from appliance.node.calibrate.calibration import Calibration, CalibrationKey
from appliance.node.calibrate.calibration_store import CalibrationStore
from appliance.node.calibrate.calibrator import (
    CalibrationEffort,
    CalibrationOrder,
    CalibrationStep,
    build_calibration_key,
    build_calibration_order,
    calibrate_model,
)
from appliance.node.hardware.probe import probe_hardware
from appliance.node.models.candidates import select_candidate, select_measured_variants
from appliance.node.models.model_store import ModelStore
from appliance.node.plan.models import ModelCandidate
from appliance.node.plan.planner import plan_placements
from tests.node.calibrate.test_calibration import GOOD, KEY, calibration, measurement, variant
from tests.node.gguf_bytes import gguf_bytes

EMBEDDED = load_catalog().embedded


def stored_source(home: Path, content: bytes = b"") -> tuple[ModelStore, ModelCandidate]:
    store = ModelStore(home)
    path = store.locate(EMBEDDED.name, "q4_1")
    path.parent.mkdir(parents=True)
    path.write_bytes(content or gguf_bytes())
    return store, ModelCandidate(EMBEDDED, EMBEDDED.variants[0], path)


def order(source: ModelCandidate, key: CalibrationKey = KEY, variants: tuple[str, ...] = ("bf16",)) -> CalibrationOrder:
    return CalibrationOrder(source, key, "short", variants, threads=(1,), tolerance=ToleranceSettings(), keep_all=True)


def put_derived(store: ModelStore, name: str, derived_from: str = KEY.file) -> Path:
    draft = store.locate_draft(EMBEDDED.name, name)
    draft.parent.mkdir(parents=True)
    draft.write_bytes(gguf_bytes())
    return store.adopt_draft(EMBEDDED.name, name, source="q4_1", derived_from=derived_from).path


@pytest.mark.parametrize(
    ("cores", "extent", "counts"),
    [(1, "short", (1,)), (2, "short", (2, 1)), (8, "short", (8, 7)), (6, "full", (6, 5, 4, 2, 1)), (1, "full", (1,))],
)
def test_thread_counts_follow_from_the_cores(cores: int, extent: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    _, source = stored_source(tmp_path)
    made = build_calibration_order(
        source, KEY, "full" if extent == "full" else "short", cores=cores, tolerance=ToleranceSettings()
    )
    assert made.threads == counts


def test_what_the_catalogue_publishes_is_pulled_and_never_derived(tmp_path: Path) -> None:
    _, source = stored_source(tmp_path)
    published = replace(EMBEDDED, variants=(*EMBEDDED.variants, replace(EMBEDDED.variants[0], name="bf16")))
    other = replace(source, model=published)
    assert build_calibration_order(other, KEY, "short", cores=2, tolerance=ToleranceSettings()).variants == ("q8_0",)
    with pytest.raises(UnknownModel, match="appliance models pull smollm2-135m-instruct --variant bf16"):
        build_calibration_order(other, KEY, "full", cores=2, tolerance=ToleranceSettings(), variants=["bf16"])


def test_a_source_that_cannot_be_loaded_fails_with_the_engines_words_and_leaves_no_draft(tmp_path: Path) -> None:
    store, source = stored_source(tmp_path)
    with pytest.raises(EngineFailed, match="cannot be loaded"):
        calibrate_model(order(source), store, CalibrationStore(tmp_path), lambda _: None)
    assert [path.name for path in source.path.parent.iterdir()] == ["q4_1.gguf"]
    assert CalibrationStore(tmp_path).read(EMBEDDED.name, "q4_1", KEY) == (None, None)


def test_two_calibrations_of_one_model_do_not_measure_each_other(tmp_path: Path) -> None:
    store, source = stored_source(tmp_path)
    folder = tmp_path / "calibration"
    folder.mkdir()
    with (folder / f".{EMBEDDED.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ApplianceError, match="being calibrated by another process"):
            calibrate_model(order(source), store, CalibrationStore(tmp_path), lambda _: None)


def test_a_derived_variant_says_what_it_was_made_from_and_can_be_removed(tmp_path: Path) -> None:
    store, _ = stored_source(tmp_path)
    path = put_derived(store, "bf16")
    stored = store.find(EMBEDDED.name, "bf16")
    assert stored is not None
    assert (stored.unchanged, stored.derived_from, stored.source) == (True, KEY.file, "derived from q4_1")
    assert store.verify(EMBEDDED.name, "bf16", lambda _: None).derived_from == KEY.file
    assert sorted(one.variant for one in store.list_stored()) == ["bf16", "q4_1"]
    assert store.remove(EMBEDDED.name, "bf16") > path.with_name("q4_1.gguf").stat().st_size
    assert [one.variant for one in store.list_stored()] == ["q4_1"]


def test_a_draft_that_is_not_whole_is_not_taken_over(tmp_path: Path) -> None:
    store, _ = stored_source(tmp_path)
    draft = store.locate_draft(EMBEDDED.name, "bf16")
    draft.parent.mkdir(parents=True)
    draft.write_bytes(gguf_bytes()[:-100])
    with pytest.raises(ModelFileError, match="truncated"):
        store.adopt_draft(EMBEDDED.name, "bf16", source="q4_1", derived_from=KEY.file)
    assert store.find(EMBEDDED.name, "bf16") is None


# ---- from figures to what is served ----

FOUND = calibration(measurement(variant("q4_1", None), variant("bf16", GOOD), variant("q8_0", GOOD)))


def served(
    store: ModelStore, source: ModelCandidate, engine: EngineSettings, found: Calibration = FOUND
) -> list[tuple[str, int | None]]:
    return [(one.variant.name, one.threads) for one in select_measured_variants(source, found, engine, store)]


def test_the_measured_choice_comes_first_and_the_source_after_it(tmp_path: Path) -> None:
    store, source = stored_source(tmp_path)
    path = put_derived(store, "bf16")
    best, fallback = select_measured_variants(source, FOUND, EngineSettings(), store)
    assert (best.variant.name, best.path, best.threads) == ("bf16", path, 2)
    assert "3.7 times" not in best.reason and "1,995 prompt tokens/s" in best.reason
    assert (fallback.variant.name, fallback.threads) == ("q4_1", 2)
    (placement,) = plan_placements(probe_hardware(), [best, fallback], EngineSettings(context_tokens=2048)).placements
    assert (placement.variant, placement.path, placement.shape.threads) == ("bf16", path, 2)
    assert any("measured to be quickest" in reason for reason in placement.reasons)


def test_a_derived_file_of_another_source_or_a_changed_one_is_not_served(tmp_path: Path) -> None:
    store, source = stored_source(tmp_path)
    put_derived(store, "bf16", derived_from="sha256:another")
    changed = put_derived(store, "q8_0")
    changed.write_bytes(changed.read_bytes() + b"x")
    assert served(store, source, EngineSettings()) == [("q4_1", 2)]


def test_what_the_operator_fixed_stays(tmp_path: Path) -> None:
    store, source = stored_source(tmp_path)
    put_derived(store, "bf16")
    assert served(store, source, EngineSettings(threads=7)) == [("bf16", 7), ("q4_1", 7)]
    assert served(store, source, EngineSettings(variant="q4_1")) == [("q4_1", 2)]


def test_a_derived_variant_can_be_named_like_any_other(tmp_path: Path) -> None:
    store, _ = stored_source(tmp_path)
    path = put_derived(store, "bf16")
    found = select_candidate(EngineSettings(variant="bf16"), load_catalog(), store)
    assert (found.variant.name, found.path, found.variant.size_bytes) == ("bf16", path, path.stat().st_size)
    with pytest.raises(UnknownModel, match="appliance calibrate smollm2-135m-instruct --variants q8_0"):
        select_candidate(EngineSettings(variant="q8_0"), load_catalog(), store)


# ---- the real program ----


@pytest.mark.slow
def test_the_real_model_is_measured_its_variant_kept_and_the_figures_remembered(
    tmp_path: Path, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = CalibrationEffort(variants=("bf16",), sequences=(2,), figure_seconds=0.02, texts=8, seconds=90.0)
    monkeypatch.setattr(module, "SHORT", tiny)
    store = ModelStore(tmp_path)
    path = store.locate(EMBEDDED.name, "q4_1")
    path.parent.mkdir(parents=True)
    shutil.copyfile(smollm2_path, path)
    source = ModelCandidate(EMBEDDED, EMBEDDED.variants[0], path)
    key, calibrations = build_calibration_key(source, probe_hardware(), store), CalibrationStore(tmp_path)
    steps: list[CalibrationStep] = []
    found = calibrate_model(order(source, key), store, calibrations, steps.append)
    assert calibrations.read(EMBEDDED.name, "q4_1", key) == (found, None)
    assert [one.name for one in found.measurement.variants] == ["q4_1", "bf16"]
    for one in found.measurement.variants:
        assert {(figure.kind, figure.sequences) for figure in one.figures} == {("prefill", 1), ("decode", 2)}
        assert all(figure.tokens_per_second > 0 and figure.undisturbed > 0 for figure in one.figures)
    quality = found.measurement.variants[1].quality
    assert quality is not None
    assert quality.questions == 16
    assert quality.label_agreement >= 0.9
    assert 0 <= quality.median_kl < 0.05
    assert steps[0].done == 0
    assert all(step.done < step.total for step in steps)
    derived = store.find(EMBEDDED.name, "bf16")
    assert derived is not None
    assert derived.unchanged and derived.derived_from == key.file
    assert derived.size_bytes > 2 * path.stat().st_size
    assert not store.locate_draft(EMBEDDED.name, "bf16").parent.exists()
