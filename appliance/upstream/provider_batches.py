"""A provider's own batches: many requests sent at once, cheaper, and answered within a day.

What differs between providers is in `APIS`, by `Wire.batches`. All of it goes through the egress transport: lines with
a permit each, all else (starting, looking, fetching, cancelling) with one that is good for that alone.

Sources: the API references of OpenAI, Azure, Groq, Mistral and Anthropic, and the types of the official SDKs (openai
3.51, anthropic 2.10), as of November 2026.
"""

from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, Protocol
from urllib.parse import quote

import orjson

from appliance.core import BatchApi as ApiName
from appliance.core import Target
from appliance.errors import BackendGarbage
from appliance.upstream.base import RequestFrame
from appliance.upstream.batch_client import BOUNDARY, BatchClient, BatchResult, BatchStatus, Lines, Note
from appliance.upstream.permit_signature import line_start
from appliance.wire.dialect import WireRequest

MAX_LINES: Final = 5_000
MAX_BYTES: Final = 16_000_000
"""Of one batch, which lies in memory while it is sent. Providers take ten times as much."""

TAG: Final = "appliance_batch"
"""The key of a batch's metadata under which our name for it stands."""

_PAGES: Final = 20
"""Of a provider's list of batches, newest first, that are looked through for ours."""


class BatchApiClient(Protocol):
    """One provider's way. Every method but the first two raises BackendError's family."""

    finds: bool
    """Whether `find` can tell."""

    def endpoint(self, wire_request: WireRequest) -> str | None:
        """What a batch of such requests is made for; None: they are not taken in batches."""

    def line(self, wire_request: WireRequest, request_id: str) -> bytes: ...

    async def send(self, to: BatchClient, name: str, endpoint: str, lines: Lines, note: Note) -> str:
        """The batch's id there. `note` is told of the file that was uploaded for it, where there is one."""

    async def find(self, to: BatchClient, name: str) -> str | None:
        """The id of the batch that was sent under our name; None where there is none, or nothing can tell."""

    async def look(self, to: BatchClient, batch: str) -> BatchStatus: ...

    def rows(self, to: BatchClient, batch: str, standing: BatchStatus) -> AsyncIterator[BatchResult]:
        """What there is, also of a batch that was cut short; in any order."""

    async def cancel(self, to: BatchClient, batch: str) -> None:
        """Lines that are done by then are paid and can be fetched."""

    async def forget(self, to: BatchClient, batch: str, uploaded: str | None, standing: BatchStatus | None) -> None:
        """Have the provider delete what it keeps of it."""


def words(value: Any, name: str) -> str | None:
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


class OpenaiBatches:
    """Files and batches of OpenAI's shape; Mistral's are the same with other names."""

    finds = True
    _endpoints: frozenset[str] = frozenset({"/chat/completions", "/completions", "/embeddings", "/responses"})
    _jobs = "/batches"
    _over: frozenset[str] = frozenset({"completed", "failed", "expired", "cancelled"})
    _outputs = ("output_file_id", "error_file_id")

    def endpoint(self, wire_request: WireRequest) -> str | None:
        wire = wire_request.target.wire
        path = wire_request.path.partition("?")[0]
        if wire.deployments:
            path = path.removeprefix(f"/deployments/{quote(wire_request.target.model, safe='')}")
        if path not in self._endpoints:
            return None
        return path if wire.deployments else f"/v1{path}"

    def line(self, wire_request: WireRequest, request_id: str) -> bytes:
        url = orjson.dumps(self.endpoint(wire_request))
        return line_start(request_id) + b',"method":"POST","url":' + url + b',"body":' + wire_request.body + b"}"

    async def send(self, to: BatchClient, name: str, endpoint: str, lines: Lines, note: Note) -> str:
        head = (
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{name}.jsonl"\r\n'
            "Content-Type: application/jsonl\r\n\r\n"
        )
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        frame = RequestFrame(kind, head.encode(), b"\n", f"\n\r\n--{BOUNDARY}--\r\n".encode())
        file = words(await to.send("/files", lines, frame), "id")
        if file is None:
            raise BackendGarbage(f"{to.target.name} took a file and gave it no id")
        await note(file)
        batch = words(await to.ask("POST", self._jobs, self._asked(to.target, name, endpoint, file)), "id")
        if batch is None:
            raise BackendGarbage(f"{to.target.name} made a batch and gave it no id")
        return batch

    def _asked(self, target: Target, name: str, endpoint: str, file: str) -> Mapping[str, Any]:
        metadata = {TAG: name}
        return {"input_file_id": file, "endpoint": endpoint, "completion_window": "24h", "metadata": metadata}

    async def find(self, to: BatchClient, name: str) -> str | None:
        after = ""
        for _ in range(_PAGES):
            page = await to.ask("GET", f"{self._jobs}?limit=100{after}")
            rows = page.get("data")
            rows = rows if isinstance(rows, list) else []
            found = next((row for row in rows if words(row, "id") and _tag_of(row) == name), None)
            if found is not None:
                return words(found, "id")
            last = words(rows[-1], "id") if rows else None
            if not page.get("has_more") or last is None:
                return None
            after = f"&after={quote(last, safe='')}"
        return None

    async def look(self, to: BatchClient, batch: str) -> BatchStatus:
        found = await to.ask("GET", f"{self._jobs}/{quote(batch, safe='')}")
        status = words(found, "status") or ""
        files = tuple(file for name in self._outputs if (file := words(found, name)))
        return BatchStatus(status.lower() in self._over, _said(found) if status.lower() == "failed" else "", files)

    async def rows(self, to: BatchClient, batch: str, standing: BatchStatus) -> AsyncIterator[BatchResult]:
        for file in standing.files:
            async for row in to.rows(f"/files/{quote(file, safe='')}/content"):
                found = _openai_row(row)
                if found is not None:
                    yield found

    async def cancel(self, to: BatchClient, batch: str) -> None:
        await to.ask("POST", f"{self._jobs}/{quote(batch, safe='')}/cancel", {})

    async def forget(self, to: BatchClient, batch: str, uploaded: str | None, standing: BatchStatus | None) -> None:
        for file in (*((uploaded,) if uploaded else ()), *(standing.files if standing else ())):
            await to.ask("DELETE", f"/files/{quote(file, safe='')}")


