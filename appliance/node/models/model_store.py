"""The models that lie on this machine: found, pulled, verified, removed.

DATA_DIR/models/<model>/<variant>.gguf       or a folder <variant>/ for safetensors
DATA_DIR/models/<model>/<variant>.stamp.json what was proven of it: size, modification time, sha256, source
DATA_DIR/models/<model>/<variant>.pull/      what an unfinished pull has so far

A file whose stamp still matches is served without contacting anything; a file without one was put there by hand.
"""

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx

from appliance.catalog import ModelSpec, Source, Variant
from appliance.errors import ModelFileError, NotFound, PullError
from appliance.files import replace_file
from appliance.node.models.download import (
    PullContext,
    PullProgress,
    PullReporter,
    explain_disk_error,
    require_space,
)
from appliance.node.models.gguf_header import read_gguf_header
from appliance.node.models.hf_folder import check_weight_files
from appliance.node.models.local_files import delete_path, hash_checksums, hash_path, measure_bytes, read_mtime_ns
from appliance.node.models.sources import (
    describe_source,
    estimate_peak_bytes,
    make_http_client,
    obtain_file,
    obtain_folder,
)

LOCK_PAUSE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One variant as it lies on disk. `sha256` and `source` are None for what was put there by hand."""

    model: str
    variant: str
    path: Path
    size_bytes: int
    sha256: str | None
    source: str | None
    pulled_at: str | None
    """ISO 8601, UTC."""
    unchanged: bool
    """Whether size and modification time still are what was recorded when its checksum was proven."""
    derived_from: str | None = None
    """Identity of the file it was made from on this machine; None for what came as it is."""


@dataclass(frozen=True, slots=True)
class _Stamp:
    size_bytes: int
    mtime_ns: int
    sha256: str
    """Of the file; of a folder, of the sorted list of its files' checksums."""
    source: str
    pulled_at: str
    derived_from: str | None = None


