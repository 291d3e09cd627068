"""The node's one encoder program: started when there is something for it, asked for trainings, and watched for what it
serves, which becomes rows that requests can name."""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

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


@dataclass(frozen=True, slots=True)
class EncoderHostReply:
    """What the program answered: a status and a JSON body, whatever they are."""

    status: int
    body: bytes
    retry_after: str | None = None


class EncoderHost:
    """Everything is called on the event loop."""

    def __init__(self, supervisor: Supervisor, signals: StatusPublisher, home: Path, threads: int) -> None:
        self._supervisor, self._signals = supervisor, signals
        self._home = home
        self._placement: Placement = build_encoder_placement(home, threads)
        self._keeper: EngineSupervisor | None = None
        self._client: httpx.AsyncClient | None = None
        self._watching: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    async def start_if_needed(self) -> None:
        """Start the program where a classifier or an embedding model lies here."""
        if await asyncio.to_thread(has_encoder_work, self._home):
            self._start()

    async def aclose(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    async def ask(self, method: str, path: str, body: bytes = b"") -> EncoderHostReply:
        """Ask the program, which is started if it is not running. Raises Unavailable where it does not answer."""
        keeper = self._start()
        try:
            async with asyncio.timeout(_START_SECONDS):
                await keeper.wait_for(lambda life: life.phase in ("ready", "failed"))
        except TimeoutError:
            pass  # told below
        if keeper.lifecycle.phase != "ready":
            reason = keeper.lifecycle.reason or "it is not ready yet"
            raise Unavailable(f"the encoder program cannot answer: {reason}; try again", retry_after_seconds=5)
        try:
            assert self._client is not None
            response = await self._client.request(method, path, content=body)
        except httpx.HTTPError as error:
            raise Unavailable(
                f"the encoder program did not answer ({type(error).__name__}); try again", retry_after_seconds=5
            ) from error
        if method != "GET":
            await self._look()
            self._changed.set()
        return EncoderHostReply(response.status_code, response.content, response.headers.get("retry-after"))

    def _start(self) -> EngineSupervisor:
        if self._keeper is None:
            self._signals.set_served_targets(self._placement.target, ())
            self._keeper = self._supervisor.add(self._placement)
            transport = httpx.AsyncHTTPTransport(uds=self._socket, verify=False)
            self._client = httpx.AsyncClient(
                transport=transport, base_url="http://encoders", timeout=_ANSWER_SECONDS, trust_env=False
            )
            self._watching = asyncio.create_task(
                GuardedTask("encoders", self._watch, self._signals).run(), name="encoders"
            )
        return self._keeper

    @property
    def _address(self) -> str:
        assert self._keeper is not None
        return self._keeper.target.address

    @property
    def _socket(self) -> str:
        return self._address.removeprefix("unix:")

    async def _watch(self) -> None:
        """Keep the rows as the program tells them: models are pulled, and trainings end, at any time."""
        while True:
            pause = _WATCH_SECONDS
            keeper = self._keeper
            assert keeper is not None
            await keeper.wait_for(lambda life: life.phase == "ready")
            if await self._look():
                pause = _WATCH_TRAINING_SECONDS
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._changed.wait()

    async def _look(self) -> bool:
        """Publish what is served; whether a training is under way."""
        assert self._client is not None
        try:
            response = await self._client.get("/v1/served")
            told = response.json()
            targets = tuple(_rows(told, self._address))
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            _log.warning("the encoder program does not tell what it serves", reason=repr(error))
            return False
        self._signals.set_served_targets(self._placement.target, targets)
        return bool(told["is_training"])


def _rows(told: Mapping[str, Any], address: str) -> list[Target]:
    rows = []
    for model in told["models"]:
        name, tokens = model["name"], model["max_tokens"]
        rows.append(_target(f"onsite/{name}", name, address, _EMBEDS, tokens))
    for name in told["classifiers"]:
        rows.append(_target(f"classifier/{name}", name, address, _CLASSIFIES, None))
    return rows


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
