"""A desk whose lines are answered by a stand-in, on a disk and with clocks that a test sets."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance.config import JobsSettings
from appliance.core import EngineLoad, EngineStatus, Snapshot, Target, Usage
from appliance.errors import Unauthorized
from appliance.jobs.manager import JobManager, new_batch_id
from appliance.jobs.models import Batch, BatchLine, BatchTerms, LineAnswer, StoredFile
from appliance.jobs.storage.files import new_file_id
from appliance.state import State

NOW = 1_800_000_000.0
CHAT = "/v1/chat/completions"
ENGINE = Target("onsite/small", "onsite", "openai", "unix:/nowhere", "small", abilities=frozenset({"chat"}))
HOSTED = Target(
    "cloud/big", "hosted", "openai", "http://127.0.0.1:9/v1", "big", frozenset({"chat"}), provider="cloud", region="EU"
)


def load(sequences: int = 4) -> EngineLoad:
    return EngineLoad(0, 0, sequences, 0, 0, 0, 0, 4096, 0, 0, 0, 500.0, {1: 100.0, 8: 200.0})


def line(number: int, text: str | None = None, **more: Any) -> str:
    body = {"temperature": 0, "messages": [{"role": "user", "content": text or f"question {number}"}]}
    return json.dumps({"custom_id": f"c{number}", "method": "POST", "url": CHAT, "body": body, **more})


def answered(one: BatchLine, location: Any = "onsite") -> LineAnswer:
    body = {"echo": one.body["messages"][0]["content"]}
    return LineAnswer(200, body, f"req-{one.number}", location, Usage(10, 2, 4), 0.5)


@dataclass
class Answers:
    """Answers with `reply`, at most as fast as `allow` lets it: None lets everything through."""

    reply: Callable[[BatchLine, BatchTerms], LineAnswer] = lambda one, terms: answered(one)
    allow: asyncio.Semaphore | None = None
    key_is_known: bool = True
    asked: list[tuple[int, ...]] = field(default_factory=list)
    terms: list[BatchTerms] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    together: bool = False

    @property
    def endpoints(self) -> Sequence[str]:
        return (CHAT,)

    def group_key(self, one: BatchLine) -> Hashable | None:
        return "all" if self.together else None

    async def execute(self, lines: Sequence[BatchLine], terms: BatchTerms) -> Sequence[LineAnswer]:
        self.asked.append(tuple(one.number for one in lines))
        self.terms.append(terms)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if not self.key_is_known:
                raise Unauthorized("API key 'k' is not in use any more")
            if self.allow is not None:
                await self.allow.acquire()
            else:
                await asyncio.sleep(0)
            return [self.reply(one, terms) for one in lines]
        finally:
            self.under_way -= 1


@dataclass
class Alerts:
    warnings: dict[tuple[str, str], str] = field(default_factory=dict)

    def warn(self, code: str, text: str, about: str = "") -> None:
        self.warnings[code, about] = text

    def clear(self, code: str, about: str = "") -> None:
        self.warnings.pop((code, about), None)


@dataclass
class Office:
    """Everything around a desk that a test may change."""

    home: Path
    answers: Answers = field(default_factory=Answers)
    config: JobsSettings = field(default_factory=lambda: JobsSettings(min_free_bytes=1000))
    free: int = 10**12
    free_then: int = 10**12
    """Once a batch's input was uploaded."""
    wall: float = NOW
    clock: float = 100.0
    targets: tuple[Target, ...] = (ENGINE,)
    alerts: Alerts = field(default_factory=Alerts)

    @asynccontextmanager
    async def desk(self) -> AsyncIterator[JobManager]:
        """Opened and started; closed as a stop of the node would."""
        state = State(lambda: self.clock)
        state.publish(
            Snapshot(self.clock, self.targets, {ENGINE.name: EngineStatus(ENGINE.name, "ready", 0.0, load())})
        )
        desk = await JobManager.open(
            self.config,
            self.home,
            line_handler=self.answers,
            state=state,
            alerts=self.alerts,
            clock=lambda: self.clock,
            wall_clock=lambda: self.wall,
            free=lambda _: self.free,
        )
        await desk.start()
        try:
            yield desk
        finally:
            await desk.aclose()

    async def upload(self, desk: JobManager, lines: Iterable[str | bytes], owner: str = "k") -> StoredFile:
        data = b"\n".join(one if isinstance(one, bytes) else one.encode() for one in lines)
        file_id = new_file_id()
        with desk.folder.receive_upload(file_id) as receiver:
            receiver.write(data)
            receiver.commit()
        file = StoredFile(file_id, owner, "in.jsonl", "batch", len(data), self.wall, None)
        await desk.store.add_file(file)
        return file

    async def batch(
        self, desk: JobManager, lines: Iterable[str | bytes], seconds: float = 86_400, **more: Any
    ) -> Batch:
        file = await self.upload(desk, lines)
        self.free = min(self.free, self.free_then)
        made = Batch(new_batch_id(), "k", CHAT, file.id, "24h", self.wall, self.wall + seconds, **more)
        return await desk.create(made)


async def until(true: Callable[[], bool | Awaitable[bool]], seconds: float = 20.0) -> None:
    """Other tasks and threads have to get on: this looks again after each of their turns."""
    async with asyncio.timeout(seconds):
        while True:
            found = true()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.005)


async def ended(desk: JobManager, batch: Batch) -> Batch:
    async def is_over() -> bool:
        found = await desk.store.get_batch(batch.id)
        return found is not None and found.is_over and desk.progress(batch.id) is None

    await until(is_over)
    found = await desk.store.get_batch(batch.id)
    assert found is not None
    return found


def rows(desk: JobManager, file_id: str | None) -> list[Mapping[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(row) for row in desk.folder.file_path(file_id).read_text().splitlines()]
