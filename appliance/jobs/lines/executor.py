"""Lines of jobs as requests: read by the endpoints' own readers, answered by the pipeline on behalf of their key.

READINGS is the table of endpoints that a line may name; a new endpoint is one row more.
"""

import asyncio
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol

import orjson

from appliance.core import Caller, Decision, ParsedRequest, Request, ResponseMetadata, Usage
from appliance.errors import ApplianceError, BackendError, Busy, DeadlineExceeded, RejectedReply, Unavailable
from appliance.jobs.models import BatchLine, BatchTerms, LineAnswer
from appliance.router.protocols import RequestPipeline
from appliance.router.request_builder import RESIDENCY_HEADER, TAG_HEADER, make_request
from appliance.tasks import chat, completions, embeddings
from appliance.tasks.calibration_store import TaskCalibrationStore
from appliance.tasks.decisions import openai_shape, systemone
from appliance.tasks.decisions.decision_options import Priors
from appliance.tasks.decisions.openai_shape import DecisionResult, DecisionsCall
from appliance.tasks.extract import extraction
from appliance.tasks.saved_tasks import Shape
from appliance.tasks.store import KnownTasks, SavedTasks
from appliance.wire.dialect import InboundDialect
from appliance.wire.json_body import PARSED_IN_THREAD_BYTES, parse_body
from appliance.wire.registry import INBOUND
from appliance.wire.token_estimate import estimate_tokens

_DECISIONS: Final = "/v1/decisions"
_CALLS_AT_ONCE: Final = 16
"""Of one line: a long document is extracted from piece by piece."""
TOKENS_PER_GROUP: Final = 6_144
"""Of lines that are asked together. Nobody waits for them, and the engine puts them back for whoever does."""
_BUDGET_SECONDS: Final = 60.0
"""Budgets are of a day, so it helps little to try sooner."""

Payload = Callable[[Sequence[Any], Sequence[Any]], Any]


class CallerLookup(Protocol):
    """Who has which API key now."""

    def named(self, key_id: str) -> Caller:
        """The caller of that name as its key is now. Raises Unauthorized where the key is no more."""


@dataclass(frozen=True, slots=True)
class LineEndpoint:
    """How an endpoint's bodies are read, and how its payload is made of what its calls came to."""

    read: Callable[[Mapping[str, Any]], tuple[ParsedRequest, Sequence[Any]]]
    payload: Payload
    shape: Shape | None = None
    """Of bodies that may name a saved task."""


def _only(results: Sequence[Any], calls: Sequence[Any]) -> Any:
    return results[0]


def _translated(dialect: InboundDialect) -> LineEndpoint:
    def write(results: Sequence[Any], calls: Sequence[Any]) -> Any:
        return dialect.write_reply(results[0], calls[0].original or {})

    return LineEndpoint(partial(chat.read_translated_chat, dialect), write)


def _extracted(results: Sequence[Any], calls: Sequence[Any]) -> Any:
    is_single = all(call.index == 0 for call in calls)
    return (
        extraction.make_extract_payload(results, calls) if is_single else extraction.make_texts_payload(results, calls)
    )


def make_line_endpoints(fits: TaskCalibrationStore) -> Mapping[str, LineEndpoint]:
    """By url. Tasks that are calibrated while the node runs are known from then on."""
    priors = Priors()

    def judging(read: Callable[..., Any], body: Mapping[str, Any]) -> Any:
        return read(body, tasks=fits.tasks, priors=priors)

    return {
        "/v1/chat/completions": LineEndpoint(chat.read_chat_request, _only),
        "/v1/completions": LineEndpoint(completions.read_completion_request, _only),
        "/v1/embeddings": LineEndpoint(embeddings.read_embedding_request, _only),
        _DECISIONS: LineEndpoint(partial(judging, openai_shape.read_decision_request), _only, "decisions"),
        "/v1/systemone": LineEndpoint(partial(judging, systemone.read_systemone_request), _only, "systemone"),
        "/v1/extract": LineEndpoint(extraction.read_extract_request, _extracted, "extract"),
        **{dialect.path: _translated(dialect) for dialect in INBOUND.values() if dialect.path is not None},
    }


