"""Has a model measured: runs the calibration program in the engine's own environment and keeps what it derived."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Final

from appliance.config import ToleranceSettings
from appliance.engines.llamacpp import ENVIRONMENT, LlamaCpp
from appliance.errors import ApplianceError, EngineFailed, OperatorError, UnknownModel
from appliance.node.calibrate.calibration import (
    WORKLOAD_MIXES,
    Calibration,
    CalibrationKey,
    Extent,
    Measurement,
    choose_variant,
    merge_calibrations,
)
from appliance.node.calibrate.calibration_store import (
    CalibrationStore,
    identify_file,
    read_llama_cpp_identity,
    read_measurement,
)
from appliance.node.hardware.probe import Hardware
from appliance.node.models.model_store import ModelStore
from appliance.node.plan.models import ModelCandidate
from appliance.node.supervise.launcher import build_engine_environment

_OVERTIME_SECONDS: Final = 30.0
"""Nothing new is begun when the time is over; what was begun may take this long, then the program is ended."""


@dataclass(frozen=True, slots=True)
class CalibrationEffort:
    """How much is measured."""

    variants: tuple[str, ...]
    """Derived where the source is not one of them, in this order."""
    sequences: tuple[int, ...]
    figure_seconds: float
    texts: int
    seconds: float


SHORT: Final = CalibrationEffort(
    variants=("bf16", "q8_0"), sequences=(8, 1, 32), figure_seconds=0.2, texts=16, seconds=28.0
)
"""For a first start: the two forms that keep the most of a source's quality. On two idle cores it takes two thirds of
the time for a model of 135 million parameters; where others use the cores too it leaves out what decides least."""
FULL: Final = CalibrationEffort(
    variants=("bf16", "q8_0", "q4_0"), sequences=(8, 1, 4, 16, 32), figure_seconds=1.0, texts=1000, seconds=1800.0
)


@dataclass(frozen=True, slots=True)
class CalibrationOrder:
    """What is to be measured of `source`, and how thoroughly."""

    source: ModelCandidate
    key: CalibrationKey
    extent: Extent
    variants: tuple[str, ...]
    threads: tuple[int, ...]
    tolerance: ToleranceSettings
    keep_all: bool = False
    """Whether derived files are kept that no workload would choose: the operator asked for them by name."""


@dataclass(frozen=True, slots=True)
class CalibrationStep:
    """A piece of work that begins."""

    done: int
    total: int
    what: str


def build_calibration_key(source: ModelCandidate, hardware: Hardware, store: ModelStore) -> CalibrationKey:
    """What figures of `source` on this machine rest on. Its file must be there."""
    stored = store.find(source.model.name, source.variant.name)
    proven = stored.sha256 if stored is not None and stored.unchanged and stored.path == source.path else None
    return CalibrationKey(hardware.fingerprint, identify_file(source.path, proven), read_llama_cpp_identity())


def build_calibration_order(
    source: ModelCandidate,
    key: CalibrationKey,
    extent: Extent,
    *,
    cores: int,
    tolerance: ToleranceSettings,
    variants: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
) -> CalibrationOrder:
    """An order with what was not named filled in.

    A name that the catalogue has for a published file is never derived; UnknownModel if it was asked for.
    """
    published = {variant.name for variant in source.model.variants} | {source.variant.name}
    for name in variants or ():
        if name in published - {source.variant.name}:
            raise UnknownModel(
                f"{name} of {source.model.name} is published, so it is not derived: "
                f"appliance models pull {source.model.name} --variant {name}"
            )
    names = _effort(extent).variants if variants is None else variants
    return CalibrationOrder(
        source=source,
        key=key,
        extent=extent,
        variants=tuple(name for name in dict.fromkeys(names) if name not in published),
        threads=tuple(threads) if threads else _thread_counts(cores, extent),
        tolerance=tolerance,
        keep_all=variants is not None,
    )


def _thread_counts(cores: int, extent: Extent) -> tuple[int, ...]:
    """All cores, and one fewer, which leaves the router room; in full also the powers of two below."""
    counts = {cores, max(1, cores - 1)}
    if extent == "full":
        counts |= {power for exponent in range(cores.bit_length()) if (power := 1 << exponent) <= cores}
    return tuple(sorted(counts, reverse=True))


def _effort(extent: Extent) -> CalibrationEffort:
    return FULL if extent == "full" else SHORT


def calibrate_model(
    order: CalibrationOrder,
    models: ModelStore,
    calibrations: CalibrationStore,
    report: Callable[[CalibrationStep], None],
) -> Calibration:
    """Measure, keep the derived files that are of use, and remember the figures.

    Raises ApplianceError: another process is at it, the source cannot be measured, or it takes far too long.
    """
    model = order.source.model.name
    with _alone(calibrations.folder, model):
        known, _ = calibrations.read(model, order.source.variant.name, order.key)
        files = {name: _file_of(order, name, models) for name in order.variants}
        try:
            measurement = _run(order, files, report)
            _check_enough(order, measurement)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            calibration = merge_calibrations(known, Calibration(order.key, order.extent, now, measurement))
            _keep(order, measurement, files, models)
        finally:
            for name in files:
                models.discard_draft(model, name)
        calibrations.write(model, calibration)
    return calibration


def _check_enough(order: CalibrationOrder, measurement: Measurement) -> None:
    """A short form that had no time for any variant says nothing that is worth remembering."""
    if order.extent == "short" and order.variants and len(measurement.variants) == 1:
        why = "; ".join(f"{left.what}: {left.reason}" for left in measurement.left_out)
        raise ApplianceError(f"no variant beside {measurement.source} could be measured ({why})")


def _file_of(order: CalibrationOrder, variant: str, models: ModelStore) -> Path:
    """The variant's file where it was made from this source; else where it is to be made."""
    stored = models.find(order.source.model.name, variant)
    if stored is not None and stored.unchanged and stored.derived_from == order.key.file:
        return stored.path
    models.discard_draft(order.source.model.name, variant)
    return models.locate_draft(order.source.model.name, variant)