class MistralBatches(OpenaiBatches):
    """Whose batches are jobs, of one model each, and whose lines name neither method nor url."""

    _endpoints = frozenset({"/chat/completions", "/embeddings"})
    _jobs = "/batch/jobs"
    _over = frozenset({"success", "failed", "timeout_exceeded", "cancelled"})
    _outputs = ("output_file", "error_file")

    def line(self, wire_request: WireRequest, request_id: str) -> bytes:
        return line_start(request_id) + b',"body":' + wire_request.body + b"}"

    def _asked(self, target: Target, name: str, endpoint: str, file: str) -> Mapping[str, Any]:
        window = {"metadata": {TAG: name}, "timeout_hours": 24}
        return {"input_files": [file], "model": target.model, "endpoint": endpoint, **window}

    async def find(self, to: BatchClient, name: str) -> str | None:
        for number in range(_PAGES):
            page = await to.ask("GET", f"{self._jobs}?page={number}&page_size=100")
            rows = page.get("data")
            if not isinstance(rows, list) or not rows:
                return None
            found = next((row for row in rows if _tag_of(row) == name), None)
            if found is not None:
                return words(found, "id")
        return None


class AnthropicBatches:
    """Message Batches. They have no metadata, so a batch whose id was lost cannot be told from others."""

    finds = False

    def endpoint(self, wire_request: WireRequest) -> str | None:
        return "/v1/messages" if wire_request.path.partition("?")[0] == "/messages" else None

    def line(self, wire_request: WireRequest, request_id: str) -> bytes:
        return line_start(request_id) + b',"params":' + wire_request.body + b"}"

    async def send(self, to: BatchClient, name: str, endpoint: str, lines: Lines, note: Note) -> str:
        frame = RequestFrame("application/json", b'{"requests":[', b",", b"]}")
        batch = words(await to.send("/messages/batches", lines, frame), "id")
        if batch is None:
            raise BackendGarbage(f"{to.target.name} made a batch and gave it no id")
        return batch

    async def find(self, to: BatchClient, name: str) -> str | None:
        return None

    async def look(self, to: BatchClient, batch: str) -> BatchStatus:
        found = await to.ask("GET", f"/messages/batches/{quote(batch, safe='')}")
        return BatchStatus(words(found, "processing_status") == "ended")

    async def rows(self, to: BatchClient, batch: str, standing: BatchStatus) -> AsyncIterator[BatchResult]:
        async for row in to.rows(f"/messages/batches/{quote(batch, safe='')}/results"):
            name, result = words(row, "custom_id"), row.get("result")
            if name is None:
                continue
            if words(result, "type") == "succeeded" and isinstance(result, dict):
                yield BatchResult(name, 200, result.get("message"))
            else:
                yield BatchResult(name, 0, result)

    async def cancel(self, to: BatchClient, batch: str) -> None:
        await to.ask("POST", f"/messages/batches/{quote(batch, safe='')}/cancel", {})

    async def forget(self, to: BatchClient, batch: str, uploaded: str | None, standing: BatchStatus | None) -> None:
        await to.ask("DELETE", f"/messages/batches/{quote(batch, safe='')}")


APIS: Final[Mapping[ApiName, BatchApiClient]] = {
    "openai": OpenaiBatches(),
    "mistral": MistralBatches(),
    "anthropic": AnthropicBatches(),
}


def _tag_of(row: Any) -> str | None:
    return words(row.get("metadata"), TAG) if isinstance(row, dict) else None


def _said(found: Mapping[str, Any]) -> str:
    errors = found.get("errors")
    rows = errors.get("data") if isinstance(errors, dict) else errors
    first = rows[0] if isinstance(rows, list) and rows else None
    return words(first, "message") or "it failed as a whole"


def _openai_row(row: Mapping[str, Any]) -> BatchResult | None:
    name, response = words(row, "custom_id"), row.get("response")
    if name is None:
        return None
    if not isinstance(response, dict) or row.get("error"):
        return BatchResult(name, 0, row.get("error"))
    status = response.get("status_code")
    return BatchResult(name, status if isinstance(status, int) else 0, response.get("body"))
