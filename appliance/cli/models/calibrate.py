"""appliance calibrate: how fast a model is here, in which variant, with how many threads, and what that costs."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from appliance.cli.models.models import pull_with_progress
from appliance.cli.options import ConfigOption, DataDirOption, JsonOption, load_node_catalog, resolve_data_dir
from appliance.cli.output import exit_on_error, fail, format_bytes, say, say_json, stderr, stdout
from appliance.config import EngineSettings, NodeConfig, ToleranceSettings, Workload, load_config
from appliance.errors import ApplianceError
from appliance.node.calibrate.calibration import (
    Calibration,
    MeasuredRate,
    VariantChoice,
    VariantFigures,
    choose_variant,
)
from appliance.node.calibrate.calibration_store import CalibrationStore
from appliance.node.calibrate.calibrator import (
    SHORT,
    CalibrationOrder,
    CalibrationStep,
    build_calibration_key,
    build_calibration_order,
    calibrate_model,
)
from appliance.node.hardware.probe import Hardware, probe_hardware
from appliance.node.models.candidates import select_candidate, select_measured_variants
from appliance.node.models.model_store import ModelStore
from appliance.node.plan.models import ModelCandidate

_PLAIN_EVERY_SECONDS = 5.0


def calibrate_command(
    name: Annotated[str, typer.Argument(help="A name from `appliance models list`, or the path of a GGUF file.")],
    variants: Annotated[
        str | None, typer.Option(help="Forms to derive and measure, for example bf16,q8_0; empty: bf16,q8_0,q4_0.")
    ] = None,
    threads: Annotated[
        str | None, typer.Option(help="Thread counts, for example 1,2; empty: powers of two up to the usable cores.")
    ] = None,
    workload: Annotated[
        str | None, typer.Option(help="What to choose for: balanced, prefill or decode; empty: as configured.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Measure again even where figures still hold.")] = False,
    config_path: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a model on this machine: speed by variant, threads and sequences, and what each variant costs in quality.

    Variants are derived from the file that is here and compared with it. The figures are remembered, and the node
    serves what they say. Programs that compute meanwhile disturb them; figures they touched are marked with a star.
    """
    config = exit_on_error(lambda: load_config(config_path))
    engine = config.engine.model_copy(update={"model": name, "variant": None, "workload": _workload(workload, config)})
    home, hardware = resolve_data_dir(data_dir, config), probe_hardware()
    store, calibrations = ModelStore(home), CalibrationStore(home)
    source = exit_on_error(lambda: select_candidate(engine, load_node_catalog(home), store))
    if not source.path.exists():
        pull_with_progress(store, source.model, source.variant)
    key = build_calibration_key(source, hardware, store)
    known, stale = calibrations.read(source.model.name, source.variant.name, key)
    if stale is not None:
        stderr.print(f"older figures of {source.model.name} do not hold: they were {stale}")
    if known is None or known.extent != "full" or force or variants or threads:
        order = exit_on_error(
            lambda: build_calibration_order(
                source,
                key,
                "full",
                cores=hardware.cpu.usable_cores,
                tolerance=engine.tolerance,
                variants=_words(variants),
                threads=_numbers(threads),
            )
        )
        known = exit_on_error(lambda: _with_progress(order, store, calibrations))
    else:
        stderr.print(f"measured on {known.measured_at} and still valid; --force measures again")
    choice = choose_variant(known.measurement, engine.workload, engine.tolerance)
    if as_json:
        say_json(_json(known, engine.tolerance))
    else:
        _print(source, known, choice, engine)


def first_start(
    source: ModelCandidate, engine: EngineSettings, home: Path, hardware: Hardware, store: ModelStore
) -> tuple[tuple[ModelCandidate, ...], Calibration | None]:
    """What to plan for, best first: by remembered figures, else by a short measurement, else the source as it is; and
    the figures.

    Whatever goes wrong here is said and never keeps a node from serving.
    """
    if engine.variant is not None and engine.threads is not None:
        return (source,), None
    try:
        calibration = _remembered_or_short(source, engine, home, hardware, store)
        return (source,) if calibration is None else select_measured_variants(
            source, calibration, engine, store
        ), calibration
    except (ApplianceError, OSError) as error:
        text = f"calibration failed: {error}; {source.variant.name} is served as it is"
        stderr.print(text, style="yellow", soft_wrap=True)
        return (source,), None


