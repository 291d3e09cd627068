"""Where saved tasks are kept: a file for each in the data directory, with all its versions, replaced whole."""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from appliance.core import Caller
from appliance.core.json_types import JsonObject
from appliance.errors import ConfigError, RequestError
from appliance.files import OWNER_ONLY, raising_storage_full, replace_file, sync_to_disk
from appliance.tasks.calibration_store import TaskCalibrationStore
from appliance.tasks.saved_tasks import Saved, SavedTask, Shape, expand_task

MAX_TASKS: Final = 10_000
MAX_VERSIONS: Final = 1_000
_FORMAT: Final = 1


class SavedTasks:
    """One writer at a time; readers take `tasks`, which is replaced whole.

    Without a folder they last as long as the program. Raises ConfigError for a file that cannot be read.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self.tasks: Saved = {} if folder is None else _read_all(folder)

    def put(self, task: SavedTask) -> SavedTask:
        """Keep it as the newest version of its name; one that says the same as the newest is that one. Writes to disk.

        Raises RequestError where there are too many, and StorageFull where the disk is full.
        """
        with self._lock:
            versions = tuple(self.tasks.get(task.name, ()))
            if versions and versions[-1].definition == task.definition:
                return versions[-1]
            if len(versions) >= MAX_VERSIONS or (not versions and len(self.tasks) >= MAX_TASKS):
                most = f"{MAX_VERSIONS} versions of a task" if versions else f"{MAX_TASKS} tasks"
                raise RequestError(f"at most {most} are kept: remove what is not used", param="name")
            kept = replace(task, version=versions[-1].version + 1 if versions else 1)
            if self._folder is not None:
                with raising_storage_full("the task cannot be saved, the disk is full: free space"):
                    _write(self._folder, (*versions, kept))
            self.tasks = {**self.tasks, task.name: (*versions, kept)}
            return kept

    def remove(self, name: str) -> bool:
        """Whether there was one. Deletes from disk."""
        with self._lock:
            if name not in self.tasks:
                return False
            if self._folder is not None:
                _path(self._folder, name).unlink(missing_ok=True)
                sync_to_disk(self._folder)
            self.tasks = {known: versions for known, versions in self.tasks.items() if known != name}
            return True


class KnownTasks:
    """What requests may name: saved tasks and calibrated ones."""

    def __init__(self, fits: TaskCalibrationStore, saved: SavedTasks) -> None:
        self.fits, self.saved = fits, saved

    def expanded(self, body: JsonObject, shape: Shape, caller: Caller) -> JsonObject:
        return expand_task(body, shape, self.saved.tasks, self.fits.tasks, caller)

    def reading(self, read: Callable[..., Any], shape: Shape, caller: Caller, **known: Any) -> Callable[..., Any]:
        """`read`, given what a body that names a saved task stands for."""
        return partial(self._read, read, shape, caller, known)

    def _read(
        self,
        read: Callable[..., Any],
        shape: Shape,
        caller: Caller,
        known: JsonObject,
        body: JsonObject,
    ) -> Any:
        return read(self.expanded(body, shape, caller), **known)


def _path(folder: Path, name: str) -> Path:
    # In small letters: where a file system ignores case, two names must not be one file.
    marks = "".join("1" if letter.isupper() else "0" for letter in name)
    return folder / f"{name.lower()}{f'+{int(marks, 2):x}' if '1' in marks else ''}.json"


def _read_all(folder: Path) -> Saved:
    tasks: dict[str, Sequence[SavedTask]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            rows = json.loads(path.read_text())["versions"]
            versions = tuple(_task_of(row) for row in rows)
            tasks[versions[-1].name] = versions
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ConfigError(f"cannot be read ({error!r}): mend or remove it", file=str(path)) from error
    return tasks


def _task_of(row: JsonObject) -> SavedTask:
    return SavedTask(
        row["name"],
        row["kind"],
        int(row["version"]),
        row["made_at"],
        dict(row["fields"]),
        row["description"],
        tuple(row["keys"]),
    )


def _write(folder: Path, versions: Sequence[SavedTask]) -> None:
    rows = [
        {
            "name": one.name,
            "kind": one.kind,
            "version": one.version,
            "made_at": one.made_at,
            "description": one.description,
            "keys": list(one.keys),
            "fields": one.fields,
        }
        for one in versions
    ]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    content = json.dumps({"format": _FORMAT, "versions": rows}, indent=1, ensure_ascii=False)
    # Examples are texts that people wrote.
    replace_file(_path(folder, versions[-1].name), content, mode=OWNER_ONLY)
