"""HTTP on one unix socket: requests in, replies and streams out, and clients that leave meanwhile."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass
from typing import Literal, Protocol, TypeVar

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from appliance.core.json_types import JsonObject
from appliance.errors import ApplianceError, ClientGone, EngineFailed, RequestError, Unavailable
from appliance.llamacpp.chat.prompts import PromptBuilder
from appliance.llamacpp.decode.constraints import GrammarCompiler
from appliance.llamacpp.kernels import Kernels
from appliance.llamacpp.server.generation import GenerationRequest, RunningGeneration, SequenceEngine
from appliance.llamacpp.server.labels_api import build_label_request, write_label_reply
from appliance.llamacpp.server.openai_replies import Kind, ReplyWriter
from appliance.llamacpp.server.openai_requests import build_chat_request, build_completion_request, check_model
from appliance.llamacpp.server.request_models import (
    ChatIn,
    CompletionIn,
    LabelsIn,
    SampledIn,
    TokenizeIn,
    parse_request,
)
from appliance.llamacpp.vocabulary import Vocabulary
from appliance.worker.body_limits import read_body
from appliance.worker.json_log import log
from appliance.worker.responses import EXCEPTION_HANDLERS, INTERNAL_ERROR, json_response, raw_json_response
from appliance.worker.server import ActiveRequests

MAX_BODY_BYTES = 10_000_000
INLINE_BODY_BYTES = 16_384
"""Up to here a request is tokenised on the event loop (below a millisecond); above, in a thread."""

Result = TypeVar("Result")
Phase = Literal["loading", "ok", "draining", "failed"]


class ServedModel(Vocabulary, Protocol):
    """What is needed of `Model` to serve it."""

    architecture: str
    context_tokens: int
    train_context_tokens: int
    sequences: int
    threads: int
    size_bytes: int
    n_params: int

    @property
    def sequence_context_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ServerContext:
    """All that exists once the model is loaded."""

    alias: str
    model: ServedModel
    engine: SequenceEngine
    prompts: PromptBuilder
    grammars: GrammarCompiler


class EngineGate:
    """Takes requests while it is open. Written by the program's life cycle alone, read by every request."""

    def __init__(self, *, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.max_body_bytes = max_body_bytes
        self.phase: Phase = "loading"
        self.reason = "the model is being loaded"
        self.context: ServerContext | None = None
        self.kernels = Kernels(reason="the model is being loaded")
        self.started = time.monotonic()
        self.requests = ActiveRequests()

    def open(self, loaded: ServerContext) -> None:
        self.context = loaded
        self.phase, self.reason = "ok", ""

    def close(self, phase: Phase, reason: str) -> None:
        """No new work. What runs goes on."""
        self.phase, self.reason = phase, reason

    def require_ready(self) -> ServerContext:
        """Raises Unavailable, with the reason, while no work is taken."""
        if self.phase != "ok" or self.context is None:
            if self.phase == "failed":
                raise EngineFailed(f"the engine has failed: {self.reason}; it is being restarted", status=503)
            raise Unavailable(f"the engine is {self.phase}: {self.reason}; try again", retry_after_seconds=2)
        return self.context


class EventStream(Response):
    """Server-sent events of one call. Owns its sequences: they are freed when it ends, however it ends.

    A failure after the first byte becomes an error event without `[DONE]`, so no client takes half an answer for whole.
    """

    media_type = "text/event-stream"

    def __init__(
        self, gate: EngineGate, running: RunningGeneration, events: AsyncGenerator[bytes], first: bytes
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "content-type": "text/event-stream; charset=utf-8"})
        del self.headers["content-length"]
        self._gate, self._running, self._events, self._first = gate, running, events, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._gate.requests.track():
            try:
                await _unless_gone(receive, self._send_all(send))
            except ClientGone:
                log("client_left", path=scope.get("path"))
            finally:
                self._running.cancel()
                await self._events.aclose()
                await self._running.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        last = b"data: [DONE]\n\n"
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except ApplianceError as error:
            log("stream_failed", code=error.code, reason=error.message)
            last = _event(error.to_openai())
        except Exception as error:  # the client must not take what it has for the whole
            log("bug", reason=f"{type(error).__name__}: {error}")
            last = _event(INTERNAL_ERROR.to_openai())
        await send({"type": "http.response.body", "body": last, "more_body": False})


