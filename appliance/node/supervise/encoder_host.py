"""The node's one encoder program: started when there is work for it, asked to train, watched for what it serves.

What it serves becomes targets that requests can name.
"""

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypedDict

import httpx
import structlog

from appliance.core import Ability, Target
from appliance.engines.base import Placement
from appliance.engines.encoder import build_encoder_placement, has_encoder_work
from appliance.errors import Unavailable
from appliance.node.supervise.engine_supervisor import EngineSupervisor
from appliance.node.supervise.status import StatusPublisher
from appliance.node.supervise.supervisor import Supervisor
from appliance.telemetry.background import GuardedTask

_START_SECONDS: Final = 60.0
_ANSWER_SECONDS: Final = 600.0
"""Evaluating 200,000 texts takes minutes."""
_WATCH_SECONDS: Final = 5.0
_WATCH_TRAINING_SECONDS: Final = 0.5
_CLASSIFIES: Final[frozenset[Ability]] = frozenset({"classify", "decisions"})
_EMBEDS: Final[frozenset[Ability]] = frozenset({"embeddings"})

_log = structlog.get_logger(__name__)


class _ServedModel(TypedDict):
    name: str
    max_tokens: int | None


class _Served(TypedDict):
    """The program's answer to `/v1/served`."""

    models: list[_ServedModel]
    classifiers: list[str]
    is_training: bool


@dataclass(frozen=True, slots=True)
class EncoderHostReply:
    """What the program answered: an HTTP status and a JSON body."""

    status: int
    body: bytes
    retry_after: str | None = None


class EncoderHost:
    """Starts, asks and watches the encoder program. Everything is called on the event loop."""

    def __init__(self, supervisor: Supervisor, status: StatusPublisher, home: Path, threads: int) -> None:
        self._supervisor, self._status = supervisor, status
        self._home = home
        self._placement: Placement = build_encoder_placement(home, threads)
        self._engine: EngineSupervisor | None = None
        self._client: httpx.AsyncClient | None = None
        self._watching: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    async def start_if_needed(self) -> None:
        """Start the program if a classifier or an embedding model lies in the data directory."""
        if await asyncio.to_thread(has_encoder_work, self._home):
            self._start()

    async def aclose(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    async def ask(self, method: str, path: str, body: bytes = b"") -> EncoderHostReply:
        """Ask the program, which is started if it is not running. Raises Unavailable when it does not answer."""
        engine = self._start()
        try:
            async with asyncio.timeout(_START_SECONDS):
                await engine.wait_for(lambda lifecycle: lifecycle.phase in ("ready", "failed"))
        except TimeoutError:
            pass  # the phase below says why
        if engine.lifecycle.phase != "ready":
            reason = engine.lifecycle.reason or "it is not ready yet"
            raise Unavailable(f"the encoder program cannot answer: {reason}; try again", retry_after_seconds=5)
        try:
            assert self._client is not None
            response = await self._client.request(method, path, content=body)
        except httpx.HTTPError as error:
            raise Unavailable(
                f"the encoder program did not answer ({type(error).__name__}); try again", retry_after_seconds=5
            ) from error
        if method != "GET":
            await self._refresh_targets()
            self._changed.set()
        return EncoderHostReply(response.status_code, response.content, response.headers.get("retry-after"))

    def _start(self) -> EngineSupervisor:
        if self._engine is None:
            self._status.set_served_targets(self._placement.target, ())
            self._engine = self._supervisor.add(self._placement)
            transport = httpx.AsyncHTTPTransport(uds=self._socket, verify=False)
            self._client = httpx.AsyncClient(
                transport=transport, base_url="http://encoders", timeout=_ANSWER_SECONDS, trust_env=False
            )
            self._watching = asyncio.create_task(
                GuardedTask("encoders", self._watch, self._status).run(), name="encoders"
            )
        return self._engine

    @property
    def _address(self) -> str:
        assert self._engine is not None
        return self._engine.target.address

    @property
    def _socket(self) -> str:
        return self._address.removeprefix("unix:")

    async def _watch(self) -> None:
        """Keep the targets as the program reports them: models are pulled, and trainings end, at any time."""
        while True:
            pause = _WATCH_SECONDS
            engine = self._engine
            assert engine is not None
            await engine.wait_for(lambda lifecycle: lifecycle.phase == "ready")
            if await self._refresh_targets():
                pause = _WATCH_TRAINING_SECONDS
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._changed.wait()

    async def _refresh_targets(self) -> bool:
        """Publish what is served. Returns whether a training is under way."""
        assert self._client is not None
        try:
            response = await self._client.get("/v1/served")
            served: _Served = response.json()
            targets = tuple(_list_targets(served, self._address))
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            _log.warning("the encoder program does not say what it serves", reason=repr(error))
            return False
        self._status.set_served_targets(self._placement.target, targets)
        return bool(served["is_training"])


def _list_targets(served: _Served, address: str) -> list[Target]:
    models = [
        _target(f"onsite/{one['name']}", one["name"], address, _EMBEDS, one["max_tokens"]) for one in served["models"]
    ]
    names = served["classifiers"]
    return models + [_target(f"classifier/{name}", name, address, _CLASSIFIES, None) for name in names]


def _target(name: str, model: str, address: str, abilities: frozenset[Ability], tokens: int | None) -> Target:
    return Target(
        name=name,
        location="onsite",
        dialect="openai",
        address=address,
        model=model,
        abilities=abilities,
        context_tokens=tokens,
    )
