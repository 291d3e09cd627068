"""Measures a model on this machine, a program of its own: how fast each variant is, and what it costs in quality.

    python -m appliance.llamacpp.calibrate.program --source q4_1=FILE [--variant bf16=FILE ...] --threads 2,1

A variant whose file is not there is derived from the source first. Every line on stdout is a JSON object: `progress`
{done, total, what} before each piece of work, and at the end one `result` {result}. Exit codes: 0 measured, 2 bad
arguments, 3 the source is missing or corrupt, 4 the source cannot be measured. A variant that fails is left out and
`left_out` says why. It must run in the environment the engine runs in: waiting threads that spin measure otherwise.
"""

import argparse
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import llama_cpp
import llama_cpp.llama_cpp as lib
import orjson
import psutil

from appliance.core.json_types import MutableJsonObject
from appliance.errors import ApplianceError, ConfigError, ModelFileError
from appliance.llamacpp.calibrate.interference import read_load_average, read_stolen_seconds
from appliance.llamacpp.calibrate.quantise import FORMS, derive_variant, estimate_bytes
from appliance.llamacpp.calibrate.speed import (
    CONTEXT_TOKENS,
    MOST_SEQUENCES,
    SEQUENCES,
    SpeedSample,
    measure_decode,
    measure_prefill,
)
from appliance.llamacpp.calibrate.variant_quality import (
    ModelReadings,
    QualityComparison,
    compare_variant,
    load_quality_texts,
    read_source_model,
)
from appliance.llamacpp.kernels import PLAIN_KERNELS, install_kernels
from appliance.llamacpp.model import LlamaModel
from appliance.worker import EXIT_ARGUMENTS, EXIT_CLEAN, EXIT_ENGINE, EXIT_MODEL_FILE
from appliance.worker.json_log import log
from appliance.worker.parent_guard import tie_to_parent

_SOURCE_SHARE: Final = 0.25
"""Share of the time that reading the texts with the source may take; every variant then reads as many."""
_REST_SHARE: Final = 0.35
"""What does not decide between variants is measured only while more than this share of the time is left."""
_DERIVED_BYTES_PER_SECOND: Final = 150_000_000
"""What deriving reached on two cores that others used as well; it decides whether there is time left for it."""


Speed = tuple[int, int | None]
"""Threads, and sequences that generate at once; None: prefill."""


@dataclass(frozen=True, slots=True)
class CalibrationJob:
    """What is to be measured. `variants`: name and file, the source first."""

    variants: tuple[tuple[str, Path], ...]
    threads: tuple[int, ...]
    """The first is the most; quality is read with it."""
    sequences: tuple[int, ...]
    """The first decides between variants."""
    figure_seconds: float
    most_texts: int
    seconds: float
    """When this long has passed, nothing new is begun."""
    plain_kernels: bool = False
    """Whether llama.cpp's own kernels compute alone."""

    @property
    def speeds(self) -> list[Speed]:
        """What is measured of every variant; the first two decide between variants."""
        return [(threads, sequences) for threads in self.threads for sequences in (None, *self.sequences)]


@dataclass(frozen=True, slots=True)
class UnmeasuredVariant:
    what: str
    reason: str


@dataclass(slots=True)
class MeasuredVariant:
    """One variant as far as it got."""

    name: str
    path: Path
    size_bytes: int = 0
    held_bytes: int = 0
    """Memory for weights, the KV cells of a small context, and buffers."""
    derived_seconds: float | None = None
    """None: the file was there."""
    quality: QualityComparison | None = None
    """None for the source, and where it was not measured."""
    figures: list[SpeedSample] = field(default_factory=list)

    def to_json(self) -> MutableJsonObject:
        table = dataclasses.asdict(self)
        del table["path"]
        return table


class CalibrationProgress:
    """Counts the pieces of work and reports each; knows when there is no time for another one."""

    def __init__(self, total: int, seconds: float) -> None:
        self._done, self._total = 0, total
        self._ends = time.monotonic() + seconds
        self.left_out: list[UnmeasuredVariant] = []

    @property
    def seconds_left(self) -> float:
        return self._ends - time.monotonic()

    def begin(self, what: str, needed_seconds: float = 0.0) -> bool:
        """Report the next piece of work; False where it must be left out for want of time."""
        self._done += 1
        if self.seconds_left < needed_seconds:
            self.left_out.append(UnmeasuredVariant(what, "no time was left for it"))
            return False
        _tell({"event": "progress", "done": self._done - 1, "total": self._total, "what": what})
        return True


