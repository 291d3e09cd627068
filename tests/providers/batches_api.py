"""A stand-in for OpenAI's Files and Batches (and Mistral's, which are like them), built with the official SDK's types.

It answers every line once its batch is `finish`ed, and counts how often each was answered: that is what is paid.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from openai.types import Batch, FileObject
from openai.types.batch_create_params import BatchCreateParams
from pydantic import TypeAdapter
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request
from starlette.responses import Response

from tests.providers.openai_api import CHAT, OpenaiApi
from tests.providers.served import typed_wrongs
from tests.providers.speech import Fail, Say

_CREATE: Final[TypeAdapter[Any]] = TypeAdapter(BatchCreateParams)
_MISTRAL_STATUS: Final = {
    "in_progress": "RUNNING", "completed": "SUCCESS", "cancelled": "CANCELLED", "failed": "FAILED",
    "expired": "TIMEOUT_EXCEEDED",
}  # fmt: skip


@dataclass
class Job:
    id: str
    asked: Mapping[str, Any]
    status: str = "in_progress"
    files: list[str | None] = field(default_factory=lambda: [None, None])


class BatchesApi(OpenaiApi):
    """`jobs` and `files` are what it keeps, `paid` how often a line was answered. `stop_at` (method, the path's
    beginning, before or after it was done) is where it stops answering for good and sets `stopped`."""

    def __init__(self, *, mistral: bool = False) -> None:
        super().__init__(Say("fine"))
        self.mistral = mistral
        self.jobs: dict[str, Job] = {}
        self.files: dict[str, bytes] = {}
        self.uploads = 0
        self.paid: Counter[str] = Counter()
        self.fails: dict[str, int] = {}
        """Lines by the end of their custom_id that are answered with such a status."""
        self.leaves: set[str] = set()
        """Lines that it does not come to before its time is over, or it is cancelled."""
        self.at_once = True
        """Whether batches are done as soon as they are made."""
        self.refuses: Fail | None = None
        self.alone: list[Any] = []
        """Bodies of requests that came singly."""
        self.stop_at: tuple[str, str, str] | None = None
        self.stopped = asyncio.Event()

    def finish(self, status: str = "completed") -> None:
        for job in self.jobs.values():
            if job.status == "in_progress":
                self._do(job, status)

    async def _answer(self, request: Request) -> Response:
        path = request.url.path.removeprefix(self.version)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.paths.append(f"{request.method} {path}")
        raw = await request.body()
        await self._maybe_stop(request.method, path, "before")
        if self.headers[-1].get("authorization") != "Bearer sk-secret":
            return self._failed(Fail(401, "invalid_api_key"))
        found = self._act(request, path, raw)
        await self._maybe_stop(request.method, path, "after")
        return found

    async def _maybe_stop(self, method: str, path: str, when: str) -> None:
        here = self.stop_at is not None and (method, when) == self.stop_at[::2] and path.startswith(self.stop_at[1])
        if here:
            self.stopped.set()
            await asyncio.Event().wait()

    def _act(self, request: Request, path: str, raw: bytes) -> Response:
        jobs = "/batch/jobs" if self.mistral else "/batches"
        match request.method, path.removeprefix(jobs).split("/"):
            case "POST", ["", "files"]:
                return self._upload(request, raw)
            case "GET", ["", "files", name, "content"]:
                return Response(self.files[name]) if name in self.files else self._failed(Fail(404, "not_found"))
            case "DELETE", ["", "files", name]:
                self.files.pop(name, None)
                return _json({"id": name, "object": "file", "deleted": True})
            case "POST", [""]:
                return self._create(orjson.loads(raw))
            case "GET", [""]:
                rows = [self._object(job) for job in reversed(self.jobs.values())]
                first = int(request.query_params.get("page", "0")) == 0
                return _json({"object": "list", "data": rows if first else [], "has_more": False})
            case "GET", ["", name]:
                return _json(self._object(self.jobs[name]))
            case "POST", ["", name, "cancel"]:
                self._do(self.jobs[name], "cancelled")
                return _json(self._object(self.jobs[name]))
            case "POST", ["", "chat", "completions"]:
                body = orjson.loads(raw)
                self.alone.append(body)
                return Response(self.whole(path, body, self._say(body)), media_type="application/json")
        self.wrongs.append(f"no {request.method} {path}")
        return self._failed(Fail(404, "not_found"))

    def _upload(self, request: Request, raw: bytes) -> Response:
        fields = _form(request.headers["content-type"], raw)
        assert fields["purpose"] == b"batch"
        for line in fields["file"].splitlines():
            row = orjson.loads(line)
            if not self.mistral:
                self.wrongs += [f"{name} is missing" for name in ("method", "url") if name not in row]
                self.wrongs += typed_wrongs(CHAT[False], row["body"])
        self.uploads += 1
        name = f"file-{self.uploads}"
        self.files[name] = fields["file"]
        made = {"id": name, "bytes": len(raw), "created_at": 1, "filename": "in.jsonl", "object": "file"}
        return _json(FileObject.model_validate({**made, "purpose": "batch", "status": "processed"}).to_dict())

    def _create(self, body: dict[str, Any]) -> Response:
        self.bodies.append(body)
        if self.refuses is not None:
            return self._failed(self.refuses)
        if not self.mistral:
            self.wrongs += typed_wrongs(_CREATE, body)
        job = Job(f"batch_theirs_{len(self.jobs) + 1}", body)
        self.jobs[job.id] = job
        if self.at_once:
            self._do(job, "completed")
        return _json(self._object(job))

    def _do(self, job: Job, status: str) -> None:
        good, bad = [], []
        for line in self.files[self._input_of(job)].splitlines():
            row = orjson.loads(line)
            number = row["custom_id"].rpartition("-")[2]
            if number in self.leaves:
                continue
            if number in self.fails:
                error = self.error(Fail(self.fails[number], "server_error"))
                bad.append(_row(row["custom_id"], {"status_code": self.fails[number], "body": error}))
                continue
            self.paid[row["custom_id"]] += 1
            reply = self.whole("/chat/completions", {"model": "m", **row["body"]}, self._say(row["body"]))
            good.append(_row(row["custom_id"], {"status_code": 200, "request_id": "r", "body": orjson.loads(reply)}))
        for index, rows in enumerate((good, bad)):
            if rows:
                job.files[index] = f"{job.id}-{index}"
                self.files[f"{job.id}-{index}"] = b"".join(rows)
        job.status = status

    def _say(self, body: Mapping[str, Any]) -> Say:
        return Say(f"re: {body['messages'][-1]['content']}", prompt_tokens=1000, output_tokens=500)

    def _input_of(self, job: Job) -> str:
        name: str = job.asked["input_files"][0] if self.mistral else job.asked["input_file_id"]
        return name

    def _object(self, job: Job) -> Any:
        if self.mistral:
            more = {"output_file": job.files[0], "error_file": job.files[1], "status": _MISTRAL_STATUS[job.status]}
            return {"id": job.id, "object": "batch", "metadata": job.asked["metadata"], **more}
        return Batch.model_validate(
            {
                "id": job.id,
                "object": "batch",
                "created_at": 1,
                **job.asked,
                "status": job.status,
                "output_file_id": job.files[0],
                "error_file_id": job.files[1],
            }
        ).to_dict()

    def _failed(self, fail: Fail) -> Response:
        return Response(orjson.dumps(self.error(fail)), fail.status, media_type="application/json")


def _row(name: str, response: Mapping[str, Any]) -> bytes:
    row = {"id": f"row-{name}", "custom_id": name, "response": response, "error": None}
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def _form(content_type: str, raw: bytes) -> dict[str, bytes]:
    """The parts of a multipart body by name."""
    _, options = parse_options_header(content_type)
    found: list[tuple[dict[bytes, bytes], bytes]] = []
    for part in _parts(raw, options[b"boundary"]):
        found.append(part)
    return {parse_options_header(headers[b"content-disposition"])[1][b"name"].decode(): data for headers, data in found}


def _parts(raw: bytes, boundary: bytes) -> Iterator[tuple[dict[bytes, bytes], bytes]]:
    parts: list[tuple[dict[bytes, bytes], bytes]] = []
    name, value = b"", b""

    def begin() -> None:
        parts.append(({}, b""))

    def field_(data: bytes, start: int, end: int) -> None:
        nonlocal name
        name += data[start:end]

    def text(data: bytes, start: int, end: int) -> None:
        nonlocal value
        value += data[start:end]

    def header_end() -> None:
        nonlocal name, value
        parts[-1][0][name.lower()] = value
        name, value = b"", b""

    def body(data: bytes, start: int, end: int) -> None:
        parts[-1] = (parts[-1][0], parts[-1][1] + data[start:end])

    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": begin,
            "on_header_field": field_,
            "on_header_value": text,
            "on_header_end": header_end,
            "on_part_data": body,
        },
    )
    parser.write(raw)
    parser.finalize()
    yield from parts
