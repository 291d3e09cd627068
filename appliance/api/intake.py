"""What every endpoint does the same way: who asks, the body, the request, and the wait for its answer."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from starlette.requests import Request as Http

from appliance.api.auth import Authenticator
from appliance.api.body import read_body
from appliance.api.rate_limits import RateLimits
from appliance.api.relay import unless_gone
from appliance.core import Caller, ParsedRequest, Request, TaskCall
from appliance.router.protocols import PipelineAnswer, PipelineBatchAnswer, PipelineTokenCount, RequestPipeline
from appliance.router.request_builder import make_request
from appliance.wire.json_body import PARSED_IN_THREAD_BYTES, parse_body

SomeCall = TypeVar("SomeCall", bound=TaskCall)
Reader = Callable[[Mapping[str, Any]], tuple[ParsedRequest, Sequence[SomeCall]]]


@dataclass(frozen=True, slots=True)
class InboundRequest(Generic[SomeCall]):
    """A request that has passed the rim: its envelope is sound and its caller known."""

    request: Request
    calls: Sequence[SomeCall]

    @property
    def prompt_tokens(self) -> int:
        """Of the largest call: one decision is made for all of them, and that one is the hardest to place."""
        return max(call.prompt_tokens for call in self.calls)

    @property
    def output_tokens(self) -> int:
        return max(call.output_tokens for call in self.calls)


class RequestIntake:
    """Shared by all endpoints of one application. `pipeline` is asked for anew for each request: reloads replace it."""

    def __init__(
        self,
        *,
        pipeline: Callable[[], RequestPipeline],
        auth: Authenticator,
        max_body_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._pipeline = pipeline
        self.auth = auth
        self.clock = clock
        self.wall_clock = wall_clock
        self._max_body_bytes = max_body_bytes
        self._limits = RateLimits(clock)

    @property
    def pipeline(self) -> RequestPipeline:
        return self._pipeline()

    def caller(self, http: Http) -> Caller:
        """Who asks, counted against what their key may ask a minute. Raises Unauthorized, RateLimited."""
        caller = self.auth.caller(http.headers)
        self._limits.take(caller)
        return caller

    async def open(self, http: Http, reader: Reader[SomeCall]) -> InboundRequest[SomeCall]:
        """Raises what is wrong with the key, the body or the headers, in this order."""
        now, wall = self.clock(), self.wall_clock()
        caller = self.caller(http)
        raw = await read_body(http.receive, http.headers, self._max_body_bytes)
        if len(raw) < PARSED_IN_THREAD_BYTES:
            asked, calls = reader(parse_body(raw))
        else:
            asked, calls = await asyncio.to_thread(lambda: reader(parse_body(raw)))
        request = make_request(
            asked, headers=http.headers, caller=caller, request_id=http.state.request_id, now=now, wall=wall
        )
        return InboundRequest(request, calls)

    async def answer(self, http: Http, opened: InboundRequest[Any]) -> PipelineAnswer:
        """The answer of a request with one call. Whoever gets it closes it."""
        return await unless_gone(http.receive, self.pipeline.answer(opened.request, opened.calls[0]))

    async def answer_many(self, http: Http, opened: InboundRequest[Any], *, concurrency: int) -> PipelineBatchAnswer:
        work = self.pipeline.answer_many(opened.request, opened.calls, concurrency=concurrency)
        return await unless_gone(http.receive, work)

    async def count(self, http: Http, opened: InboundRequest[Any]) -> PipelineTokenCount:
        """The tokens of a request's prompt, which nobody is asked to answer."""
        return await unless_gone(http.receive, self.pipeline.count_tokens(opened.request, opened.calls[0]))
