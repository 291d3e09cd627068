"""A pipeline, a ledger and metrics made of nothing but memory, and the application served over a real socket."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI

from appliance.api.app import AppDeps, create_app
from appliance.api.auth import Authenticator
from appliance.config import KeySettings, ServerSettings
from appliance.core import (
    Attempt,
    Caller,
    Decision,
    EngineStatus,
    HealthWarning,
    Profile,
    Request,
    Residency,
    ResponseMetadata,
    Route,
    Snapshot,
    Target,
    TaskCall,
    UpstreamCall,
    UpstreamReply,
    Usage,
)
from appliance.errors import ApplianceError, ConfigError
from appliance.ledger.store import LedgerHealth
from appliance.state import State
from appliance.telemetry.metrics import Metrics
from appliance.wire.openai.stream import write_chat_stream

NOW = 1000.0
SMALL = Target(
    name="onsite/small",
    location="onsite",
    dialect="openai",
    address="unix:/nowhere",
    model="small",
    abilities=frozenset({"chat", "completions", "labels", "json_schema", "logprobs", "tools"}),
    context_tokens=2048,
)


def make_metadata(request: Request) -> ResponseMetadata:
    return ResponseMetadata(request.id, "dec_1", SMALL.name, "onsite", "general", "first choice", "sha256:0", 0.0, True)


@dataclass
class StandInStream:
    """A stream that gives its pieces, then fails with `error`, or waits for ever once `hangs_after` pieces are out."""

    pieces: Sequence[bytes]
    error: Exception | None = None
    hangs_after: int | None = None
    given: int = 0
    waiting: asyncio.Event = field(default_factory=asyncio.Event)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self.given == self.hangs_after:
            self.waiting.set()
            await asyncio.Event().wait()
        if self.given < len(self.pieces):
            self.given += 1
            return self.pieces[self.given - 1]
        if self.error is not None:
            raise self.error
        raise StopAsyncIteration


@dataclass
class StandInAnswer:
    metadata: ResponseMetadata
    result: Any = None
    stream: StandInStream | None = None
    raw: bytes | None = None
    is_forwarded: bool = False
    status: int = 200
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def payload(self) -> Any:
        return None if self.result is None else self.result.payload

    async def aclose(self) -> None:
        self.closed.set()


@dataclass(frozen=True)
class StandInMany:
    metadata: ResponseMetadata
    results: Sequence[Any]


@dataclass(frozen=True)
class StandInCounted:
    tokens: int

    def headers(self) -> Mapping[str, str]:
        return {"x-appliance-count": "estimate"}


@dataclass
class StandInPipeline:
    """Answers with `reply(outgoing)` as the target's payload, or with `pieces` where it streams and they are given;
    `error` is raised instead where it is set."""

    reply: Callable[[UpstreamCall], Any] = lambda outgoing: {}
    pieces: Sequence[bytes] = ()
    error: Exception | None = None
    stream_error: Exception | None = None
    hangs_after: int | None = None
    hangs: bool = False
    late: bool = False
    """Answer in spite of being cancelled."""
    requests: list[Request] = field(default_factory=list)
    sent: list[UpstreamCall] = field(default_factory=list)
    answers: list[StandInAnswer] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    answered: asyncio.Event = field(default_factory=asyncio.Event)

    async def with_pii_scan(self, request: Request) -> Request:
        return request

    def decide(self, request: Request, *, prompt_tokens: int, output_tokens: int) -> Decision:
        self.requests.append(request)
        profile = Profile("chat", 0.1, request.format, "interactive", "en", prompt_tokens, output_tokens)
        route = Route(
            "general", "sha256:0", Residency("any"), "default", (Attempt(SMALL, "first choice"),), (), 10, 60, 600, 3
        )
        return Decision("dec_dry", request.id, profile, route)

    async def answer(self, request: Request, call: TaskCall) -> StandInAnswer:
        self.requests.append(request)
        self.started.set()
        if self.hangs:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                if not self.late:
                    raise
        answer = StandInAnswer(make_metadata(request))
        self.answers.append(answer)
        self.answered.set()
        if self.error is not None:
            raise self.error
        if call.streams(SMALL):
            (outgoing,) = call.outgoing(SMALL)
            self.sent.append(outgoing)
            pieces = self.pieces or tuple(write_chat_stream(self.reply(outgoing), outgoing.body))
            answer.stream = StandInStream(pieces, self.stream_error, self.hangs_after)
        else:
            answer.result = self._read(call)
        return answer

    async def answer_many(self, request: Request, calls: Sequence[TaskCall], *, concurrency: int) -> StandInMany:
        self.requests.append(request)
        results: list[Any] = []
        for call in calls:
            try:
                if self.error is not None:
                    raise self.error
                results.append(self._read(call))
            except ApplianceError as error:
                results.append(error)
        return StandInMany(make_metadata(request), results)

    async def count_tokens(self, request: Request, call: TaskCall) -> StandInCounted:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        return StandInCounted(call.prompt_tokens)

    def list_models(self, caller: Caller) -> Sequence[Target]:
        return (SMALL,)

    def resolve_alias(self, model: str) -> str:
        return {"gpt-old": SMALL.name, "claude-old": "auto"}.get(model, model)

    def _read(self, call: TaskCall) -> Any:
        outgoing = call.outgoing(SMALL)
        self.sent += outgoing
        return call.read(SMALL, [UpstreamReply(self.reply(one), Usage(10, 2, 4), 0.1, 0.2) for one in outgoing])


@dataclass
class StandInLedger:
    stories: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reason: str = ""

    def health(self) -> LedgerHealth:
        return LedgerHealth(not self.reason, self.reason, 0, 0)

    async def read_decision(self, decision_id: str) -> Mapping[str, Any] | None:
        return self.stories.get(decision_id)


def snapshot(*, seen: float = NOW, warnings: Sequence[HealthWarning] = ()) -> Snapshot:
    engine = EngineStatus(SMALL.name, "ready", seen)
    return Snapshot(NOW, (SMALL,), {SMALL.name: engine}, tuple(warnings))


def make_app(
    pipeline: StandInPipeline,
    *,
    keys: Sequence[KeySettings] = (),
    host: str = "127.0.0.1",
    ledger: StandInLedger | None = None,
    shown: Snapshot | None = None,
    max_body_bytes: int = 100_000,
    mistake: ConfigError | None = None,
) -> FastAPI:
    """`mistake`: what a reload stumbles over."""

    async def reload() -> Mapping[str, Any]:
        if mistake is not None:
            raise mistake
        return {"policy_version": "sha256:2", "needs_restart": []}

    state = State(lambda: NOW)
    state.publish(snapshot() if shown is None else shown)
    return create_app(
        AppDeps(
            pipeline=lambda: pipeline,
            auth=Authenticator(keys, host=host),
            state=state,
            ledger=ledger or StandInLedger(),
            metrics=Metrics(),
            server=ServerSettings(max_body_bytes=max_body_bytes),
            reload=reload,
            clock=lambda: NOW,
            wall_clock=lambda: 1_800_000_000.0,
        )
    )


@asynccontextmanager
async def served(app: FastAPI, http: Any = "httptools", limit_concurrency: int | None = None) -> AsyncIterator[str]:
    """The application on a free port of the loopback; gives the base URL."""
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=http,
            ws="none",
            lifespan="off",
            log_level="critical",
            limit_concurrency=limit_concurrency,
            timeout_graceful_shutdown=1,
        )
    )
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    task = asyncio.create_task(server.serve([listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()
