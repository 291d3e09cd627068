"""Measures a model on this machine, a program of its own: how fast each variant is, and what it costs in quality.

    python -m appliance.llamacpp.calibrate --source q4_1=FILE [--variant bf16=FILE ...] --threads 2,1

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
from typing import Any, Final

import llama_cpp
import llama_cpp.llama_cpp as lib
import orjson
import psutil

from appliance.errors import ApplianceError, ConfigError, ModelFileError
from appliance.llamacpp.disturbance import load_average, stolen_seconds
from appliance.llamacpp.events import log
from appliance.llamacpp.model import Model
from appliance.llamacpp.process import EXIT_ARGUMENTS, EXIT_CLEAN, EXIT_ENGINE, EXIT_MODEL_FILE, tie_to_parent
from appliance.llamacpp.quality import Quality, Reading, compare, read_source, texts
from appliance.llamacpp.quantise import FORMS, derive, estimated_bytes
from appliance.llamacpp.speed import CONTEXT_TOKENS, MOST_SEQUENCES, SEQUENCES, Figure, measure_decode, measure_prefill

_SOURCE_SHARE: Final = 0.25
"""Share of the time that reading the texts with the source may take; every variant then reads as many."""
_DERIVED_BYTES_PER_SECOND: Final = 60_000_000
"""What deriving reaches at least, on one busy core: it tells whether there is time left for it."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be measured. `variants`: name and file, the source first."""

    variants: tuple[tuple[str, Path], ...]
    threads: tuple[int, ...]
    """The first is the most; quality is read with it."""
    sequences: tuple[int, ...]
    figure_seconds: float
    most_texts: int
    seconds: float
    """When this long has passed, nothing new is begun."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    what: str
    reason: str


@dataclass(slots=True)
class Measured:
    """One variant as far as it got."""

    name: str
    size_bytes: int = 0
    held_bytes: int = 0
    """Memory the process grew by: weights, KV cells of a small context, buffers."""
    derived_seconds: float | None = None
    """None: the file was there."""
    quality: Quality | None = None
    """None for the source, and where it was not measured."""
    figures: list[Figure] = field(default_factory=list)


class Progress:
    """Counts the pieces of work and tells of each; knows when there is no time for another one."""

    def __init__(self, total: int, seconds: float) -> None:
        self._done, self._total = 0, total
        self._ends = time.monotonic() + seconds
        self.left_out: list[LeftOut] = []

    @property
    def seconds_left(self) -> float:
        return self._ends - time.monotonic()

    def begin(self, what: str, needed_seconds: float = 0.0) -> bool:
        """Tell of the next piece of work; False where it must be left out for want of time."""
        self._done += 1
        if self.seconds_left < needed_seconds:
            self.left_out.append(LeftOut(what, "no time was left for it"))
            return False
        _tell({"event": "progress", "done": self._done - 1, "total": self._total, "what": what})
        return True


def main(argv: Sequence[str] | None = None) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # llama.cpp's quantiser does not come back to Python for minutes
    try:
        job, leash_fd = _arguments(argv)
        if leash_fd is not None:
            tie_to_parent(leash_fd)
        _tell({"event": "result", "result": calibrate(job)})
    except ConfigError as error:
        log("bad_arguments", reason=str(error))
        return EXIT_ARGUMENTS
    except ModelFileError as error:
        log("model_file_error", reason=error.message)
        return EXIT_MODEL_FILE
    except Exception as error:  # whatever it is, it is told once, in one line
        log("calibration_failed", reason=f"{type(error).__name__}: {error}")
        return EXIT_ENGINE
    return EXIT_CLEAN


def calibrate(job: Job) -> dict[str, Any]:
    """Measure all variants, the source first. Raises what the source's own measurement raises."""
    began, load, stolen = time.monotonic(), load_average(), stolen_seconds()
    figures_each = len(job.threads) * (1 + len(job.sequences))
    progress = Progress(len(job.variants) * (figures_each + 1) + len(job.variants) - 1, job.seconds)
    (source_name, source_path), *others = job.variants
    source = Measured(source_name)
    with _loaded(source, source_path, job) as model:
        parameters = model.n_params
        progress.begin(f"{source_name}: reading the texts that variants are compared on")
        reading = read_source(model, job.most_texts, job.seconds * _SOURCE_SHARE) if others else None
        _measure_speed(source, model, job, progress)
    found = [source]
    for name, path in others:
        variant = Measured(name)
        try:
            if reading is not None and _derived(variant, source_path, path, parameters, job, progress):
                _measure_variant(variant, path, reading, job, progress)
                found.append(variant)
        except ApplianceError as error:
            progress.left_out.append(LeftOut(name, error.message))
    return {
        "source": source_name,
        "parameters": parameters,
        "variants": [{**dataclasses.asdict(one), "figures": _figures(one)} for one in found],
        "left_out": [dataclasses.asdict(one) for one in progress.left_out],
        "llama_cpp": llama_cpp.__version__,
        "system": lib.llama_print_system_info().decode("utf-8", "replace").strip(),
        "load_average": load,
        "stolen_seconds": _grown(stolen, stolen_seconds()),
        "seconds": round(time.monotonic() - began, 2),
    }


