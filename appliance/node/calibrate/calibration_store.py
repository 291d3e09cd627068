"""Calibrations that are remembered: DATA_DIR/calibration/<model>/<variant>.<hardware>.json, one for each source file
and machine, and what identifies the llama.cpp that is installed."""

import hashlib
import importlib.metadata
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from appliance.errors import ApplianceError, BackendGarbage
from appliance.files import replace_file
from appliance.llamacpp.kernels.library import identify_kernels
from appliance.node.calibrate.calibration import Calibration, CalibrationKey, Measurement, explain_staleness

_DISTRIBUTION: Final = "llama-cpp-python"
_FORMAT: Final = 1
"""Raised when older files say something else than newer ones."""

_CALIBRATION: TypeAdapter[Calibration] = TypeAdapter(Calibration)
_MEASUREMENT: TypeAdapter[Measurement] = TypeAdapter(Measurement)


class CalibrationStore:
    """The calibrations of one data directory."""

    def __init__(self, data_dir: Path) -> None:
        self.folder = data_dir / "calibration"

    def read(self, model: str, source: str, key: CalibrationKey) -> tuple[Calibration | None, str | None]:
        """The calibration that holds for `key`; else None, and why an older one does not, if there is one."""
        reason = None
        # This machine's own first: what it says is the nearest reason.
        own = self._path(model, source, key.hardware)
        for path in (own, *sorted(set((self.folder / model).glob(f"{source}.*.json")) - {own})):
            found = _read(path)
            if found is None:
                continue
            stale = explain_staleness(found.key, key)
            if stale is None:
                return found, None
            reason = reason or stale
        return None, reason

    def write(self, model: str, calibration: Calibration) -> None:
        """Remember it. Raises ApplianceError if the disk will not take it."""
        path = self._path(model, calibration.measurement.source, calibration.key.hardware)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps({"format": _FORMAT, **asdict(calibration)}, indent=1) + "\n")
        except OSError as error:
            raise ApplianceError(f"the calibration cannot be kept in {path}: {error.strerror}") from error

    def _path(self, model: str, source: str, hardware: str) -> Path:
        return self.folder / model / f"{source}.{hardware}.json"


def read_measurement(payload: object) -> Measurement:
    """The program's result as a value. Raises BackendGarbage on anything else."""
    try:
        return _MEASUREMENT.validate_python(payload)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BackendGarbage(
            f"the calibration program's result is not what it promises: {place}: {first['msg']}"
        ) from error


@cache
def read_llama_cpp_identity() -> str:
    """The version, eight digits over the libraries as they were installed, and the kernels that compute beside them:
    another build computes otherwise."""
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "none"
    record = distribution.read_text("RECORD") or ""
    libraries = sorted(line for line in record.splitlines() if ".so" in line or ".dylib" in line or ".dll" in line)
    digest = hashlib.sha256("\n".join(libraries).encode()).hexdigest()
    return f"{distribution.version}+{digest[:8]}+{identify_kernels()}"


def identify_file(path: Path, sha256: str | None) -> str:
    """The checksum where one was proven, else size and modification time."""
    if sha256 is not None:
        return f"sha256:{sha256}"
    status = path.stat()
    return f"size:{status.st_size},modified:{status.st_mtime_ns}"


def _read(path: Path) -> Calibration | None:
    """None for what is not there, is damaged, or was written by another version of this program."""
    try:
        table = json.loads(path.read_text("utf-8"))
        if not isinstance(table, dict) or table.pop("format", None) != _FORMAT:
            return None
        return _CALIBRATION.validate_python(table)
    except (OSError, ValueError):
        return None
