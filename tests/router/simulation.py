"""Hours of traffic in seconds: the real pipeline before an engine that only reckons, in time that is not waited for.

The engine steps as real ones do: one token of every running sequence and a piece of a prompt in each step, sequences
bounded, and no step takes exactly what it should.
"""

import asyncio
import random
import selectors
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from appliance.config import parse_policy
from appliance.core import EgressPermit, Residency, Snapshot, Target
from appliance.errors import ApplianceError
from appliance.router.capacity.admission import Admission
from appliance.router.capacity.breaker import Breakers
from appliance.router.deps import RouterDeps, RuntimeStats
from appliance.router.pipeline import Pipeline
from appliance.router.residency import EgressPermitIssuer
from appliance.state import State
from appliance.upstream.base import Transports
from tests.router.scene import (
    ChatCall,
    RecordingLedger,
    engine_target,
    hosted_target,
    make_request_load,
    request_of,
    view_of,
)

_STEP_SECONDS = 0.15
_HOSTED_FIRST_SECONDS = 0.5


class _Jump(selectors.SelectSelector):
    """Never waits: what would have been waited has passed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += max(0.0, timeout or 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now


@dataclass(eq=False)
class Job:
    prompt_left: int
    output_left: int
    tokens: "asyncio.Queue[bool]" = field(default_factory=asyncio.Queue)
    """One for each token; the last is True."""


class SimulatedEngine:
    """`prefill`, `decode` (of all sequences together, when full): tokens/s. `noise`: spread of a step's time."""

    def __init__(self, *, prefill: float, decode: float, sequences: int, noise: float = 0.0, slow: float = 1.0) -> None:
        self.prefill, self.decode, self.sequences = prefill, decode, sequences
        self._noise, self._slow = noise, slow
        self._random = random.Random(1)
        self.queue: deque[Job] = deque()
        self.running: list[Job] = []
        self.tokens = 0
        """Computed and written so far."""
        self._wake = asyncio.Event()

    def rate(self, running: int) -> float:
        """Batching pays: one sequence alone gets a third of what all together get."""
        return self.decode * (1 / 3 + 2 / 3 * running / self.sequences)

    async def run(self) -> None:
        while True:
            while self.queue and len(self.running) < self.sequences:
                self.running.append(self.queue.popleft())
            if not self.running:
                self._wake.clear()
                await self._wake.wait()
                continue
            await self._step()

    async def _step(self) -> None:
        writing = [job for job in self.running if not job.prompt_left]
        chunk = max(64.0, self.prefill * _STEP_SECONDS) if writing else 512.0
        pieces: list[tuple[Job, int]] = []
        for job in self.running:
            if job.prompt_left and chunk > 0:
                piece = min(job.prompt_left, int(chunk))
                pieces.append((job, piece))
                chunk -= piece
        seconds = sum(piece for _, piece in pieces) / self.prefill
        seconds += len(writing) / self.rate(len(writing)) if writing else 0.0
        seconds *= self._slow * self._random.lognormvariate(0.0, self._noise)
        await asyncio.sleep(seconds)
        self.tokens += sum(piece for _, piece in pieces) + len(writing)
        for job, piece in pieces:
            job.prompt_left -= piece
            if not job.prompt_left:
                writing.append(job)
        for job in writing:
            job.output_left -= 1
            job.tokens.put_nowait(job.output_left <= 0)
        self.running = [job for job in self.running if job.output_left > 0]

    def submit(self, prompt: int, output: int) -> Job:
        job = Job(prompt, output)
        self.queue.append(job)
        self._wake.set()
        return job

    def cancel(self, job: Job) -> None:
        if job in self.queue:
            self.queue.remove(job)
        if job in self.running:
            self.running.remove(job)

    def load(self) -> Any:
        left = [*self.queue, *self.running]
        rates = {count: self.rate(count) for count in (1, 4, 8, self.sequences) if count <= self.sequences}
        return make_request_load(
            queued_requests=len(self.queue),
            running_sequences=len(self.running),
            sequences_capacity=self.sequences,
            queued_prompt_tokens=sum(job.prompt_left for job in left),
            remaining_output_tokens=sum(job.output_left for job in left),
            kv_capacity_tokens=10**9,
            prefill_tokens_per_second=self.prefill,
            decode_tokens_per_second=rates,
        )


class _Events(httpx.AsyncByteStream):
    def __init__(self, engine: SimulatedEngine | None, job: Job | None, first_seconds: float) -> None:
        self._engine, self._job, self._first = engine, job, first_seconds

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._job is None:
            await asyncio.sleep(self._first)
            yield _event("hosted")
        else:
            while not await self._job.tokens.get():
                yield _event("word")
            yield _event("end")
        yield b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'

    async def aclose(self) -> None:
        if self._engine is not None and self._job is not None:
            self._engine.cancel(self._job)


def _event(word: str) -> bytes:
    return b"data: " + orjson.dumps({"choices": [{"delta": {"content": word}, "finish_reason": None}]}) + b"\n\n"


