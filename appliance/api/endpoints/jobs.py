"""OpenAI's Files and Batches. Each key sees its own; those with the scope admin see all.

A batch has OpenAI's fields, and `appliance` besides: how it goes, how fast, when it will be done, and what it cost.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from starlette.requests import Request as Http
from starlette.responses import FileResponse, Response
from starlette.types import ASGIApp

from appliance.api.body import read_body
from appliance.api.intake import RequestIntake
from appliance.api.json_responses import respond_json
from appliance.api.upload import UploadForm, receive_form
from appliance.core import Caller, Residency, strictest
from appliance.errors import BodyTooLarge, NotFound, RequestError
from appliance.jobs.deps import JobProgress
from appliance.jobs.manager import JobManager, new_batch_id
from appliance.jobs.models import Batch, StoredFile
from appliance.jobs.planner import parse_window
from appliance.jobs.storage.files import new_file_id
from appliance.router.request_builder import TAG_HEADER, read_residency, read_tag
from appliance.wire.json_body import parse_body
from appliance.wire.usage import write_responses_usage

PURPOSES: Final = ("batch", "batch_output", "user_data", "assistants", "fine-tune", "vision", "evals")
_FORM_BYTES: Final = 65_536
"""What a form has besides its file."""
_MAX_BODY_BYTES: Final = 1_000_000
_MOST_METADATA: Final = 16
_SHORTEST_SECONDS, _LONGEST_SECONDS = 3_600, 2_592_000


class JobEndpoints:
    def __init__(self, intake: RequestIntake, jobs: JobManager) -> None:
        self._intake, self._jobs = intake, jobs

    # Files.

    async def upload_file(self, http: Http) -> Response:
        caller, jobs = self._intake.authenticate(http), self._jobs
        length = http.headers.get("content-length", "")
        announced = int(length) if length.isdecimal() else 0
        if announced > jobs.config.max_file_bytes + _FORM_BYTES:
            raise BodyTooLarge(
                f"the upload has {announced} bytes, and files may have {jobs.config.max_file_bytes} here "
                "(jobs.max_file_bytes): split it",
                param="file",
            )
        await asyncio.to_thread(jobs.folder.check_space, announced)
        file_id = new_file_id()
        with jobs.folder.receive_upload(file_id) as receiver:
            form = UploadForm(http.headers.get("content-type", ""), receiver.write)
            await receive_form(http, form)
            purpose, lifetime = _purpose(form.fields), _lifetime(form.fields)
            await asyncio.to_thread(receiver.commit)
        now = self._intake.wall_clock()
        kept = lifetime or jobs.config.retention_days * 86_400.0
        filename = form.filename or "upload"
        file = StoredFile(file_id, caller.key_id, filename, purpose, receiver.size_bytes, now, now + kept)
        try:
            await jobs.store.add_file(file)
        except BaseException:
            await asyncio.to_thread(jobs.folder.remove_file, file_id)
            raise
        return respond_json(_file(file))

    async def list_files(self, http: Http) -> Response:
        caller, query = self._intake.authenticate(http), http.query_params
        limit, order = _limit(query.get("limit"), 10_000, 10_000), query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise RequestError(f"order is {order[:20]!r}: use asc or desc", param="order")
        rows = await self._jobs.store.list_files(
            _owner(caller),
            after=query.get("after"),
            limit=limit + 1,
            newest_first=order == "desc",
            purpose=query.get("purpose"),
        )
        return respond_json(_page([_file(row) for row in rows], limit))

    async def get_file(self, http: Http) -> Response:
        return respond_json(_file(await self._file(http)))

    async def get_file_content(self, http: Http) -> ASGIApp:
        file = await self._file(http)
        path = self._jobs.folder.file_path(file.id)
        if not await asyncio.to_thread(path.exists):
            raise NotFound(f"the content of {file.id} is not on this node's disk any more")
        return FileResponse(path, media_type="application/octet-stream", filename=file.filename)

    async def delete_file(self, http: Http) -> Response:
        file = await self._file(http)
        await self._jobs.remove_file(file.id)
        return respond_json({"id": file.id, "object": "file", "deleted": True})

    # Batches.

    async def create_batch(self, http: Http) -> Response:
        caller = self._intake.authenticate(http)
        body = parse_body(await read_body(http.receive, http.headers, _MAX_BODY_BYTES))
        endpoint, window = body.get("endpoint"), body.get("completion_window")
        if not isinstance(endpoint, str) or endpoint not in self._jobs.endpoints:
            raise RequestError(
                f"endpoint is {str(endpoint)[:80]!r}: use one of {', '.join(self._jobs.endpoints)}", param="endpoint"
            )
        if not isinstance(window, str):
            raise RequestError("completion_window is missing: write for example 24h", param="completion_window")
        seconds, metadata = parse_window(window), _metadata(body.get("metadata"))
        file = await self._owned_file(caller, body.get("input_file_id"))
        if file.purpose != "batch":
            raise RequestError(
                f"{file.id} was uploaded for {file.purpose!r}: upload it with purpose=batch", param="input_file_id"
            )
        now = self._intake.wall_clock()
        batch = Batch(
            id=new_batch_id(),
            owner=caller.key_id,
            endpoint=endpoint,
            input_file_id=file.id,
            completion_window=window,
            created_at=now,
            expires_at=now + seconds,
            metadata=metadata,
            residency=str(_residency(caller, http.headers, metadata)),
            tag=read_tag(http.headers.get(TAG_HEADER)),
            output_seconds=_output_seconds(body.get("output_expires_after")),
        )
        return respond_json(self._batch(await self._jobs.create(batch)))

    async def list_batches(self, http: Http) -> Response:
        caller, query = self._intake.authenticate(http), http.query_params
        limit = _limit(query.get("limit"), 20, 100)
        rows = await self._jobs.store.list_batches(_owner(caller), after=query.get("after"), limit=limit + 1)
        return respond_json(_page([self._batch(self._jobs.current_batch(row)) for row in rows], limit))

    async def get_batch(self, http: Http) -> Response:
        return respond_json(self._batch(await self._owned_batch(http)))

    async def cancel_batch(self, http: Http) -> Response:
        batch = await self._owned_batch(http)
        if batch.is_over:
            raise RequestError(f"batch {batch.id} is {batch.status}: there is nothing to cancel", status=409)
        return respond_json(self._batch(await self._jobs.cancel(batch)))

    async def _file(self, http: Http) -> StoredFile:
        return await self._owned_file(self._intake.authenticate(http), http.path_params["file_id"])

    async def _owned_file(self, caller: Caller, file_id: object) -> StoredFile:
        """Somebody else's does not exist for this caller."""
        file = await self._jobs.store.get_file(file_id) if isinstance(file_id, str) else None
        if file is None or _owner(caller) not in (None, file.owner):
            raise NotFound(f"there is no file {str(file_id)[:80]!r}: GET /v1/files lists yours", param="file_id")
        return file

    async def _owned_batch(self, http: Http) -> Batch:
        caller, batch_id = self._intake.authenticate(http), http.path_params["batch_id"]
        batch = await self._jobs.store.get_batch(batch_id)
        if batch is None or _owner(caller) not in (None, batch.owner):
            raise NotFound(f"there is no batch {batch_id[:80]!r}: GET /v1/batches lists yours", param="batch_id")
        return self._jobs.current_batch(batch)

    def _batch(self, batch: Batch) -> Mapping[str, Any]:
        return describe_batch(batch, self._jobs.progress(batch.id), self._intake.wall_clock())


