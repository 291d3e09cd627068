"""appliance calibrate, and what a first start does with it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from appliance.cli import app
from appliance.cli.models import calibrate as module
from appliance.config import EngineSettings
from appliance.errors import EngineFailed
from appliance.node.calibrate.calibration import Calibration
from appliance.node.calibrate.calibration_store import CalibrationStore
from appliance.node.calibrate.calibrator import CalibrationOrder, CalibrationStep, build_calibration_key
from appliance.node.hardware.probe import probe_hardware
from appliance.node.models.model_store import ModelStore
from appliance.node.plan.models import ModelCandidate
from tests.node.calibrate.test_calibration import GOOD, calibration, measurement, variant
from tests.node.calibrate.test_calibrator import EMBEDDED, put_derived, stored_source

HARDWARE = probe_hardware()


def figures_for(source: ModelCandidate, store: ModelStore) -> Calibration:
    found = measurement(variant("q4_1", None), variant("bf16", GOOD))
    return calibration(found, build_calibration_key(source, HARDWARE, store))


def start(
    source: ModelCandidate, store: ModelStore, home: Path, engine: EngineSettings | None = None
) -> list[tuple[str, int | None]]:
    candidates, _ = module.first_start(source, engine or EngineSettings(), home, HARDWARE, store)
    return [(one.variant.name, one.threads) for one in candidates]


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> list[CalibrationOrder]:
    """Calibrations that were begun; each one brings the figures of `figures_for`."""
    begun: list[CalibrationOrder] = []

    def measure(
        order: CalibrationOrder,
        models: ModelStore,
        calibrations: CalibrationStore,
        report: Callable[[CalibrationStep], None],
    ) -> Calibration:
        begun.append(order)
        report(CalibrationStep(0, 1, "bf16: deriving it"))
        found = figures_for(order.source, models)
        if order.variants:
            put_derived(models, "bf16", derived_from=order.key.file)
        calibrations.write(EMBEDDED.name, found)
        return found

    monkeypatch.setattr(module, "calibrate_model", measure)
    return begun


def test_a_first_start_measures_and_a_second_one_remembers(
    tmp_path: Path, orders: list[CalibrationOrder], capsys: pytest.CaptureFixture[str]
) -> None:
    store, source = stored_source(tmp_path)
    assert start(source, store, tmp_path) == [("bf16", 2), ("q4_1", 2)]
    assert [order.extent for order in orders] == ["short"]
    said = capsys.readouterr().err
    assert "once for this model and machine" in said and "--no-calibrate" in said
    assert start(source, store, tmp_path) == [("bf16", 2), ("q4_1", 2)]
    assert len(orders) == 1
    assert capsys.readouterr().err == ""


def test_another_file_under_the_same_name_is_measured_again_and_that_is_said(
    tmp_path: Path, orders: list[CalibrationOrder], capsys: pytest.CaptureFixture[str]
) -> None:
    store, source = stored_source(tmp_path)
    start(source, store, tmp_path)
    source.path.write_bytes(source.path.read_bytes() + b"more")
    start(source, store, tmp_path)
    assert len(orders) == 2
    assert "measured with another model file" in capsys.readouterr().err


def test_without_calibration_the_source_is_served_as_it_is(tmp_path: Path, orders: list[CalibrationOrder]) -> None:
    store, source = stored_source(tmp_path)
    assert start(source, store, tmp_path, EngineSettings(calibrate=False)) == [("q4_1", None)]
    assert orders == []
    CalibrationStore(tmp_path).write(EMBEDDED.name, figures_for(source, store))
    put_derived(store, "bf16", derived_from=build_calibration_key(source, HARDWARE, store).file)
    assert start(source, store, tmp_path, EngineSettings(calibrate=False)) == [("bf16", 2), ("q4_1", 2)]


def test_what_is_configured_is_not_measured(tmp_path: Path, orders: list[CalibrationOrder]) -> None:
    store, source = stored_source(tmp_path)
    assert start(source, store, tmp_path, EngineSettings(variant="q4_1", threads=1)) == [("q4_1", None)]
    assert orders == []
    start(source, store, tmp_path, EngineSettings(variant="q4_1"))
    assert orders[-1].variants == ()
    start(source, store, tmp_path, EngineSettings(threads=1, tolerance=orders[-1].tolerance))
    assert len(orders) == 1


@pytest.mark.parametrize("error", [EngineFailed("llama.cpp ended with -11"), OSError(28, "No space left on device")])
def test_a_calibration_that_fails_is_said_and_the_source_is_served(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> Calibration:
        raise error

    monkeypatch.setattr(module, "calibrate_model", fail)
    store, source = stored_source(tmp_path)
    assert start(source, store, tmp_path) == [("q4_1", None)]
    said = capsys.readouterr().err
    assert str(error) in said and "q4_1 is served as it is" in said


def invoke(home: Path, *arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["calibrate", EMBEDDED.name, "--data-dir", str(home), *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_prints_figures_for_every_workload_as_json(tmp_path: Path, orders: list[CalibrationOrder]) -> None:
    stored_source(tmp_path)
    code, out, _ = invoke(tmp_path, "--json", "--variants", "BF16, q4_0", "--threads", "2,1")
    assert code == 0
    (order,) = orders
    assert (order.extent, order.variants, order.threads, order.keep_all) == ("full", ("bf16", "q4_0"), (2, 1), True)
    told = json.loads(out)
    assert set(told["choices"]) == {"balanced", "prefill", "decode"}
    assert told["choices"]["prefill"]["variant"] == "bf16"
    assert told["measurement"]["variants"][1]["quality"]["label_agreement"] == 1.0


def test_the_command_prints_a_table_and_why(tmp_path: Path, orders: list[CalibrationOrder]) -> None:
    stored_source(tmp_path)
    code, out, _ = invoke(tmp_path, "--workload", "decode")
    assert code == 0
    assert "decode x32" in out and "1,995" in out
    assert "For decode work smollm2-135m-instruct is served as bf16, 2 threads:" in out
    # What was remembered is a short form, so the full one is measured as long as nothing fuller is there.
    invoke(tmp_path)
    assert len(orders) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--workload", "fast"), "use balanced, prefill, decode"),
        (("--threads", "two"), "not a list of numbers"),
        (("--threads", "0"), "not a list of numbers"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    arguments: tuple[str, ...], words: str, tmp_path: Path, orders: list[CalibrationOrder]
) -> None:
    stored_source(tmp_path)
    code, _, error = invoke(tmp_path, *arguments)
    assert code == 1
    assert words in error
    assert orders == []
