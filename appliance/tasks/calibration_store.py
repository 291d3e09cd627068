"""Where calibrated tasks are remembered: one JSON file in the data directory, read at start and written whole."""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from appliance.core.json_types import JsonObject
from appliance.errors import ConfigError
from appliance.files import raising_storage_full, replace_file
from appliance.tasks.decisions.decision_options import CalibrationParameters, DecisionMethod, TaskCalibration

_VERSION = 1


class TaskCalibrationStore:
    """Fits by task's name. One writer at a time; readers take `tasks`, which is replaced whole.

    Without a path they last as long as the program. Raises ConfigError for a file that cannot be read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.tasks: Mapping[str, Sequence[TaskCalibration]] = {} if path is None else _read(path)

    def put(self, fit: TaskCalibration) -> None:
        """Remember a fit, in place of the task's former one for the same target and variant. Writes to disk.

        A task has one method: rows that were fitted with another go.
        """
        with self._lock:
            place = (fit.target, fit.variant)
            kept = [
                row
                for row in self.tasks.get(fit.task, ())
                if (row.target, row.variant) != place and row.method == fit.method
            ]
            tasks = {**self.tasks, fit.task: (*kept, fit)}
            if self._path is not None:
                _write(self._path, tasks)
            self.tasks = tasks

    def remove(self, name: str) -> bool:
        """Forget a task's fits; whether there were any. Writes to disk."""
        with self._lock:
            if name not in self.tasks:
                return False
            tasks = {known: fits for known, fits in self.tasks.items() if known != name}
            if self._path is not None:
                _write(self._path, tasks)
            self.tasks = tasks
            return True


def _read(path: Path) -> Mapping[str, Sequence[TaskCalibration]]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    try:
        rows = json.loads(text)["fits"]
        tasks: dict[str, list[TaskCalibration]] = {}
        for row in rows:
            tasks.setdefault(row["task"], []).append(_fit_of(row))
        return tasks
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot be read ({error!r}): mend or remove it", file=str(path)) from error


def _fit_of(row: JsonObject) -> TaskCalibration:
    fits = {
        key: CalibrationParameters(float(one["temperature"]), tuple(map(float, one["bias"])))
        for key, one in row["fits"].items()
    }
    return TaskCalibration(row["task"], row["target"], row["variant"], DecisionMethod(**row["method"]), fits)


def _write(path: Path, tasks: Mapping[str, Sequence[TaskCalibration]]) -> None:
    rows = [asdict(row) for fits in tasks.values() for row in fits]
    with raising_storage_full("the calibration cannot be saved, the disk is full: free space"):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({"version": _VERSION, "fits": rows}, indent=1))