def describe_batch(batch: Batch, progress: JobProgress | None, now: float) -> Mapping[str, Any]:
    """As the official SDK types it, and `appliance` besides."""
    times = {f"{status}_at": _seconds(batch.times.get(status)) for status in _TIMED}
    counts = batch.counts
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": [one.to_json() for one in batch.problems]} if batch.problems else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id if batch.is_over else None,
        "error_file_id": batch.error_file_id if batch.is_over else None,
        "created_at": int(batch.created_at),
        "expires_at": int(batch.expires_at),
        **times,
        "request_counts": {"total": counts.total, "completed": counts.completed, "failed": counts.failed},
        "usage": write_responses_usage(batch.usage),
        "metadata": batch.metadata or None,
        "appliance": _extension(batch, progress, now),
    }


_TIMED: Final = (
    "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled",
)  # fmt: skip


def _extension(batch: Batch, progress: JobProgress | None, now: float) -> Mapping[str, Any]:
    counts = batch.counts
    facts: dict[str, Any] = {
        "owner": batch.owner,
        "residency": batch.residency,
        "copied": counts.copied,
        "onsite": counts.onsite,
        "hosted": counts.hosted,
        "cost_usd": round(batch.cost_usd, 8),
        "state": "ended" if batch.is_over else "stopped",
        "reason": "",
    }
    if progress is not None:
        left = progress.seconds_left
        facts |= {
            "state": progress.state,
            "reason": progress.reason,
            "lines_per_second": None if progress.lines_per_second is None else round(progress.lines_per_second, 3),
            "eta_seconds": None if left is None else round(left, 1),
            "eta_at": None if left is None else int(now + left),
            "late": progress.late_lines,
            "under_way": progress.lines_in_flight,
            "in_provider_batches": progress.lines_at_providers,
        }
    return facts