def main(argv: Sequence[str] | None = None) -> int:
    try:
        job, parent_guard_fd = _arguments(argv)
        if parent_guard_fd is not None:
            tie_to_parent(parent_guard_fd)
        _tell({"event": "result", "result": calibrate(job)})
    except ConfigError as error:
        log("bad_arguments", reason=str(error))
        return EXIT_ARGUMENTS
    except ModelFileError as error:
        log("model_file_error", reason=error.message)
        return EXIT_MODEL_FILE
    except Exception as error:  # reported once, in one line
        log("calibration_failed", reason=f"{type(error).__name__}: {error}")
        return EXIT_ENGINE
    return EXIT_CLEAN


def calibrate(job: CalibrationJob) -> MutableJsonObject:
    """Measure all variants, the source first. Raises what the source's own measurement raises.

    What decides between variants comes first for all of them; other thread counts and numbers of sequences follow.
    """
    kernels = PLAIN_KERNELS if job.plain_kernels else install_kernels()
    began, load, stolen = time.monotonic(), read_load_average(), read_stolen_seconds()
    first, rest = job.speeds[:2], job.speeds[2:]
    progress = CalibrationProgress(len(job.variants) * (len(job.speeds) + 2) - 1, job.seconds)
    (source_name, source_path), *others = job.variants
    source = MeasuredVariant(source_name, source_path)
    found = [source]
    with _loaded(source, job) as model:
        parameters = model.n_params
        progress.begin(f"{source_name}: reading the texts that variants are compared on")
        reading = read_source_model(model, job.most_texts, job.seconds * _SOURCE_SHARE) if others else None
        _measure_speed(source, model, first, job, progress, 0.0)
    for name, path in others:
        variant = MeasuredVariant(name, path)
        try:
            if reading is not None and _derived(variant, source_path, parameters, job, progress):
                _measure_variant(variant, reading, first, job, progress)
                found.append(variant)
        except ApplianceError as error:
            progress.left_out.append(UnmeasuredVariant(name, error.message))
    for variant in found:
        _measure_rest(variant, rest, job, progress)
    return {
        "source": source_name,
        "parameters": parameters,
        "variants": [variant.to_json() for variant in found],
        "left_out": [dataclasses.asdict(one) for one in progress.left_out],
        "llama_cpp": llama_cpp.__version__,
        "kernels": kernels.summary,
        "system": lib.llama_print_system_info().decode("utf-8", "replace").strip(),
        "load_average": load,
        "stolen_seconds": _grown(stolen, read_stolen_seconds()),
        "seconds": round(time.monotonic() - began, 2),
    }


def _derived(
    variant: MeasuredVariant, source: Path, parameters: int, job: CalibrationJob, progress: CalibrationProgress
) -> bool:
    """Have the variant's file there; False where there is no time to make it."""
    is_there = variant.path.exists()
    expected = 0.0 if is_there else estimate_bytes(parameters, variant.name) / _DERIVED_BYTES_PER_SECOND
    if not progress.begin(f"{variant.name}: deriving it", expected):
        return False
    if not is_there:
        began = time.monotonic()
        derive_variant(source, variant.path, variant.name, parameters=parameters, threads=max(job.threads))
        variant.derived_seconds = round(time.monotonic() - began, 2)
    return True


def _measure_variant(
    variant: MeasuredVariant,
    reading: ModelReadings,
    speeds: Sequence[Speed],
    job: CalibrationJob,
    progress: CalibrationProgress,
) -> None:
    with _loaded(variant, job) as model:
        if progress.begin(f"{variant.name}: comparing its answers with the source's"):
            variant.quality = compare_variant(model, reading)
        _measure_speed(variant, model, speeds, job, progress, 0.0)


def _measure_rest(
    variant: MeasuredVariant, speeds: Sequence[Speed], job: CalibrationJob, progress: CalibrationProgress
) -> None:
    if not speeds:
        return
    if progress.seconds_left <= job.seconds * _REST_SHARE:
        progress.left_out.append(
            UnmeasuredVariant(f"{variant.name}: other threads and sequences", "no time was left for them")
        )
        return
    with _loaded(variant, job) as model:
        _measure_speed(variant, model, speeds, job, progress, job.seconds * _REST_SHARE)


