"""The real application over the real pipeline on a socket, with one stand-in behind it that speaks any dialect."""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

from appliance.api.app import AppDeps, create_app
from appliance.api.auth import Authenticator
from appliance.config import ServerSettings
from appliance.core import Target
from appliance.telemetry.metrics import Metrics
from tests.api.stand_ins import StandInLedger, served
from tests.providers.openai_api import OpenaiApi
from tests.providers.reached import SPOKEN, api_of, row_of, target_of
from tests.providers.served import Served
from tests.providers.speech import HELLO
from tests.router.scene import Scene, engine_target
from tests.wire.matrix.clients import Inbound, asking

Outbound = Literal["openai", "responses", "anthropic", "gemini", "engine"]
OUTBOUND: tuple[Outbound, ...] = (*SPOKEN, "engine")
ABILITIES = frozenset({"chat", "json_schema", "tools", "vision", "reasoning", "logprobs"})
HOSTED = """
[defaults]
max_wait_seconds = 1.0
latency_budget_seconds = 5.0

[[routes]]
name = "all"
targets = ["onsite", "hosted"]
"""


class EngineApi(OpenaiApi):
    """An engine of this node: OpenAI's dialect with fields of its own, and no key."""

    own = frozenset({"top_k", "min_p", "repetition_penalty", "cache_salt", "chat_template_kwargs", "thinking"})

    def wrong_with(self, path: str, body: dict[str, Any]) -> Iterable[str]:
        self.headers[-1].setdefault(self.key_header, "sk-secret")
        return [wrong for wrong in super().wrong_with(path, body) if "reasoning_content" not in wrong]


@dataclass
class Stage:
    url: str
    scene: Scene
    api: Served
    ask: Callable[[Any], Any]


@asynccontextmanager
async def staged(inbound: Inbound, outbound: Outbound) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(EngineApi(HELLO) if outbound == "engine" else api_of(outbound))
        url, scene = await stack.enter_async_context(node_over(_target(outbound, api)))
        ask = await stack.enter_async_context(asking(inbound, url))
        yield Stage(url, scene, api, ask)


@asynccontextmanager
async def node_over(*targets: Target, policy: str = HOSTED) -> AsyncIterator[tuple[str, Scene]]:
    """The application's address, and what is behind it."""
    scene = Scene(*targets, policy=policy)
    app = create_app(
        AppDeps(
            pipeline=lambda: scene.pipeline,
            auth=Authenticator((), host="127.0.0.1"),
            state=scene.state,
            ledger=StandInLedger(),
            metrics=Metrics(),
            server=ServerSettings(),
            reload=_nothing,
            clock=scene.now,
            wall_clock=scene.wall,
        )
    )
    try:
        async with served(app) as url:
            yield url, scene
    finally:
        await scene.aclose()


async def _nothing() -> dict[str, Any]:
    return {}


def _target(outbound: Outbound, api: Served) -> Target:
    if outbound == "engine":
        return engine_target(api.address, abilities=ABILITIES)
    return target_of(row_of(outbound, api.address))


@asynccontextmanager
async def fuzzed_node() -> AsyncIterator[tuple[str, list[Any], list[str]]]:
    """A node over an engine and a provider of each dialect, all bodies that they were sent, and what they refused of
    them: as the real ones they take what their SDKs' types allow."""
    sent: list[Any] = []
    wrongs: list[str] = []
    async with AsyncExitStack() as stack:
        targets = []
        for number, outbound in enumerate(OUTBOUND):
            api = await stack.enter_async_context(EngineApi(HELLO) if outbound == "engine" else api_of(outbound))
            api.bodies, api.wrongs = sent, wrongs
            targets.append(
                _target(outbound, api)
                if outbound == "engine"
                else target_of(row_of(outbound, api.address, name=f"p{number}"))
            )
        routes = [_OUT.format(name=target.name, number=number) for number, target in enumerate(targets)]
        url, scene = await stack.enter_async_context(node_over(*targets, policy="".join(routes) + HOSTED))
        # What is long past would not be believed: the engine is as ready in an hour as it is now.
        scene.publish(seen=scene.now() + 3600.0)
        yield url, sent, wrongs


OUT_HEADER = "x-out"
"""Its value is the place of the outbound dialect in `OUTBOUND` that a body is to leave by."""
_OUT = """
[[routes]]
name = "out-{number}"
match = {{ header = {{ "x-out" = "{number}" }} }}
targets = ["{name}"]
"""