def _keep(order: CalibrationOrder, measurement: Measurement, files: dict[str, Path], models: ModelStore) -> None:
    """Take over what was derived and some workload would choose; the rest would only fill the disk."""
    model, source = order.source.model.name, order.source.variant.name
    choices = [choose_variant(measurement, workload, order.tolerance) for workload in WORKLOAD_MIXES]
    useful = {choice.variant for choice in choices if choice is not None}
    for variant in measurement.variants:
        draft = models.locate_draft(model, variant.name)
        is_new = files.get(variant.name) == draft and draft.exists()
        if is_new and (order.keep_all or variant.name in useful):
            models.adopt_draft(model, variant.name, source=source, derived_from=order.key.file)


def _run(order: CalibrationOrder, files: dict[str, Path], report: Callable[[CalibrationStep], None]) -> Measurement:
    """The program's result. Its process is gone when this returns or raises."""
    effort = _effort(order.extent)
    guard_read, guard_write = os.pipe()
    argv = [sys.executable, "-m", "appliance.llamacpp.calibrate.program", *_options(order, files, effort)]
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                [*argv, "--parent-guard-fd", str(guard_read)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=build_engine_environment(os.environ, ENVIRONMENT),
                pass_fds=(guard_read,),
                start_new_session=True,
            )
        except OSError as error:
            os.close(guard_write)
            raise EngineFailed(f"the calibration cannot be started: {error}") from error
        finally:
            os.close(guard_read)
        overtime = threading.Timer(effort.seconds + _OVERTIME_SECONDS, _kill, (process,))
        overtime.start()
        try:
            result = _listen(process, report)
            code = process.wait()
        finally:
            overtime.cancel()
            _kill(process)
            process.wait()
            os.close(guard_write)
        if result is None:
            raise EngineFailed(f"the calibration {_last_words(code, errors, effort)}")
    return read_measurement(result)


def _options(order: CalibrationOrder, files: dict[str, Path], effort: CalibrationEffort) -> list[str]:
    words = ["--source", f"{order.source.variant.name}={order.source.path}"]
    for name, path in files.items():
        words += ["--variant", f"{name}={path}"]
    words += ["--threads", ",".join(map(str, order.threads)), "--sequences", ",".join(map(str, effort.sequences))]
    words += ["--figure-seconds", str(effort.figure_seconds), "--texts", str(effort.texts)]
    return [*words, "--seconds", str(effort.seconds)]


def _listen(process: "subprocess.Popen[bytes]", report: Callable[[CalibrationStep], None]) -> object:
    """The result among the program's lines; None if it ended without one."""
    assert process.stdout is not None
    result = None
    with process.stdout as lines:
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                continue
            if message.get("event") == "progress":
                report(CalibrationStep(int(message["done"]), int(message["total"]), str(message["what"])))
            elif message.get("event") == "result":
                result = message.get("result")
    return result


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the program and whatever it started; its group has its number while it has not been waited for."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _last_words(code: int, errors: IO[bytes], effort: CalibrationEffort) -> str:
    errors.seek(0)
    said = LlamaCpp().find_crash_reason(errors.read().decode("utf-8", "replace").splitlines())
    if code == -signal.SIGKILL and not said:
        return f"was ended after more than {effort.seconds + _OVERTIME_SECONDS:g} s, or for want of memory"
    return f"ended with {code}: {said or 'it gave no reason'}"


@contextmanager
def _alone(folder: Path, model: str) -> Iterator[None]:
    """Two at once would measure each other. The system gives the lock back when its holder dies."""
    path = folder / f".{model}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise OperatorError(f"cannot write in {folder}: {error.strerror}; choose another --data-dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ApplianceError(f"{model} is being calibrated by another process; wait for it") from error
        yield
