"""Rows sent to a node over HTTP, several requests at once; a busy node is asked again."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Final

import httpx
import orjson

from appliance.core.json_types import JsonObject, MutableJsonObject
from appliance.errors import Unavailable
from appliance.quality.evaluation.adapters import Adapter
from appliance.quality.evaluation.datasets import DatasetRow
from appliance.quality.evaluation.scoring import GradedRow
from appliance.wire.usage import read_payload_usage

CLASSIFIER: Final = "classifier/"
_TEXTS: Final[Mapping[str, int]] = {"decision": 32, "extraction": 4}
"""In one request."""
_CLASSIFIER_TEXTS: Final = 256
_TRIES: Final = 6
_LONGEST_PAUSE_SECONDS: Final = 60.0
_BUSY: Final = frozenset({429, 503, 529})


@dataclass(frozen=True, slots=True)
class EvalRequestOptions:
    """What is sent to a model with every row."""

    adapter: Adapter
    model: str
    labels: Sequence[str] = ()
    examples: Sequence[JsonObject] = ()
    task: str | None = None
    """A saved task instead of the adapter's own question or schema."""
    options: JsonObject = field(default_factory=dict)

    @property
    def is_classifier(self) -> bool:
        return self.model.startswith(CLASSIFIER)

    def make_body(self, rows: Sequence[DatasetRow]) -> tuple[str, JsonObject]:
        """Path and body of the request about `rows`."""
        body: MutableJsonObject = {"model": self.model, **self.options}
        texts = [row.text for row in rows]
        if self.adapter.kind == "decision":
            return "/v1/decisions/batch", {**body, **self._question(), "inputs": texts}
        body |= {"evidence": True, "texts": texts}
        if self.task is not None:
            return "/v1/extract", {**body, "task": self.task}
        body["schema"] = self.adapter.schema
        if rows[0].asked:
            body["instructions"] = rows[0].asked
        return "/v1/extract", body | ({"examples": list(self.examples)} if self.examples else {})

    def _question(self) -> JsonObject:
        if self.task is not None:
            return {"task": self.task}
        if self.is_classifier:
            return {}
        choices = [{"value": label} for label in self.labels]
        question = {"type": "choice", "name": "label", "instructions": self.adapter.prompt, "choices": choices}
        return {"questions": [question]} | ({"examples": list(self.examples)} if self.examples else {})

    def split_rows(self, rows: Sequence[DatasetRow]) -> Sequence[Sequence[DatasetRow]]:
        most = _CLASSIFIER_TEXTS if self.is_classifier else _TEXTS[self.adapter.kind]
        if self.adapter.own_prompts and self.task is None:
            most = 1
        return [rows[start : start + most] for start in range(0, len(rows), most)]


@dataclass(frozen=True, slots=True)
class EvalReply:
    rows: Sequence[DatasetRow]
    results: Sequence[GradedRow]
    elapsed_seconds: float
    """Since the first request was sent."""


class NodeClient:
    """Raises Unavailable where no node answers."""

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.url = url.rstrip("/")
        # Small machines take minutes for a long text, so only the connection has a limit.
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(None, connect=10.0))

    def close(self) -> None:
        self._http.close()

    def is_ready(self) -> bool:
        try:
            return self._http.get("/healthz").status_code < 500
        except httpx.HTTPError:
            return False

    def ask_rows(self, asking: EvalRequestOptions, rows: Sequence[DatasetRow], concurrency: int) -> Iterator[EvalReply]:
        """Replies as they come. What a node refuses is a result with an error for each of its rows."""
        started = time.monotonic()
        with ThreadPoolExecutor(concurrency) as pool:
            waiting = {pool.submit(self._asked, asking, batch): batch for batch in asking.split_rows(rows)}
            try:
                for done in as_completed(waiting):
                    yield EvalReply(waiting[done], done.result(), time.monotonic() - started)
            finally:
                pool.shutdown(cancel_futures=True)

    def _asked(self, asking: EvalRequestOptions, rows: Sequence[DatasetRow]) -> Sequence[GradedRow]:
        path, body = asking.make_body(rows)
        content = orjson.dumps(body)
        for attempt in range(_TRIES):
            reply = self._sent(path, content)
            if reply.status_code not in _BUSY or attempt == _TRIES - 1:
                break
            time.sleep(_pause(reply, attempt))
        return _results(reply, len(rows))

    def _sent(self, path: str, content: bytes) -> httpx.Response:
        try:
            return self._http.post(path, content=content, headers={"content-type": "application/json"})
        except httpx.HTTPError as error:
            raise Unavailable(
                f"{self.url} did not answer ({error or type(error).__name__}): start a node there, or name one"
            ) from error


def _pause(reply: httpx.Response, attempt: int) -> float:
    text = reply.headers.get("retry-after", "")
    seconds = float(text) if text.replace(".", "", 1).isdecimal() else 2.0**attempt
    return min(_LONGEST_PAUSE_SECONDS, max(0.1, seconds))


def _results(reply: httpx.Response, count: int) -> Sequence[GradedRow]:
    try:
        body = reply.json()
    except ValueError:
        body = {}
    if reply.status_code != 200 or not isinstance(body.get("results"), list) or len(body["results"]) != count:
        error = body.get("error") or {"message": f"the node answered {reply.status_code}"}
        return [GradedRow({"error": error})] * count
    usage = read_payload_usage(body)
    cost = reply.headers.get("x-appliance-cost-usd", "")
    paid = float(cost) if cost.replace(".", "", 1).replace("e-", "", 1).isdecimal() else None
    tokens_in, tokens_out = usage.prompt_tokens, usage.completion_tokens
    return [
        GradedRow(row, body.get("model"), None if paid is None else paid / count, tokens_in / count, tokens_out / count)
        for row in body["results"]
    ]