def _file(file: StoredFile) -> Mapping[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_at),
        "expires_at": _seconds(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def _page(rows: list[Mapping[str, Any]], limit: int) -> Mapping[str, Any]:
    """One row more than wanted tells that there are more."""
    shown = rows[:limit]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return {"object": "list", "data": shown, "has_more": len(rows) > limit, **ends}


def _owner(caller: Caller) -> str | None:
    """Whose files and batches a caller sees; None: everybody's."""
    return None if "admin" in caller.scopes else caller.key_id


def _residency(caller: Caller, headers: Mapping[str, str], metadata: Mapping[str, str]) -> Residency:
    """The strictest of key, header and metadata, in which names are taken as in headers.

    Raises RequestError for one that cannot be understood.
    """
    said = (read_residency(headers), read_residency(metadata))
    return strictest(caller.residency, *(one for one in said if one is not None))


def _purpose(fields: Mapping[str, str]) -> str:
    purpose = fields.get("purpose", "")
    if purpose not in PURPOSES:
        raise RequestError(f"purpose is {purpose[:40]!r}: use one of {', '.join(PURPOSES)}", param="purpose")
    return purpose


def _lifetime(fields: Mapping[str, str]) -> float | None:
    text = fields.get("expires_after[seconds]")
    if text is None:
        return None
    return _checked_seconds(_whole(text, _LONGEST_SECONDS) or text, "expires_after[seconds]")


def _output_seconds(value: object) -> float | None:
    if value is None:
        return None
    seconds = value.get("seconds") if isinstance(value, dict) else value
    return _checked_seconds(seconds, "output_expires_after.seconds")


def _checked_seconds(value: object, param: str) -> float:
    if isinstance(value, int) and _SHORTEST_SECONDS <= value <= _LONGEST_SECONDS:
        return float(value)
    raise RequestError(
        f"{param} is {str(value)[:40]!r}: use whole seconds from {_SHORTEST_SECONDS} to {_LONGEST_SECONDS}", param=param
    )


def _metadata(value: object) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > _MOST_METADATA:
        raise RequestError(f"metadata must be an object with up to {_MOST_METADATA} texts", param="metadata")
    for name, text in value.items():
        if not isinstance(text, str) or len(text) > 512 or len(name) > 64:
            raise RequestError(
                f"metadata.{name[:64]} must be a text of up to 512 characters, its name up to 64", param="metadata"
            )
    return value


def _limit(text: str | None, usual: int, most: int) -> int:
    if text is None:
        return usual
    number = _whole(text, most)
    if not number:
        raise RequestError(f"limit is {text[:20]!r}: use a whole number from 1 to {most}", param="limit")
    return number


def _whole(text: str, most: int) -> int | None:
    """A number of as many digits as there may be; Python refuses to read thousands of them."""
    if not text.isdecimal() or len(text) > len(str(most)) or int(text) > most:
        return None
    return int(text)


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)