class SimulatedDoor:
    """Leads to the engine, or with none to a provider that begins after `first_seconds`."""

    def __init__(self, engine: SimulatedEngine | None, first_seconds: float = 0.0) -> None:
        self._engine, self._first = engine, first_seconds
        self.calls = 0

    async def open(
        self,
        target: Target,
        path: str,
        body: bytes,
        *,
        permit: EgressPermit | None,
        headers: Any = None,
        at_root: bool = False,
    ) -> httpx.Response:
        self.calls += 1
        told = orjson.loads(body)
        job = None if self._engine is None else self._engine.submit(told["prompt"], told["output"])
        events = _Events(self._engine, job, self._first)
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=events)

    async def aclose(self) -> None:
        pass


@dataclass(frozen=True)
class Arrival:
    at: float
    prompt: int
    output: int
    is_bound: bool = False


@dataclass(frozen=True)
class Ended:
    arrival: Arrival
    first_byte_seconds: float
    location: str
    """Or the code of the error."""


@dataclass
class Result:
    ended: list[Ended]
    tokens_per_second: float
    """Of the engine, read and written, while requests came."""

    def within(self, seconds: float) -> float:
        """Share of those that may leave which began in time."""
        free = [one for one in self.ended if not one.arrival.is_bound]
        answered = [one for one in free if one.location in ("onsite", "hosted")]
        return sum(one.first_byte_seconds <= seconds for one in answered) / len(free)

    def places(self, *, bound: bool) -> dict[str, int]:
        found: dict[str, int] = {}
        for one in self.ended:
            if one.arrival.is_bound == bound:
                found[one.location] = found.get(one.location, 0) + 1
        return found


def poisson(per_second: float, seconds: float, *, prompt: int, output: int, bound: float = 0.0) -> list[Arrival]:
    """Requests at random moments, their lengths spread widely around `prompt` and `output`."""
    randomness = random.Random(7)
    arrivals, at = [], 0.0
    while (at := at + randomness.expovariate(per_second)) < seconds:
        read, written = (max(4, int(randomness.lognormvariate(0, 0.7) * mean / 1.28)) for mean in (prompt, output))
        arrivals.append(Arrival(at, read, written, randomness.random() < bound))
    return arrivals


def simulate(
    engine_fields: dict[str, Any], arrivals: Sequence[Arrival], policy: str, *, to_the_end: bool = True
) -> Result:
    """`to_the_end`: whether what is still waiting when the last one has come is answered, too."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(_simulate(engine_fields, arrivals, policy, to_the_end))


async def _simulate(
    engine_fields: dict[str, Any], arrivals: Sequence[Arrival], policy: str, to_the_end: bool
) -> Result:
    loop = asyncio.get_running_loop()
    engine, stats, state = SimulatedEngine(**engine_fields), RuntimeStats(), State(loop.time)
    local, hosted = engine_target(context_tokens=None), hosted_target(context_tokens=None)
    egress = SimulatedDoor(None, _HOSTED_FIRST_SECONDS)
    admission = Admission(state, loop.time, stats.estimators)
    deps = RouterDeps(
        state=state,
        ledger=RecordingLedger(),
        admission=admission,
        breakers=Breakers(),
        stats=stats,
        transports=Transports(SimulatedDoor(engine), egress),
        permits=EgressPermitIssuer(),
        clock=loop.time,
    )
    pipeline = Pipeline(parse_policy(policy, "policy.toml"), deps)

    async def publish() -> None:
        while True:
            view = view_of(seen=loop.time(), load=engine.load())
            state.publish(Snapshot(loop.time(), (local, hosted), {local.name: view}))
            await asyncio.sleep(0.25)

    async def ask(arrival: Arrival) -> Ended:
        await asyncio.sleep(arrival.at)
        began = loop.time()
        bound = Residency("onsite") if arrival.is_bound else None
        body = {"messages": [], "prompt": arrival.prompt, "output": arrival.output}
        request = request_of("word " * 40, received=began, residency=bound, stream=True, body=body)
        call = ChatCall(body, stream=True, prompt_tokens=arrival.prompt, output_tokens=arrival.output)
        try:
            answer = await pipeline.answer(request, call)
        except ApplianceError as error:
            return Ended(arrival, loop.time() - began, error.code)
        assert answer.stream is not None
        async with aclosing(answer):
            await anext(answer.stream)
            first = loop.time() - began
            async for _ in answer.stream:
                pass
        return Ended(arrival, first, answer.metadata.location or "none")

    background = [asyncio.create_task(publish()), asyncio.create_task(engine.run())]
    await asyncio.sleep(0)
    started = loop.time()
    asking = [asyncio.create_task(ask(arrival)) for arrival in arrivals]
    await asyncio.sleep(arrivals[-1].at)
    tokens_per_second = engine.tokens / (loop.time() - started)
    if to_the_end:
        await asyncio.wait(asking)
    for task in (*background, *asking):
        task.cancel()
    await asyncio.wait([*background, *asking])
    ended = [task.result() for task in asking if not task.cancelled()]
    await admission.aclose()
    assert admission.total == 0
    assert egress.calls >= sum(one.location == "hosted" for one in ended)
    return Result(ended, tokens_per_second)
