"""Lines of jobs as requests: read by the endpoints' own readers, on behalf of the key that made the batch.

`make_line_endpoints` is the table of endpoints that a line may name; a new endpoint is one row more.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol

import orjson

from appliance.core import Caller, ParsedRequest, Request
from appliance.core.json_types import JsonObject
from appliance.jobs.models import BatchLine, BatchTerms
from appliance.router.request_builder import RESIDENCY_HEADER, TAG_HEADER, make_request
from appliance.tasks import chat, completions, embeddings
from appliance.tasks.calibration_store import TaskCalibrationStore
from appliance.tasks.decisions import openai_shape, systemone
from appliance.tasks.decisions.decision_options import Priors
from appliance.tasks.extract import extraction
from appliance.tasks.extract.extract_payload import make_extract_payload, make_texts_payload
from appliance.tasks.saved_tasks import Shape
from appliance.tasks.store import KnownTasks, SavedTasks
from appliance.wire.dialect import InboundDialect
from appliance.wire.json_body import PARSED_IN_THREAD_BYTES, parse_body
from appliance.wire.registry import INBOUND

DECISIONS: Final = "/v1/decisions"

Payload = Callable[[Sequence[Any], Sequence[Any]], Any]


class CallerLookup(Protocol):
    """Who has which API key now."""

    def find_caller(self, key_id: str) -> Caller:
        """The caller of that name as its key is now. Raises Unauthorized where the key is no more."""


@dataclass(frozen=True, slots=True)
class LineEndpoint:
    """How an endpoint's bodies are read, and how its payload is made of what its calls came to."""

    read: Callable[[JsonObject], tuple[ParsedRequest, Sequence[Any]]]
    payload: Payload
    shape: Shape | None = None
    """Of bodies that may name a saved task."""


def _only(results: Sequence[Any], calls: Sequence[Any]) -> Any:
    return results[0].payload


def _translated(dialect: InboundDialect) -> LineEndpoint:
    def write(results: Sequence[Any], calls: Sequence[Any]) -> Any:
        return dialect.write_reply(results[0].payload, calls[0].original or {})

    return LineEndpoint(partial(chat.read_translated_chat, dialect), write)


def _extracted(results: Sequence[Any], calls: Sequence[Any]) -> Any:
    is_single = all(call.index == 0 for call in calls)
    return make_extract_payload(results, calls) if is_single else make_texts_payload(results, calls)


def make_line_endpoints(fits: TaskCalibrationStore) -> Mapping[str, LineEndpoint]:
    """By url. Tasks that are calibrated while the node runs are known from then on."""
    priors = Priors()

    def with_calibration(read: Callable[..., Any], body: JsonObject) -> Any:
        return read(body, tasks=fits.tasks, priors=priors)

    return {
        "/v1/chat/completions": LineEndpoint(chat.read_chat_request, _only),
        "/v1/completions": LineEndpoint(completions.read_completion_request, _only),
        "/v1/embeddings": LineEndpoint(embeddings.read_embedding_request, _only),
        DECISIONS: LineEndpoint(partial(with_calibration, openai_shape.read_decision_request), _only, "decisions"),
        "/v1/systemone": LineEndpoint(partial(with_calibration, systemone.read_systemone_request), _only, "systemone"),
        "/v1/extract": LineEndpoint(extraction.read_extract_request, _extracted, "extract"),
        **{dialect.path: _translated(dialect) for dialect in INBOUND.values() if dialect.path is not None},
    }


class LineRequests:
    """Makes calls and requests of lines."""

    def __init__(
        self,
        auth: CallerLookup,
        fits: TaskCalibrationStore,
        saved: SavedTasks | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._auth, self._clock, self._wall_clock = auth, clock, wall_clock
        self._known = KnownTasks(fits, saved or SavedTasks())
        self.endpoints = make_line_endpoints(fits)

    def find_caller(self, terms: BatchTerms) -> Caller:
        """Raises Unauthorized where the key is no more."""
        return self._auth.find_caller(terms.owner)

    async def read_calls(self, line: BatchLine, caller: Caller) -> tuple[ParsedRequest, Sequence[Any]]:
        """By its endpoint's own reader. Raises RequestError and its like."""
        endpoint = self.endpoints[line.url]
        reader = endpoint.read
        if endpoint.shape is not None:
            reader = self._known.reading(endpoint.read, endpoint.shape, caller)
        raw = orjson.dumps(line.body)
        if len(raw) < PARSED_IN_THREAD_BYTES:
            return reader(parse_body(raw))
        return await asyncio.to_thread(lambda: reader(parse_body(raw)))

    def make_request(self, parsed: ParsedRequest, name: str, caller: Caller, terms: BatchTerms) -> Request:
        headers = {RESIDENCY_HEADER: terms.residency, **({TAG_HEADER: terms.tag} if terms.tag else {})}
        request = make_request(
            parsed, headers=headers, caller=caller, request_id=name, now=self._clock(), wall=self._wall_clock()
        )
        return replace(request, latency_class="batch", patience_seconds=terms.patience_seconds)

    def make_payload(self, line: BatchLine, results: Sequence[Any], calls: Sequence[Any]) -> Any:
        """The body that the line's endpoint answers with."""
        return self.endpoints[line.url].payload(results, calls)


def make_request_id(line: BatchLine, terms: BatchTerms) -> str:
    """The same however often the line is asked, so that a target can recognise what it is sent twice."""
    return f"{terms.batch_id}-{line.number}"