def _derived(variant: Measured, source: Path, path: Path, parameters: int, job: Job, progress: Progress) -> bool:
    """Have the variant's file there; False where there is no time to make it."""
    expected = estimated_bytes(parameters, variant.name) / _DERIVED_BYTES_PER_SECOND
    if path.exists():
        expected = 0.0
    if not progress.begin(f"{variant.name}: deriving it from {source.stem}", expected):
        return False
    if not path.exists():
        began = time.monotonic()
        derive(source, path, variant.name, parameters=parameters, threads=max(job.threads))
        variant.derived_seconds = round(time.monotonic() - began, 2)
    return True


def _measure_variant(variant: Measured, path: Path, reading: Reading, job: Job, progress: Progress) -> None:
    with _loaded(variant, path, job) as model:
        if progress.begin(f"{variant.name}: comparing its answers with the source's"):
            variant.quality = compare(model, reading)
        _measure_speed(variant, model, job, progress)


def _measure_speed(variant: Measured, model: Model, job: Job, progress: Progress) -> None:
    for threads in job.threads:
        model.use_threads(threads)
        if progress.begin(f"{variant.name}: prompt tokens a second with {threads} threads"):
            variant.figures.append(measure_prefill(model, job.figure_seconds))
        for sequences in job.sequences:
            if progress.begin(f"{variant.name}: {sequences} sequences with {threads} threads"):
                variant.figures.append(measure_decode(model, sequences, job.figure_seconds))


@contextmanager
def _loaded(variant: Measured, path: Path, job: Job) -> Iterator[Model]:
    process = psutil.Process()
    before = process.memory_info().rss
    model = Model.load(path, threads=job.threads[0], context_tokens=CONTEXT_TOKENS, sequences=MOST_SEQUENCES)
    try:
        yield model
        variant.size_bytes = path.stat().st_size
        variant.held_bytes = max(0, process.memory_info().rss - before)
    finally:
        model.close()


def _figures(variant: Measured) -> list[dict[str, Any]]:
    return [dataclasses.asdict(figure) for figure in variant.figures]


def _grown(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else round(after - before, 2)


def _tell(message: dict[str, Any]) -> None:
    sys.stdout.buffer.write(orjson.dumps(message) + b"\n")
    sys.stdout.buffer.flush()


def _arguments(argv: Sequence[str] | None) -> tuple[Job, int | None]:
    """The job, and the leash. Raises ConfigError for what contradicts itself; argparse ends the program with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m appliance.llamacpp.calibrate", description="Measure a GGUF model and variants of it."
    )
    parser.add_argument("--source", type=_named_file, required=True, metavar="NAME=FILE")
    parser.add_argument("--variant", type=_named_file, action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--threads", type=_numbers, required=True, help="thread counts, for example 2,1")
    parser.add_argument("--sequences", type=_numbers, default=SEQUENCES, help="sequences that generate at once")
    parser.add_argument("--figure-seconds", type=float, default=1.0, help="time for one figure's repeats")
    parser.add_argument("--texts", type=int, default=len(texts()), help="most texts to compare on")
    parser.add_argument("--seconds", type=float, default=600.0, help="time after which nothing new is begun")
    parser.add_argument("--leash-fd", type=int, help="read end of a pipe the parent holds; end when it is closed")
    options = parser.parse_args(argv)
    variants = (options.source, *options.variant)
    names = [name for name, _ in variants]
    if len(set(names)) != len(names):
        raise ConfigError(f"a variant is named twice among {', '.join(names)}: keep one")
    _check_known(path_and_name for path_and_name in options.variant)
    if max(options.sequences) > MOST_SEQUENCES:
        raise ConfigError(f"--sequences {max(options.sequences)}: at most {MOST_SEQUENCES} are measured")
    threads = tuple(sorted(set(options.threads), reverse=True))
    job = Job(variants, threads, options.sequences, options.figure_seconds, max(1, options.texts), options.seconds)
    return job, options.leash_fd


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
    # Threads of llama.cpp's do not survive Python's own way out.
    os._exit(main())
