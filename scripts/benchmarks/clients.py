"""What is asked in the same way of every server: OpenAI's chats, streams, and many calls at once."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jsonschema

from scripts.benchmarks.peers.processes import Server
from scripts.benchmarks.workloads import Chats, Receipts

Item = TypeVar("Item")
Answer = TypeVar("Answer")


async def at_once(items: Sequence[Item], most: int, call: Callable[[Item], Awaitable[Answer]]) -> list[Answer]:
    """Call for every item, `most` at a time; answers in order. The first failure ends it."""
    answers: list[Answer | None] = [None] * len(items)
    waiting = iter(enumerate(items))

    async def worker() -> None:
        for index, item in waiting:
            answers[index] = await call(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(most, len(items))):
                group.create_task(worker())
    except ExceptionGroup as errors:  # all say the same
        raise errors.exceptions[0] from None
    return answers  # type: ignore[return-value]


async def timed(work: Awaitable[Answer]) -> tuple[float, Answer]:
    began = time.perf_counter()
    answer = await work
    return time.perf_counter() - began, answer


async def generate(server: Server, chats: Chats, concurrency: int, extra: Mapping[str, Any]) -> int:
    """Tokens generated in all, as the server counts them. Raises RuntimeError where an answer is not full length."""

    async def one(messages: Any) -> int:
        body = {"model": server.model, "messages": messages, "max_tokens": chats.max_tokens, "temperature": 0}
        reply = await server.post("/v1/chat/completions", {**body, **extra})
        tokens: int = reply["usage"]["completion_tokens"]
        said = reply["choices"][0]["message"]["content"]
        if not 0 <= chats.max_tokens - tokens <= 1 or (tokens > 1 and not said):
            raise RuntimeError(f"{server.name} generated {tokens} tokens instead of {chats.max_tokens}")
        return tokens

    return sum(await at_once(chats.chats, concurrency, one))


def is_valid(text: str | None, receipts: Receipts) -> bool:
    """Whether a document's answer is JSON of the schema."""
    try:
        return matches(json.loads(text or ""), receipts)
    except ValueError:
        return False


def matches(value: Any, receipts: Receipts) -> bool:
    try:
        jsonschema.validate(value, receipts.schema)
    except jsonschema.ValidationError:
        return False
    return True


@dataclass(slots=True)
class Stream:
    """A running stream: the moments at which text arrived. Written by `read`."""

    moments: list[float] = field(default_factory=list)
    enough: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once it runs steadily."""

    async def read(self, server: Server, messages: Any, max_tokens: int, steady: int, extra: Mapping[str, Any]) -> None:
        body = {"model": server.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        async with server.session.post("/v1/chat/completions", json={**body, **extra}) as response:
            if response.status != 200:
                raise RuntimeError(f"{server.name}: {response.status}: {(await response.text())[:300]}")
            rest = b""
            async for piece in response.content.iter_any():
                *events, rest = (rest + piece).split(b"\n\n")
                if any(_has_text(event) for event in events):
                    self.moments.append(time.perf_counter())
                    if len(self.moments) >= steady:
                        self.enough.set()


def _has_text(event: bytes) -> bool:
    if not event.startswith(b"data: {"):
        return False
    payload = json.loads(event[6:])
    if "error" in payload:
        raise RuntimeError(f"the stream failed: {payload['error']}")
    return any((choice.get("delta") or {}).get("content") for choice in payload["choices"])