def _measure_speed(
    variant: MeasuredVariant,
    model: LlamaModel,
    speeds: Sequence[Speed],
    job: CalibrationJob,
    progress: CalibrationProgress,
    spared_seconds: float,
) -> None:
    """Measure `speeds` one by one while more than `spared_seconds` are left."""
    for threads, sequences in speeds:
        model.set_threads(threads)
        if sequences is None:
            if progress.begin(f"{variant.name}: prompt tokens a second, threads: {threads}", spared_seconds):
                variant.figures.append(measure_prefill(model, job.figure_seconds))
        elif progress.begin(f"{variant.name}: sequences: {sequences}, threads: {threads}", spared_seconds):
            variant.figures.append(measure_decode(model, sequences, job.figure_seconds))


@contextmanager
def _loaded(variant: MeasuredVariant, job: CalibrationJob) -> Iterator[LlamaModel]:
    process = psutil.Process()
    model = LlamaModel.load(
        variant.path, threads=job.threads[0], context_tokens=CONTEXT_TOKENS, sequences=MOST_SEQUENCES
    )
    try:
        yield model
        variant.size_bytes = variant.path.stat().st_size
        held = process.memory_info().rss
    finally:
        model.close()
    # By what closing gives back: the growth since loading would count the libraries' own first allocations too.
    variant.held_bytes = max(0, held - process.memory_info().rss)


def _grown(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else round(after - before, 2)


def _tell(message: MutableJsonObject) -> None:
    sys.stdout.buffer.write(orjson.dumps(message) + b"\n")
    sys.stdout.buffer.flush()


def _arguments(argv: Sequence[str] | None) -> tuple[CalibrationJob, int | None]:
    """The job, and the descriptor that ends it with its parent. Raises ConfigError for what contradicts itself.

    argparse ends the program with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m appliance.llamacpp.calibrate.program", description="Measure a GGUF model and variants of it."
    )
    parser.add_argument("--source", type=_named_file, required=True, metavar="NAME=FILE")
    parser.add_argument("--variant", type=_named_file, action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--threads", type=_numbers, required=True, help="thread counts, for example 2,1")
    parser.add_argument("--sequences", type=_numbers, default=SEQUENCES, help="sequences that generate at once")
    parser.add_argument("--figure-seconds", type=float, default=1.0, help="time for one figure's repeats")
    parser.add_argument("--texts", type=int, default=len(load_quality_texts()), help="most texts to compare on")
    parser.add_argument("--seconds", type=float, default=600.0, help="time after which nothing new is begun")
    parser.add_argument("--plain-kernels", action="store_true", help="measure llama.cpp's own kernels alone")
    parser.add_argument(
        "--parent-guard-fd", type=int, help="read end of a pipe the parent holds; end when it is closed"
    )
    options = parser.parse_args(argv)
    variants = (options.source, *options.variant)
    names = [name for name, _ in variants]
    if len(set(names)) != len(names):
        raise ConfigError(f"a variant is named twice among {', '.join(names)}: keep one")
    _check_known(path_and_name for path_and_name in options.variant)
    if max(options.sequences) > MOST_SEQUENCES:
        raise ConfigError(f"--sequences {max(options.sequences)}: at most {MOST_SEQUENCES} are measured")
    threads = tuple(sorted(set(options.threads), reverse=True))
    job = CalibrationJob(
        variants=variants,
        threads=threads,
        sequences=options.sequences,
        figure_seconds=options.figure_seconds,
        most_texts=max(1, options.texts),
        seconds=options.seconds,
        plain_kernels=options.plain_kernels,
    )
    return job, options.parent_guard_fd


def _check_known(variants: Iterable[tuple[str, Path]]) -> None:
    for name, path in variants:
        if name not in FORMS and not path.exists():
            raise ConfigError(f"{name!r} is not there and cannot be derived; derivable are {', '.join(FORMS)}")


def _named_file(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=FILE")
    return name, Path(path)


def _numbers(text: str) -> tuple[int, ...]:
    values = tuple(int(part) for part in text.split(","))
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} holds a number below 1")
    return values


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # llama.cpp's quantiser does not come back to Python for minutes
    # Threads of llama.cpp's do not survive Python's own way out.
    os._exit(main())