class ModelStore:
    """The models folder of one data directory. Safe to use from several processes at once: pulls take a lock."""

    def __init__(self, data_dir: Path, *, make_client: Callable[[], httpx.Client] = make_http_client) -> None:
        self.folder = data_dir / "models"
        self._make_client = make_client

    def list_stored(self) -> tuple[StoredModel, ...]:
        """Everything that lies there whole, by model and variant name."""
        found = []
        for folder in sorted(path for path in self.folder.glob("[!.]*") if path.is_dir()):
            for path in sorted(folder.iterdir()):
                if path.suffix == ".gguf" or (path / "config.json").is_file():
                    variant = path.stem if path.suffix == ".gguf" else path.name
                    found.append(self._describe(folder.name, variant, path))
        return tuple(found)

    def locate(self, model: str, variant: str, *, is_folder: bool = False) -> Path:
        """Where the variant lies, or would lie as a GGUF, or as a folder. Whether it is there: `find`."""
        folder = self.folder / model / variant
        return folder if is_folder or (folder / "config.json").is_file() else self.folder / model / f"{variant}.gguf"

    def find(self, model: str, variant: str) -> StoredModel | None:
        """The variant as it lies there; None if it does not."""
        path = self.locate(model, variant)
        return self._describe(model, variant, path) if path.exists() else None

    def pull(self, spec: ModelSpec, variant: Variant, report: PullReporter) -> StoredModel:
        """Have the variant here, whole and proven. Contacts nothing if it already is.

        Its sources are tried in order. Raises PullError naming the step, what was expected and the remedy.
        """
        ready = self._ready(spec, variant)
        if ready is None:
            with self._lock(spec.name, variant.name, report):
                # Another process may have pulled it while this one waited.
                ready = self._ready(spec, variant) or self._adopted(spec, variant, report)
                if ready is None:
                    self._pull_from_any(spec, variant, report)
                    ready = self._ready(spec, variant)
        if ready is None:
            raise PullError(f"{spec.name} {variant.name}: it changed while it was being pulled; pull again")
        report(PullProgress("ready", f"{spec.name} {variant.name}", ready.size_bytes, ready.size_bytes))
        return ready

    def verify(self, model: str, variant: str, report: PullReporter) -> StoredModel:
        """Read all of it again and compare with what was recorded; ModelFileError if it differs or is not whole."""
        stored = self.find(model, variant)
        if stored is None:
            raise NotFound(f"{model} {variant} is not here; appliance models pull {model}")
        if stored.path.is_file():
            read_gguf_header(stored.path)
        elif any(stored.path.glob("*.safetensors")):
            check_weight_files(stored.path)
        found = hash_path(stored.path, report)
        if stored.sha256 is not None and found != stored.sha256:
            raise ModelFileError(
                f"{stored.path}: sha256 is {found}, recorded was {stored.sha256}; remove it and pull again"
            )
        source = stored.source or "put there by hand"
        self._write_stamp(model, variant, stored.path, found, source, stored.derived_from)
        return self._describe(model, variant, stored.path)

    def remove(self, model: str, variant: str) -> int:
        """Delete the variant and what is left of its pulls; the bytes freed. NotFound if there is nothing."""
        with self._lock(model, variant, lambda _: None):
            places = [self.locate(model, variant), self._stamp_path(model, variant), self._pull_folder(model, variant)]
            freed = sum(measure_bytes(place) for place in places if place.exists())
            if freed == 0:
                raise NotFound(f"{model} {variant} is not here; appliance models list shows what is")
            for place in places:
                delete_path(place)
            folder = self.folder / model
            if not any(folder.iterdir()):
                folder.rmdir()
        return freed

    # ---- variants made here ----

    def locate_draft(self, model: str, variant: str) -> Path:
        """Where a variant that is being derived lies until `adopt` takes it over; `remove` and `discard` clear it."""
        return self._pull_folder(model, variant) / f"{variant}.gguf"

    def adopt_draft(self, model: str, variant: str, *, source: str, derived_from: str) -> StoredModel:
        """Take a finished draft over, with its checksum and what it was made from. What was put there by hand is set
        aside. Raises PullError if the disk fails, ModelFileError if the draft is not whole."""
        draft, final = self.locate_draft(model, variant), self.folder / model / f"{variant}.gguf"
        read_gguf_header(draft)
        try:
            sha256 = hash_path(draft, lambda _: None)
            self._clear(model, variant, final)
            draft.replace(final)
            self._write_stamp(model, variant, final, sha256, f"derived from {source}", derived_from)
        except OSError as error:
            raise explain_disk_error(error, final, f"{model} {variant}") from error
        self.discard_draft(model, variant)
        return self._describe(model, variant, final)

    def discard_draft(self, model: str, variant: str) -> None:
        """Clear an unfinished draft."""
        shutil.rmtree(self._pull_folder(model, variant), ignore_errors=True)

    # ---- how a pull goes ----

    def _ready(self, spec: ModelSpec, variant: Variant) -> StoredModel | None:
        stored = self.find(spec.name, variant.name)
        if stored is None or not stored.unchanged:
            return None
        return stored if variant.sha256 in (None, stored.sha256) else None

    def _adopted(self, spec: ModelSpec, variant: Variant, report: PullReporter) -> StoredModel | None:
        """A file that was put there by hand, or touched since, is taken over if it proves to be the right one."""
        path = self.locate(spec.name, variant.name)
        if not path.is_file():
            return None
        try:
            read_gguf_header(path)
        except ModelFileError:
            return None
        found = hash_path(path, report)
        stored = self.find(spec.name, variant.name)
        recorded = variant.sha256 or (stored.sha256 if stored else None)
        if recorded not in (None, found):
            return None
        self._write_stamp(spec.name, variant.name, path, found, "put there by hand")
        return self._ready(spec, variant)

    def _pull_from_any(self, spec: ModelSpec, variant: Variant, report: PullReporter) -> None:
        problems: list[PullError] = []
        with self._make_client() as client:
            context = PullContext(self._pull_folder(spec.name, variant.name), client, report)
            for source in variant.sources:
                try:
                    return self._pull_from(source, spec, variant, context)
                except PullError as problem:
                    problems.append(problem)
                    report(PullProgress("retry", describe_source(source), note=problem.message))
        if len(problems) == 1:
            raise problems[0]
        raise PullError("; ".join(f"{number}. {problem.message}" for number, problem in enumerate(problems, start=1)))

    def _pull_from(self, source: Source, spec: ModelSpec, variant: Variant, context: PullContext) -> None:
        what = f"{spec.name} {variant.name}"
        try:
            context.folder.mkdir(parents=True, exist_ok=True)
            still_to_come = estimate_peak_bytes(source, variant) - measure_bytes(context.folder)
            require_space(context.folder, max(0, still_to_come), what)
            name = variant.name if variant.is_folder else f"{variant.name}.gguf"
            made, final = context.folder / name, self.folder / spec.name / name
            if variant.is_folder:
                sums = obtain_folder(source, made, context)
                sha256 = hash_checksums(sums)
                _check_folder(made, variant)
            else:
                sha256 = obtain_file(source, variant, made, context)
                _check_whole(made, variant, sha256)
            self._clear(spec.name, variant.name, final)
            made.replace(final)
            self._write_stamp(spec.name, variant.name, final, sha256, describe_source(source))
            shutil.rmtree(context.folder)
        except OSError as error:
            raise explain_disk_error(error, context.folder, what) from error

    def _clear(self, model: str, variant: str, final: Path) -> None:
        """Make way for what was pulled. What was put there by hand is set aside, not deleted."""
        if final.exists() and self._read_stamp(model, variant) is None:
            final.replace(final.with_name(f"{final.name}.set-aside"))
        elif final.is_dir():
            delete_path(final)

    @contextmanager
    def _lock(self, model: str, variant: str, report: PullReporter) -> Iterator[None]:
        """Held by one process at a time; the system gives it back when that process dies."""
        path = self._lock_path(model, variant)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        except OSError as error:
            raise explain_disk_error(error, path, f"{model} {variant}") from error
        with file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    report(PullProgress("wait", f"{model} {variant}", note="another process is pulling it"))
                    time.sleep(LOCK_PAUSE_SECONDS)
            yield

    # ---- what is recorded ----

    def _describe(self, model: str, variant: str, path: Path) -> StoredModel:
        size_bytes, mtime_ns = measure_bytes(path), read_mtime_ns(path)
        stamp = self._read_stamp(model, variant)
        return StoredModel(
            model=model,
            variant=variant,
            path=path,
            size_bytes=size_bytes,
            sha256=stamp.sha256 if stamp else None,
            source=stamp.source if stamp else None,
            pulled_at=stamp.pulled_at if stamp else None,
            unchanged=stamp is not None and (stamp.size_bytes, stamp.mtime_ns) == (size_bytes, mtime_ns),
            derived_from=stamp.derived_from if stamp else None,
        )

    def _read_stamp(self, model: str, variant: str) -> _Stamp | None:
        try:
            return _Stamp(**json.loads(self._stamp_path(model, variant).read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None  # none, or one that cannot be understood: the file counts as not proven

    def _write_stamp(
        self, model: str, variant: str, path: Path, sha256: str, source: str, derived_from: str | None = None
    ) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        stamp = _Stamp(measure_bytes(path), read_mtime_ns(path), sha256, source, now, derived_from)
        replace_file(self._stamp_path(model, variant), json.dumps(asdict(stamp), indent=1) + "\n")

    def _stamp_path(self, model: str, variant: str) -> Path:
        return self.folder / model / f"{variant}.stamp.json"

    def _pull_folder(self, model: str, variant: str) -> Path:
        return self.folder / model / f"{variant}.pull"

    def _lock_path(self, model: str, variant: str) -> Path:
        # Never deleted: a lock file that goes away while another process waits for it locks nothing.
        return self.folder / ".locks" / f"{model}.{variant}.lock"


def _check_whole(path: Path, variant: Variant, sha256: str) -> None:
    if variant.sha256 not in (None, sha256):
        path.unlink()
        raise PullError(f"checking {path.name}: expected sha256 {variant.sha256}, got {sha256}; pull again")
    try:
        read_gguf_header(path)
    except ModelFileError as error:
        path.unlink()
        raise PullError(f"checking what came: {error.message}") from error


def _check_folder(path: Path, variant: Variant) -> None:
    """What is kept for the next try stays where it is: only what is missing has to come then."""
    if variant.format == "safetensors":
        try:
            check_weight_files(path)
        except ModelFileError as error:
            raise PullError(f"checking what came: {error.message}") from error