class EngineEndpoints:
    """The endpoints of one engine."""

    def __init__(self, gate: EngineGate) -> None:
        self.gate = gate

    async def health(self, request: Request) -> Response:
        if self.gate.phase == "ok":
            return json_response({"status": "ok", "kernels": self.gate.kernels.summary})
        return json_response({"status": self.gate.phase, "reason": self.gate.reason}, 503)

    async def load(self, request: Request) -> Response:
        loaded = self._loaded()
        load = {
            **asdict(loaded.engine.report_load()),
            "model": loaded.alias,
            "threads": loaded.model.threads,
            "context_tokens": loaded.model.context_tokens,
            "uptime_seconds": time.monotonic() - self.gate.started,
        }
        # decode_tokens_per_second has numbers for keys
        return raw_json_response(orjson.dumps(load, option=orjson.OPT_NON_STR_KEYS))

    async def models(self, request: Request) -> Response:
        loaded = self._loaded()
        model = loaded.model
        meta = {
            "context_tokens": model.context_tokens,
            "sequences": model.sequences,
            "size_bytes": model.size_bytes,
            "parameters": model.n_params,
            "architecture": model.architecture,
            "train_context_tokens": model.train_context_tokens,
            "chat_template": loaded.prompts.template is not None,
            "vocabulary_size": model.vocabulary_size,
            "sequence_context_tokens": model.sequence_context_tokens,
            "abilities": sorted(loaded.prompts.reply_format.abilities),
            "tool_format": loaded.prompts.reply_format.tools,
            "reasoning_format": loaded.prompts.reply_format.reasoning,
        }
        row = {"id": loaded.alias, "object": "model", "created": 0, "owned_by": "local", "meta": meta}
        return json_response({"object": "list", "data": [row]})

    async def tokenize(self, request: Request) -> Response:
        loaded = self._loaded()
        body = await read_body(request, self.gate.max_body_bytes)
        call = parse_request(TokenizeIn, body)
        if (call.content is None) == (call.messages is None):
            raise RequestError("content: give exactly one of content and messages", param="content")

        def tokens() -> list[int]:
            if call.messages:
                return loaded.prompts.tokenize_chat(call.messages, call.tools)
            return loaded.prompts.tokenize_raw(call.content or "")

        found = await _off_loop(len(body), tokens)
        return json_response({"tokens": found, "count": len(found)})

    async def chat(self, request: Request) -> Response:
        loaded = self.gate.require_ready()
        body = await read_body(request, self.gate.max_body_bytes)
        call = parse_request(ChatIn, body)
        check_model(call.model, loaded.alias)
        generation = await _off_loop(len(body), lambda: build_chat_request(call, loaded.prompts, loaded.model))
        return await self._generate(request, loaded, "chat", call, generation)

    async def completions(self, request: Request) -> Response:
        loaded = self.gate.require_ready()
        body = await read_body(request, self.gate.max_body_bytes)
        call = parse_request(CompletionIn, body)
        check_model(call.model, loaded.alias)
        generation = await _off_loop(len(body), lambda: build_completion_request(call, loaded.prompts, loaded.model))
        return await self._generate(request, loaded, "completion", call, generation)

    async def labels(self, request: Request) -> Response:
        loaded = self.gate.require_ready()
        call = parse_request(LabelsIn, await read_body(request, self.gate.max_body_bytes))
        check_model(call.model, loaded.alias)

        async def reply() -> bytes:
            labels = await asyncio.to_thread(build_label_request, call, loaded.prompts, loaded.model)
            scores = await loaded.engine.score_labels(list(labels.items.values())) if labels.items else []
            return await asyncio.to_thread(lambda: orjson.dumps(write_label_reply(labels, scores, loaded.alias)))

        with self.gate.requests.track():
            return raw_json_response(await _unless_gone(request.receive, reply()))

    async def _generate(
        self, request: Request, loaded: ServerContext, kind: Kind, call: SampledIn, generation: GenerationRequest
    ) -> Response:
        usage_wanted = call.stream_options is not None and call.stream_options.include_usage
        writer = ReplyWriter.new(
            kind, loaded.alias, loaded.model, logprobs=generation.logprobs is not None, include_usage=usage_wanted
        )
        with self.gate.requests.track():
            running = await RunningGeneration.start(loaded.engine, loaded.model, loaded.grammars, generation)
            try:
                if call.stream:
                    events = _events(running, writer)
                    # The first event is awaited before the status is sent: what fails until then fails as a status.
                    first = await _unless_gone(request.receive, anext(events))
                    return EventStream(self.gate, running, events, first)
                choices = await _unless_gone(request.receive, running.collect())
            except BaseException:
                running.cancel()
                await running.aclose()
                raise
            await running.aclose()
            return json_response(writer.whole(choices, running.usage))

    def _loaded(self) -> ServerContext:
        """For reading only, so also while draining."""
        return self.gate.context or self.gate.require_ready()


def make_app(gate: EngineGate) -> Starlette:
    endpoints = EngineEndpoints(gate)
    return Starlette(
        routes=[
            Route("/health", endpoints.health, methods=["GET"]),
            Route("/load", endpoints.load, methods=["GET"]),
            Route("/v1/models", endpoints.models, methods=["GET"]),
            Route("/tokenize", endpoints.tokenize, methods=["POST"]),
            Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
            Route("/v1/completions", endpoints.completions, methods=["POST"]),
            Route("/v1/labels", endpoints.labels, methods=["POST"]),
        ],
        exception_handlers=EXCEPTION_HANDLERS,
    )


async def _events(running: RunningGeneration, writer: ReplyWriter) -> AsyncGenerator[bytes]:
    """The call's events. Those of one step leave as one piece; the opening waits for the first step."""
    opened: set[int] = set()
    async with aclosing(running.deltas()) as deltas:
        async for delta in deltas:
            piece = b""
            if delta.index not in opened:
                opened.add(delta.index)
                opening = writer.opening(delta.index)
                piece = _event(opening) if opening is not None else b""
            yield piece + b"".join(map(_event, writer.chunks(delta)))
    closing = writer.closing(running.usage)
    if closing is not None:
        yield _event(closing)


async def _unless_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """The work's result; when the client leaves first, the work is cancelled and ClientGone raised."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone("the client closed the connection before the reply was complete")
    finally:
        for one in (task, gone):
            one.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await one


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _off_loop(body_bytes: int, work: Callable[[], Result]) -> Result:
    return work() if body_bytes <= INLINE_BODY_BYTES else await asyncio.to_thread(work)


def _event(value: JsonObject) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