@dataclass(frozen=True, slots=True)
class _Decided:
    """A line that may be asked together with others of its kin."""

    line: BatchLine
    request: Request
    call: DecisionsCall
    decision: Decision

    @property
    def way(self) -> Hashable:
        """Lines that would go the same way."""
        route = self.decision.route
        first = route.attempts[0].target.name if route.attempts else None
        return route.name, route.residency, first


class LineExecutor:
    """Answers lines. `pipeline` is asked for anew for each call: reloads replace it."""

    def __init__(
        self,
        *,
        pipeline: Callable[[], RequestPipeline],
        auth: CallerLookup,
        fits: TaskCalibrationStore,
        saved: SavedTasks | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._pipeline, self._auth = pipeline, auth
        self._clock, self._wall = clock, wall_clock
        self._known = KnownTasks(fits, saved or SavedTasks())
        self.line_endpoints = make_line_endpoints(fits)

    @property
    def endpoints(self) -> Sequence[str]:
        return tuple(self.line_endpoints)

    def group_key(self, line: BatchLine) -> Hashable | None:
        """Decisions that ask the same of different texts: an engine computes the question once for all of them."""
        if line.url != _DECISIONS or not isinstance(line.body.get("input"), str):
            return None
        rest = {name: value for name, value in line.body.items() if name != "input"}
        return hashlib.blake2b(orjson.dumps(rest, option=orjson.OPT_SORT_KEYS), digest_size=16).digest()

    async def execute(self, lines: Sequence[BatchLine], terms: BatchTerms) -> Sequence[LineAnswer]:
        """One answer for each line, in order. Raises Unauthorized where the key is no more."""
        caller = self.find_caller(terms)
        if len(lines) == 1:
            return [await self._one(lines[0], caller, terms)]
        return await self._together(lines, caller, terms)

    def find_caller(self, terms: BatchTerms) -> Caller:
        """Raises Unauthorized where the key is no more."""
        return self._auth.named(terms.owner)

    async def _one(self, line: BatchLine, caller: Caller, terms: BatchTerms) -> LineAnswer:
        name = make_request_id(line, terms)
        try:
            asked, calls = await self.read_calls(line, caller)
            request = self.make_request(asked, name, caller, terms)
            results, metadata = await self._results(request, calls)
            payload = self.line_endpoints[line.url].payload(results, calls)
        except ApplianceError as error:
            return _refused(error, name)
        return make_answer(payload, name, metadata, read_usage(payload), metadata.cost_usd)

    async def _results(self, request: Request, calls: Sequence[Any]) -> tuple[Sequence[Any], ResponseMetadata]:
        """What every call came to. Raises the first error where none succeeded."""
        if len(calls) == 1:
            answer = await self._pipeline().answer(request, calls[0])
            try:
                return [answer.payload], answer.metadata
            finally:
                await answer.aclose()
        many = await self._pipeline().answer_many(request, calls, concurrency=_CALLS_AT_ONCE)
        failed = [result for result in many.results if isinstance(result, ApplianceError)]
        if len(failed) == len(many.results):
            failed[0].headers = many.metadata.headers()
            raise failed[0]
        return many.results, many.metadata

    async def read_calls(self, line: BatchLine, caller: Caller) -> tuple[ParsedRequest, Sequence[Any]]:
        """By its endpoint's own reader. Raises RequestError and its like."""
        reading = self.line_endpoints[line.url]
        reader = reading.read if reading.shape is None else self._known.reading(reading.read, reading.shape, caller)
        raw = orjson.dumps(line.body)
        if len(raw) < PARSED_IN_THREAD_BYTES:
            return reader(parse_body(raw))
        return await asyncio.to_thread(lambda: reader(parse_body(raw)))

    def make_request(self, asked: ParsedRequest, name: str, caller: Caller, terms: BatchTerms) -> Request:
        headers = {RESIDENCY_HEADER: terms.residency, **({TAG_HEADER: terms.tag} if terms.tag else {})}
        request = make_request(
            asked, headers=headers, caller=caller, request_id=name, now=self._clock(), wall=self._wall()
        )
        return replace(request, latency_class="batch", patience_seconds=terms.patience_seconds)

    # Decisions that are asked together.

    async def _together(self, lines: Sequence[BatchLine], caller: Caller, terms: BatchTerms) -> Sequence[LineAnswer]:
        """Those that would go the same way alone are asked in one call; the others, and what cannot be told, alone."""
        answers: dict[int, LineAnswer] = {}
        ways: defaultdict[Hashable, list[_Decided]] = defaultdict(list)
        for line in lines:
            found = await self._decided(line, caller, terms)
            if isinstance(found, _Decided):
                ways[found.way].append(found)
            else:
                answers[line.number] = found
            await asyncio.sleep(0)  # a decision takes a fraction of a millisecond: others are not to wait for all
        for group in ways.values():
            for line, answer in zip(
                (one.line for one in group), await self._one_way(group, caller, terms), strict=True
            ):
                answers[line.number] = answer
        return [answers[line.number] for line in lines]

    async def _decided(self, line: BatchLine, caller: Caller, terms: BatchTerms) -> _Decided | LineAnswer:
        name, pipeline = make_request_id(line, terms), self._pipeline()
        try:
            asked, calls = await self.read_calls(line, caller)
            request = await pipeline.with_pii_scan(self.make_request(asked, name, caller, terms))
            call: DecisionsCall = calls[0]
            decision = pipeline.decide(request, prompt_tokens=call.prompt_tokens, output_tokens=call.output_tokens)
        except ApplianceError as error:
            return _refused(error, name)
        return _Decided(line, request, call, decision)

    async def _one_way(self, group: Sequence[_Decided], caller: Caller, terms: BatchTerms) -> Sequence[LineAnswer]:
        merged = await self._merged(group, caller, terms)
        if merged is None:
            return await asyncio.gather(*(self._one(one.line, caller, terms) for one in group))
        request, whole = merged
        calls = openai_shape.split_call(whole, TOKENS_PER_GROUP)
        try:
            many = await self._pipeline().answer_many(request, calls, concurrency=len(calls))
        except ApplianceError as error:
            return [_refused(error, make_request_id(one.line, terms)) for one in group]
        return [
            self._of_row(row, usage, one, terms, many.metadata, len(group))
            for one, (row, usage) in zip(group, _rows(many.results, calls), strict=True)
        ]

    async def _merged(
        self, group: Sequence[_Decided], caller: Caller, terms: BatchTerms
    ) -> tuple[Request, DecisionsCall] | None:
        """One request for all, where it goes the way that each of them goes; None where they are better asked alone.

        An engine that scores labels gains by it. A route that escalates judges each answer by itself.
        """
        route = group[0].decision.route
        scores = bool(route.attempts) and "labels" in route.attempts[0].target.abilities
        if len(group) == 1 or not scores or route.escalations:
            return None
        first = group[0]
        inputs = tuple(one.call.inputs[0] for one in group)
        whole = replace(first.call, inputs=inputs, render=None)
        asked = openai_shape.make_parsed_request(first.request.body, whole)
        request = self.make_request(asked, make_request_id(first.line, terms), caller, terms)
        pipeline = self._pipeline()
        request = await pipeline.with_pii_scan(request)
        try:
            decision = pipeline.decide(request, prompt_tokens=whole.prompt_tokens, output_tokens=whole.output_tokens)
        except ApplianceError:
            return None
        together = replace(first, request=request, decision=decision)
        return (request, whole) if together.way == first.way else None

    def _of_row(
        self, row: Any, usage: Usage, one: _Decided, terms: BatchTerms, metadata: ResponseMetadata, lines: int
    ) -> LineAnswer:
        name = make_request_id(one.line, terms)
        if isinstance(row, ApplianceError):
            row.headers = row.headers or metadata.headers()
            return _refused(row, name)
        payload = openai_shape.make_openai_payload(row, one.call.questions)
        cost = None if metadata.cost_usd is None else metadata.cost_usd / lines
        return make_answer(payload, name, metadata, usage, cost)


def _rows(
    results: Sequence[Any], calls: Sequence[DecisionsCall]
) -> Sequence[tuple[DecisionResult | ApplianceError, Usage]]:
    """For each input its judgement, with its share of the call's tokens, or its error."""
    found: list[tuple[DecisionResult | ApplianceError, Usage]] = []
    for result, call in zip(results, calls, strict=True):
        if isinstance(result, ApplianceError):
            found += [(result, Usage())] * len(call.inputs)
            continue
        shares = _shares(result.usage, [estimate_tokens(text.text) for text in call.inputs])
        for row, usage in zip(result.rows, shares, strict=True):
            alone = row if isinstance(row, ApplianceError) else replace(result, rows=(row,), usage=usage)
            found.append((alone, usage))
    return found


def _shares(usage: Usage, weights: Sequence[int]) -> Sequence[Usage]:
    """Tokens that were counted together, one text's by its length; they add up to what was counted."""
    total, before, shares = max(1, sum(weights)), Usage(), []
    seen = 0
    for weight in weights:
        seen += weight
        upto = Usage(
            usage.prompt_tokens * seen // total,
            usage.completion_tokens * seen // total,
            usage.cached_tokens * seen // total,
            usage.reasoning_tokens * seen // total,
        )
        shares.append(
            Usage(
                upto.prompt_tokens - before.prompt_tokens,
                upto.completion_tokens - before.completion_tokens,
                upto.cached_tokens - before.cached_tokens,
                upto.reasoning_tokens - before.reasoning_tokens,
            )
        )
        before = upto
    return shares


def make_request_id(line: BatchLine, terms: BatchTerms) -> str:
    """The same however often the line is asked: what is sent twice can be told to be the same."""
    return f"{terms.batch_id}-{line.number}"


def make_answer(
    payload: Any, name: str, metadata: ResponseMetadata, usage: Usage, cost_usd: float | None
) -> LineAnswer:
    return LineAnswer(200, payload, name, metadata.location, usage, cost_usd, None, metadata.decision_id)


def _refused(error: ApplianceError, name: str) -> LineAnswer:
    decision_id = error.headers.get("x-appliance-decision")
    return LineAnswer(
        error.status,
        error.to_openai(),
        name,
        retry_after_seconds=_again_after(error),
        decision_id=decision_id,
    )


def _again_after(error: ApplianceError) -> float | None:
    """When asking again may help: where it was only busy, or a target failed in a way that passes."""
    if isinstance(error, Busy):
        return max(error.retry_after_seconds or 1.0, _BUDGET_SECONDS if error.code == "budget_exceeded" else 0.0)
    passes = isinstance(error, BackendError) and error.fallback and not isinstance(error, RejectedReply)
    if passes or isinstance(error, Unavailable | DeadlineExceeded):
        return error.retry_after_seconds or 1.0
    return None


def read_usage(payload: Any) -> Usage:
    """What a payload of any endpoint says of its tokens."""
    usage = payload.get("usage") if isinstance(payload, dict) else None
    if not isinstance(usage, Mapping):
        return Usage()
    prompt = _details(usage, "prompt_tokens_details") or _details(usage, "input_tokens_details")
    output = _details(usage, "completion_tokens_details") or _details(usage, "output_tokens_details")
    return Usage(
        _count(usage, "prompt_tokens") or _count(usage, "input_tokens"),
        _count(usage, "completion_tokens") or _count(usage, "output_tokens"),
        _count(prompt, "cached_tokens"),
        _count(output, "reasoning_tokens"),
    )


def _details(usage: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = usage.get(name)
    return found if isinstance(found, Mapping) else {}


def _count(usage: Mapping[str, Any], name: str) -> int:
    found = usage.get(name)
    return found if isinstance(found, int) else 0
