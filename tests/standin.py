"""A stand-in provider: speaks the OpenAI dialect, counts what it did and what that cost, misbehaves when told to.

In a test: `async with StandIn() as provider:` (a port, or `StandIn(uds=...)` for a stand-in engine). As a program,
for end-to-end proofs: `python -m tests.standin --port 0`, which prints its URL; `GET /counts` tells what it counted.
"""

import argparse
import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Mood = Literal[
    "well",
    "bad_request",
    "unknown_model",
    "too_large",
    "unauthorized",
    "rate_limited",
    "server_error",
    "overloaded",
    "garbage",
    "not_an_object",
    "no_choices",
    "half_body",
    "hang",
    "slow_to_write",
    "error_in_200",
    "error_event_first",
    "error_event_later",
    "half_stream",
    "silent_stream",
    "stream_without_done",
    "no_usage",
    "redirect",
    "hang_up",
]

INPUT_USD = 2.0
OUTPUT_USD = 8.0
"""Per million tokens: what the stand-in charges unless told otherwise."""


@dataclass
class Served:
    """What one model has answered. Money is what a provider would put on the bill."""

    calls: int = 0
    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0


@dataclass
class StandIn:
    """`moods` are used up one per call, then `mood` holds. `text` is what it answers, word by word.

    `prices`: model -> (input, output) in US dollars per million tokens. Prompt tokens are characters / 4.
    """

    uds: str | None = None
    host: str = "127.0.0.1"
    port: int = 0
    text: str = "The answer is forty two."
    mood: Mood = "well"
    moods: list[Mood] = field(default_factory=list)
    retry_after: str | None = None
    location: str = ""
    """Where mood `redirect` points to."""
    prices: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    seconds_per_token: float = 0.0
    reply: Callable[[str, Mapping[str, Any]], Any] | None = None
    """(path, body) -> the whole payload, where the usual one does not do."""
    served: dict[str, Served] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: Counter[str] = field(default_factory=Counter)
    left: int = 0
    """How many callers went away before they had everything."""
    open_streams: int = 0
    address: str = ""
    """`http://127.0.0.1:PORT/v1`, or `unix:PATH`."""

    def __post_init__(self) -> None:
        self.caller_left = asyncio.Event()
        self.called = asyncio.Event()
        self.hold = asyncio.Event()
        """Set to let `hang`, `slow_to_write` and `silent_stream` go on."""
        self._server: uvicorn.Server | None = None

    @property
    def calls(self) -> int:
        return sum(self.paths.values())

    @property
    def usd(self) -> float:
        return sum(served.usd for served in self.served.values())

    async def __aenter__(self) -> "StandIn":
        config = uvicorn.Config(self.app(), log_level="critical", lifespan="off", ws="none")
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        if self.uds:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(self.uds)
            self.address = f"unix:{self.uds}"
        else:
            # asyncio turns Nagle's algorithm off only where the socket says that it is TCP
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self.host, self.port))
            self.address = f"http://{self.host}:{listener.getsockname()[1]}/v1"
        listener.listen(1024)
        await server.startup([listener])
        self._server = server
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stop listening and drop every connection at once, as a crash would."""
        server, self._server = self._server, None
        if server is None:
            return
        for listener in server.servers:
            listener.close()
        for connection in list(server.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        tasks = list(server.server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def app(self) -> Starlette:
        paths = ("chat/completions", "completions", "decisions", "labels", "classify")
        routes = [Route(f"/v1/{path}", self._answer, methods=["POST"]) for path in paths]
        return Starlette(routes=[*routes, Route("/counts", self._counts)])

    async def _counts(self, _: Request) -> Response:
        served = {model: vars(one) for model, one in self.served.items()}
        return JSONResponse({"calls": self.calls, "left": self.left, "usd": self.usd, "models": served})

    async def _answer(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.paths[request.url.path.removeprefix("/v1")] += 1
        self.served.setdefault(body["model"], Served()).calls += 1
        self.called.set()
        mood = self.moods.pop(0) if self.moods else self.mood
        if mood in ("hang", "slow_to_write"):
            await self._wait_or_leave(request)
        if mood == "hang_up":
            return Response(b"x", headers={"content-length": "1000", "content-type": "application/json"})
        refusal = self._refusal(mood)
        if refusal is not None:
            return refusal
        if body.get("stream"):
            return StreamingResponse(self._events(request, body, mood), media_type="text/event-stream")
        return self._whole(request, body, mood)

    async def _wait_or_leave(self, request: Request) -> None:
        """Wait until `hold` is set; notice a caller that leaves meanwhile."""
        waiting = asyncio.ensure_future(self.hold.wait())
        leaving = asyncio.ensure_future(self._until_left(request))
        done, pending = await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if leaving in done and waiting not in done:
            self._note_leaving()

    @staticmethod
    async def _until_left(request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    def _note_leaving(self) -> None:
        self.left += 1
        self.caller_left.set()

    def _refusal(self, mood: Mood) -> Response | None:
        statuses: dict[str, tuple[int, str, str | None]] = {
            "bad_request": (400, "temperature must be at most 2", "invalid_value"),
            "unknown_model": (404, "The model does not exist or you do not have access to it", "model_not_found"),
            "too_large": (413, "Request body too large", None),
            "unauthorized": (401, "Incorrect API key provided: sk-se***ret", "invalid_api_key"),
            "rate_limited": (429, "Rate limit reached", "rate_limit_exceeded"),
            "server_error": (500, "The server had an error", None),
            "overloaded": (503, "Overloaded", None),
        }
        extra = {"retry-after": self.retry_after} if self.retry_after is not None else {}
        if mood in statuses:
            status, message, code = statuses[mood]
            error = {"message": message, "type": "some_error", "param": None, "code": code}
            return JSONResponse({"error": error}, status, extra)
        if mood == "redirect":
            return Response(status_code=307, headers={"location": self.location})
        if mood == "garbage":
            return Response(b"<html>oops</html>", media_type="application/json")
        if mood == "not_an_object":
            return JSONResponse(["surprise"])
        if mood == "error_in_200":
            return JSONResponse({"error": {"message": "quota of the day is used up", "code": 429}})
        return None

    def _whole(self, request: Request, body: Mapping[str, Any], mood: Mood) -> Response:
        path = request.url.path.removeprefix("/v1")
        usage = self._usage(body, len(self.text.split()))
        if self.reply is not None:
            payload = self.reply(path, body)
        else:
            name = "message" if path.startswith("/chat") else "text"
            content: Any = {"role": "assistant", "content": self.text} if name == "message" else self.text
            choice = {"index": 0, name: content, "finish_reason": "stop"}
            payload = {"id": "cmpl-1", "object": path, "model": body["model"], "choices": [choice]}
        if mood == "no_choices":
            payload = {"id": "cmpl-1", "object": path}
        if mood != "no_usage":
            payload = {**payload, "usage": usage}
        self._bill(body, usage)
        raw = orjson.dumps(payload)
        if mood == "half_body":
            return StreamingResponse(
                _half(raw), headers={"content-length": str(len(raw))}, media_type="application/json"
            )
        return Response(raw, media_type="application/json")

    async def _events(self, request: Request, body: Mapping[str, Any], mood: Mood) -> AsyncIterator[bytes]:
        self.open_streams += 1
        words = [word + " " for word in self.text.split()]
        sent = 0
        finished = False
        try:
            if mood == "error_event_first":
                yield _event({"error": {"message": "the model is gone", "type": "server_error", "code": 500}})
                return
            for index, word in enumerate(words):
                if self.seconds_per_token:
                    await asyncio.sleep(self.seconds_per_token)
                yield _event(_chunk(body, {"content": word}, None))
                sent += 1
                if index == len(words) // 2 and mood in _BREAKS:
                    yield _BREAKS[mood]
                    return
                if index == len(words) // 2 and mood == "silent_stream":
                    await self.hold.wait()
            yield self._ending(body, mood, len(words))
            finished = True
        except (asyncio.CancelledError, GeneratorExit):
            self._note_leaving()
            raise
        finally:
            self.open_streams -= 1
            if sent:
                self._bill(body, self._usage(body, sent), answered=finished)

    def _ending(self, body: Mapping[str, Any], mood: Mood, completion_tokens: int) -> bytes:
        parts = [_event(_chunk(body, {}, "stop"))]
        if mood != "no_usage" and (body.get("stream_options") or {}).get("include_usage"):
            usage = self._usage(body, completion_tokens)
            parts.append(_event({**_chunk(body, None, None), "choices": [], "usage": usage}))
        return b"".join(parts) + (b"" if mood == "stream_without_done" else b"data: [DONE]\n\n")

    def _usage(self, body: Mapping[str, Any], completion_tokens: int) -> dict[str, int]:
        prompt = max(1, len(orjson.dumps(body.get("messages", body.get("prompt", body.get("input", ""))))) // 4)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt + completion_tokens,
        }

    def _bill(self, body: Mapping[str, Any], usage: Mapping[str, int], *, answered: bool = True) -> None:
        served = self.served[body["model"]]
        input_usd, output_usd = self.prices.get(body["model"], (INPUT_USD, OUTPUT_USD))
        served.answers += answered
        served.prompt_tokens += usage["prompt_tokens"]
        served.completion_tokens += usage["completion_tokens"]
        served.usd += (usage["prompt_tokens"] * input_usd + usage["completion_tokens"] * output_usd) / 1e6


_BREAKS: Mapping[str, bytes] = {
    "half_stream": b": so long\n\n",
    "error_event_later": b'data: {"error": {"message": "out of memory", "type": "server_error"}}\n\ndata: [DONE]\n\n',
}
"""What a stream that breaks sends in the middle before it ends."""


async def _half(raw: bytes) -> AsyncIterator[bytes]:
    yield raw[: len(raw) // 2]


def _event(payload: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def _chunk(body: Mapping[str, Any], delta: Mapping[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {
        "id": "cmpl-1",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": body["model"],
        "choices": [choice],
    }


async def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seconds-per-token", type=float, default=0.0)
    arguments = parser.parse_args()
    async with StandIn(
        host=arguments.host, port=arguments.port, seconds_per_token=arguments.seconds_per_token
    ) as provider:
        print(provider.address, flush=True)  # noqa: T201 - the one thing its starter waits for
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
