"""Decisions of several lines asked in one call, where each of them would go the same way alone."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from appliance.core import Caller, Decision, Request, ResponseMetadata, Usage
from appliance.errors import ApplianceError
from appliance.jobs.lines.answers import make_answer, make_refusal
from appliance.jobs.lines.requests import LineRequests, make_request_id
from appliance.jobs.models import BatchLine, BatchTerms, LineAnswer
from appliance.router.protocols import RequestPipeline
from appliance.tasks.decisions import decision_results, openai_shape
from appliance.tasks.decisions.decision_results import DecisionResult
from appliance.tasks.decisions.openai_shape import DecisionsCall
from appliance.wire.usage import estimate_tokens

TOKENS_PER_GROUP: Final = 6_144
"""Of lines that are asked together. Nobody waits for them, and the engine puts them back for those who do."""


@dataclass(frozen=True, slots=True)
class RoutedLine:
    """A line that may be asked together with others."""

    line: BatchLine
    request: Request
    call: DecisionsCall
    decision: Decision

    @property
    def routing_key(self) -> Hashable:
        """The same for lines that would go the same way."""
        route = self.decision.route
        first = route.attempts[0].target.name if route.attempts else None
        return route.name, route.residency, first


class DecisionGroups:
    """`execute_one` asks a line alone."""

    def __init__(
        self,
        requests: LineRequests,
        pipeline: Callable[[], RequestPipeline],
        execute_one: Callable[[BatchLine, Caller, BatchTerms], Awaitable[LineAnswer]],
    ) -> None:
        self._requests, self._pipeline, self._execute_one = requests, pipeline, execute_one

    async def execute(self, lines: Sequence[BatchLine], caller: Caller, terms: BatchTerms) -> Sequence[LineAnswer]:
        """Those that would go the same way alone are asked in one call; the others alone."""
        answers: dict[int, LineAnswer] = {}
        by_route: defaultdict[Hashable, list[RoutedLine]] = defaultdict(list)
        for line in lines:
            found = await self._route(line, caller, terms)
            if isinstance(found, RoutedLine):
                by_route[found.routing_key].append(found)
            else:
                answers[line.number] = found
            await asyncio.sleep(0)  # a decision takes a fraction of a millisecond: others are not to wait for all
        for group in by_route.values():
            for line, answer in zip(
                (one.line for one in group), await self._execute_group(group, caller, terms), strict=True
            ):
                answers[line.number] = answer
        return [answers[line.number] for line in lines]

    async def _route(self, line: BatchLine, caller: Caller, terms: BatchTerms) -> RoutedLine | LineAnswer:
        name, pipeline = make_request_id(line, terms), self._pipeline()
        try:
            parsed, calls = await self._requests.read_calls(line, caller)
            request = await pipeline.with_pii_scan(self._requests.make_request(parsed, name, caller, terms))
            call: DecisionsCall = calls[0]
            decision = pipeline.decide(request, prompt_tokens=call.prompt_tokens, output_tokens=call.output_tokens)
        except ApplianceError as error:
            return make_refusal(error, name)
        return RoutedLine(line, request, call, decision)

    async def _execute_group(
        self, group: Sequence[RoutedLine], caller: Caller, terms: BatchTerms
    ) -> Sequence[LineAnswer]:
        merged = await self._merge(group, caller, terms)
        if merged is None:
            return await asyncio.gather(*(self._execute_one(one.line, caller, terms) for one in group))
        request, whole = merged
        calls = openai_shape.split_call(whole, TOKENS_PER_GROUP)
        try:
            many = await self._pipeline().answer_many(request, calls, concurrency=len(calls))
        except ApplianceError as error:
            return [make_refusal(error, make_request_id(one.line, terms)) for one in group]
        return [
            self._make_row_answer(row, usage, one, terms, many.metadata, len(group))
            for one, (row, usage) in zip(group, _split_results(many.results, calls), strict=True)
        ]

    async def _merge(
        self, group: Sequence[RoutedLine], caller: Caller, terms: BatchTerms
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
        parsed = openai_shape.make_parsed_request(first.request.body, whole)
        request = self._requests.make_request(parsed, make_request_id(first.line, terms), caller, terms)
        pipeline = self._pipeline()
        request = await pipeline.with_pii_scan(request)
        try:
            decision = pipeline.decide(request, prompt_tokens=whole.prompt_tokens, output_tokens=whole.output_tokens)
        except ApplianceError:
            return None
        together = replace(first, request=request, decision=decision)
        return (request, whole) if together.routing_key == first.routing_key else None

    def _make_row_answer(
        self, row: Any, usage: Usage, one: RoutedLine, terms: BatchTerms, metadata: ResponseMetadata, lines: int
    ) -> LineAnswer:
        name = make_request_id(one.line, terms)
        if isinstance(row, ApplianceError):
            row.headers = row.headers or metadata.headers()
            return make_refusal(row, name)
        payload = decision_results.make_openai_payload(row, one.call.questions)
        cost = None if metadata.cost_usd is None else metadata.cost_usd / lines
        return make_answer(payload, name, metadata, usage, cost)


def _split_results(
    results: Sequence[Any], calls: Sequence[DecisionsCall]
) -> Sequence[tuple[DecisionResult | ApplianceError, Usage]]:
    """For each input its judgement, with its share of the call's tokens, or its error."""
    found: list[tuple[DecisionResult | ApplianceError, Usage]] = []
    for result, call in zip(results, calls, strict=True):
        if isinstance(result, ApplianceError):
            found += [(result, Usage())] * len(call.inputs)
            continue
        shares = _split_usage(result.usage, [estimate_tokens(text.text) for text in call.inputs])
        for row, usage in zip(result.rows, shares, strict=True):
            alone = row if isinstance(row, ApplianceError) else replace(result, rows=(row,), usage=usage)
            found.append((alone, usage))
    return found


def _split_usage(usage: Usage, weights: Sequence[int]) -> Sequence[Usage]:
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
