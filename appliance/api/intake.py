"""What every endpoint does the same way: check the key, read the body, build the request, wait for the answer."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from starlette.requests import Request as Http

from appliance.api.auth import Authenticator
from appliance.api.body import read_body
from appliance.api.relay import wait_unless_disconnected
from appliance.core import Caller, ParsedRequest, Request, TaskCall
from appliance.errors import RateLimited
from appliance.router.protocols import PipelineAnswer, PipelineBatchAnswer, PipelineTokenCount, RequestPipeline
from appliance.router.request_builder import make_request
from appliance.wire.json_body import PARSED_IN_THREAD_BYTES, parse_body

_BURST_SECONDS: Final = 10.0
"""So much of a minute's allowance may be used at once; the rest comes evenly."""

SomeCall = TypeVar("SomeCall", bound=TaskCall)
Reader = Callable[[Mapping[str, Any]], tuple[ParsedRequest, Sequence[SomeCall]]]


@dataclass(frozen=True, slots=True)
class InboundRequest(Generic[SomeCall]):
    """A request whose key, body and headers are sound."""

    request: Request
    calls: Sequence[SomeCall]

    @property
    def prompt_tokens(self) -> int:
        """Of the largest call: one decision is made for all of them, and that one is the hardest to place."""
        return max(call.prompt_tokens for call in self.calls)

    @property
    def output_tokens(self) -> int:
        return max(call.output_tokens for call in self.calls)


class RateLimits:
    """Requests per minute and key: a bucket that fills evenly. Called on the event loop; `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        """Key -> (requests left, when that was so)."""

    def count_request(self, caller: Caller) -> None:
        """Count one request. Raises RateLimited, with the seconds to wait, where the key has none left."""
        limit = caller.requests_per_minute
        if limit is None:
            return
        per_second = limit / 60.0
        most = max(1.0, per_second * _BURST_SECONDS)
        now = self._clock()
        left, at = self._buckets.get(caller.key_id, (most, now))
        left = min(most, left + max(0.0, now - at) * per_second)
        if left < 1.0:
            self._buckets[caller.key_id] = (left, now)
            raise RateLimited(
                f"API key {caller.name!r} may send {limit} requests a minute: wait and send this one again",
                retry_after_seconds=(1.0 - left) / per_second,
            )
        self._buckets[caller.key_id] = (left - 1.0, now)


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

    def authenticate(self, http: Http) -> Caller:
        """Who asks, counted against what their key may ask a minute. Raises Unauthorized, RateLimited."""
        caller = self.auth.authenticate(http.headers)
        self._limits.count_request(caller)
        return caller

    async def read_request(self, http: Http, reader: Reader[SomeCall]) -> InboundRequest[SomeCall]:
        """Raises what is wrong with the key, the body or the headers, in this order."""
        now, wall = self.clock(), self.wall_clock()
        caller = self.authenticate(http)
        raw = await read_body(http.receive, http.headers, self._max_body_bytes)
        if len(raw) < PARSED_IN_THREAD_BYTES:
            parsed, calls = reader(parse_body(raw))
        else:
            parsed, calls = await asyncio.to_thread(lambda: reader(parse_body(raw)))
        request = make_request(
            parsed, headers=http.headers, caller=caller, request_id=http.state.request_id, now=now, wall=wall
        )
        return InboundRequest(request, calls)

    async def answer(self, http: Http, inbound: InboundRequest[Any]) -> PipelineAnswer:
        """The answer of a request with one call. The caller of this method closes it."""
        return await wait_unless_disconnected(http.receive, self.pipeline.answer(inbound.request, inbound.calls[0]))

    async def answer_many(self, http: Http, inbound: InboundRequest[Any], *, concurrency: int) -> PipelineBatchAnswer:
        work = self.pipeline.answer_many(inbound.request, inbound.calls, concurrency=concurrency)
        return await wait_unless_disconnected(http.receive, work)

    async def count_tokens(self, http: Http, inbound: InboundRequest[Any]) -> PipelineTokenCount:
        """The tokens of a request's prompt, which nobody is asked to answer."""
        return await wait_unless_disconnected(
            http.receive, self.pipeline.count_tokens(inbound.request, inbound.calls[0])
        )
