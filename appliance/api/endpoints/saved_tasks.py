"""Saved tasks over HTTP: save, list, show, remove. Saving and removing take the scope admin.

`POST /v1/tasks` (its body: tasks/saved.py) gives the task as it is kept; saving a name again makes its next version.
`GET /v1/tasks`, `GET /v1/tasks/NAME` (with `?version=2` an earlier one) and `DELETE /v1/tasks/NAME`, which removes all
versions and what was calibrated under the name. A key without the scope admin sees the tasks that it may use.
"""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import structlog
from starlette.requests import Request as Http
from starlette.responses import Response

from appliance.api.body import read_body
from appliance.api.intake import RequestIntake
from appliance.api.json_responses import respond_json
from appliance.core import Caller
from appliance.errors import RequestError
from appliance.tasks.saved_tasks import (
    SavedTask,
    find_task,
    has_valid_calibration,
    make_unknown_task_error,
    read_saved_task,
)
from appliance.tasks.store import KnownTasks
from appliance.wire.json_body import parse_body

_log = structlog.get_logger(__name__)


class SavedTaskEndpoints:
    def __init__(self, intake: RequestIntake, known: KnownTasks, max_body_bytes: int) -> None:
        self._intake, self._known, self._max_body_bytes = intake, known, max_body_bytes

    async def save_task(self, http: Http) -> Response:
        caller = self._intake.auth.authenticate(http.headers, "admin")
        raw = await read_body(http.receive, http.headers, self._max_body_bytes)
        made_at = datetime.fromtimestamp(self._intake.wall_clock(), UTC).isoformat(timespec="seconds")
        # Checked and written in a thread: a definition may be large, and disks are slow.
        kept = await asyncio.to_thread(lambda: self._known.saved.put(read_saved_task(parse_body(raw), 0, made_at)))
        _log.info("task saved", task=kept.name, version=kept.version, key=caller.key_id)
        return respond_json(self._row(kept))

    async def list_tasks(self, http: Http) -> Response:
        caller = self._intake.auth.authenticate(http.headers)
        saved = self._known.saved.tasks
        rows = [self._row(versions[-1]) for _, versions in sorted(saved.items()) if versions[-1].open_to(caller)]
        only_fitted = sorted(self._known.fits.tasks.keys() - saved.keys())
        rows += [self._fitted_row(name) for name in only_fitted]
        return respond_json({"object": "list", "data": rows})

    async def get_task(self, http: Http) -> Response:
        caller = self._intake.auth.authenticate(http.headers)
        name = http.path_params["name"]
        if name in self._known.fits.tasks and name not in self._known.saved.tasks:
            return respond_json(self._fitted_row(name))
        return respond_json(self._row(self._found(name, http.query_params.get("version"), caller)))

    async def delete_task(self, http: Http) -> Response:
        caller = self._intake.auth.authenticate(http.headers, "admin")
        name = http.path_params["name"]
        saved = await asyncio.to_thread(self._known.saved.remove, name)
        fitted = await asyncio.to_thread(self._known.fits.remove, name)
        if not (saved or fitted):
            raise make_unknown_task_error(name, self._known.saved.tasks, caller)
        _log.info("task removed", task=name, key=caller.key_id)
        return respond_json({"object": "task.deleted", "name": name, "deleted": True})

    def _found(self, name: str, version: str | None, caller: Caller) -> SavedTask:
        if version is not None and not version.isdecimal():
            raise RequestError(f"version is {version!r:.40}: it must be a whole number", param="version")
        found = find_task(name if version is None else f"{name}@{version}", self._known.saved.tasks, caller)
        if found is None:
            raise make_unknown_task_error(
                name if version is None else f"{name}@{version}", self._known.saved.tasks, caller
            )
        return found

    def _row(self, task: SavedTask) -> Mapping[str, Any]:
        fits = self._known.fits.tasks
        fresh = has_valid_calibration(task, fits)
        return {
            "object": "task",
            "name": task.name,
            "kind": task.kind,
            "version": task.version,
            "versions": [one.version for one in self._known.saved.tasks.get(task.name, (task,))],
            "made_at": task.made_at,
            "description": task.description,
            "keys": list(task.keys) or None,
            **task.fields,
            "calibrated": [
                {"target": row.target, "variant": row.variant, "applies": fresh} for row in fits.get(task.name, ())
            ],
        }

    def _fitted_row(self, name: str) -> Mapping[str, Any]:
        """A name that was calibrated and never saved: its questions come with every request."""
        rows = self._known.fits.tasks[name]
        return {
            "object": "task",
            "name": name,
            "kind": "decision",
            "version": None,
            "versions": [],
            "calibrated": [{"target": row.target, "variant": row.variant, "applies": True} for row in rows],
        }