def _remembered_or_short(
    source: ModelCandidate, engine: EngineSettings, home: Path, hardware: Hardware, store: ModelStore
) -> Calibration | None:
    calibrations = CalibrationStore(home)
    key = build_calibration_key(source, hardware, store)
    known, stale = calibrations.read(source.model.name, source.variant.name, key)
    if known is not None or not engine.calibrate:
        return known
    why = f"older figures were {stale}" if stale else "once for this model and machine"
    stderr.print(
        f"measuring which variant of {source.model.name} and how many threads are quickest here, {why}: "
        f"at most about {SHORT.seconds:.0f} s; --no-calibrate skips it",
        soft_wrap=True,
    )
    variants = () if engine.variant is not None else None
    threads = None if engine.threads is None else (engine.threads,)
    cores = hardware.cpu.usable_cores
    order = build_calibration_order(
        source, key, "short", cores=cores, tolerance=engine.tolerance, variants=variants, threads=threads
    )
    return _with_progress(order, store, calibrations)


def _with_progress(order: CalibrationOrder, store: ModelStore, calibrations: CalibrationStore) -> Calibration:
    with _reporter() as report:
        return calibrate_model(order, store, calibrations, report)


@contextmanager
def _reporter() -> Iterator[Callable[[CalibrationStep], None]]:
    """A bar on a terminal, a line now and then elsewhere."""
    if not stderr.is_terminal:
        yield _plain_reporter()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True) as progress:
        task = progress.add_task("loading", total=None)
        yield lambda step: progress.update(task, description=step.what, completed=step.done, total=step.total)


def _plain_reporter() -> Callable[[CalibrationStep], None]:
    said_at = 0.0

    def report(step: CalibrationStep) -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= _PLAIN_EVERY_SECONDS:
            said_at = time.monotonic()
            stderr.print(f"{step.done + 1}/{step.total} {step.what}")

    return report


def _print(
    source: ModelCandidate, calibration: Calibration, choice: VariantChoice | None, engine: EngineSettings
) -> None:
    measurement = calibration.measurement
    counts = sorted(
        {one.sequences for variant in measurement.variants for one in variant.figures if one.kind == "decode"}
    )
    decode = [f"decode x{count}" for count in counts]
    table = Table("variant", "size", "threads", "prefill", *decode, "agreement", "median KL", box=None, pad_edge=False)
    for variant in measurement.variants:
        for row in _rows(variant, counts):
            table.add_row(*row)
    stdout.print(table)
    say("Tokens a second, over all sequences together.")
    if any(figure.disturbed for variant in measurement.variants for figure in variant.figures):
        say("* Other programs held the cores: reckoned from the CPU time used, and the clock shows less.")
    if measurement.kernels:
        say(f"Kernels: {measurement.kernels}")
    for left in measurement.left_out:
        say(f"Left out: {left.what}: {left.reason}")
    for variant in measurement.variants:
        if variant.derived_seconds is not None:
            say(f"{variant.name} was derived from {measurement.source} in {variant.derived_seconds:.1f} s.")
    if choice is None:
        say(f"Nothing can be chosen: {measurement.source} itself has no figures.")
        return
    say(f"\nFor {engine.workload} work {source.model.name} is served as {choice.variant}, {choice.threads} threads:")
    say(choice.reason)


def _rows(variant: VariantFigures, counts: list[int]) -> Iterator[list[str]]:
    figures = {(one.kind, one.threads, one.sequences): one for one in variant.figures}
    quality = variant.quality
    agreement = ["", ""] if quality is None else [f"{quality.label_agreement:.1%}", f"{quality.median_kl:.4f}"]
    for threads in sorted({one.threads for one in variant.figures}):
        prefill = figures.get(("prefill", threads, 1))
        cells = [prefill, *(figures.get(("decode", threads, count)) for count in counts)]
        yield [variant.name, format_bytes(variant.size_bytes), str(threads), *map(_cell, cells), *agreement]


def _cell(figure: MeasuredRate | None) -> str:
    if figure is None:
        return ""
    return f"{figure.undisturbed:,.0f}*" if figure.disturbed else f"{figure.tokens_per_second:,.0f}"


def _json(calibration: Calibration, tolerance: ToleranceSettings) -> dict[str, Any]:
    """Everything that was measured, and what it means for each workload."""
    choices = {one: choose_variant(calibration.measurement, one, tolerance) for one in get_args(Workload)}
    return {
        **asdict(calibration),
        "tolerance": tolerance.model_dump(),
        "choices": {one: None if choice is None else asdict(choice) for one, choice in choices.items()},
    }


def _workload(text: str | None, config: NodeConfig) -> Workload:
    if text is None:
        return config.engine.workload
    known: tuple[Workload, ...] = get_args(Workload)
    for one in known:
        if one == text:
            return one
    fail(f"--workload {text!r} is not known: use {', '.join(known)}")


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(filter(None, (word.strip().lower() for word in text.split(","))))


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not all(word.strip().isdigit() and int(word) > 0 for word in text.split(",")):
        fail(f"--threads {text!r} is not a list of numbers like 1,2")
    return tuple(int(word) for word in text.split(","))
