"""The appliance as its users reach it, through the whole gateway, and, for diagnosis, its engine's own socket."""

import contextlib
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import psutil

from scripts.benchmarks.clients import at_once, matches
from scripts.benchmarks.peers.base import Decided, Method
from scripts.benchmarks.peers.installing import PeerMissing, Say
from scripts.benchmarks.peers.processes import Server, Setup, connect
from scripts.benchmarks.workloads import Decisions, Receipts
from tests.running import running_node

START_SECONDS: Final = 300.0


class Ours:
    name = "ours"
    any_length: Mapping[str, Any] = {"ignore_eos": True}

    def __init__(self) -> None:
        self.methods: Mapping[str, Method] = {
            "one call": self.one_call,
            "one call, short": self.one_call_short,
            "single calls": self.single_calls,
        }
        self._fillers: dict[tuple[str, ...], int] = {}

    def prepare(self, say: Say) -> None:
        """Nothing: what runs this is installed."""

    @contextlib.asynccontextmanager
    async def start(self, setup: Setup) -> AsyncIterator[Server]:
        """A node with the whole gateway; sequences and context are as it plans them itself."""
        config = f"[engine]\nthreads = {setup.threads}\n"
        with contextlib.ExitStack() as stack:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            if setup.model is None:
                _borrow_models(home)
            else:
                config += f'model = "{setup.model}"\n'
            try:
                node = stack.enter_context(running_node(home, config=config, seconds=START_SECONDS))
            except RuntimeError as error:
                raise PeerMissing(f"{self.name}: {error}") from error
            async with connect(node.url) as session:
                yield Server(self.name, session, "auto", node.engine_pids, node.seconds_to_ready)

    async def one_call(self, server: Server, work: Decisions, concurrency: int) -> Decided:
        """All texts in one request, whatever `concurrency` is."""
        return await self._batch(server, work, {})

    async def one_call_short(self, server: Server, work: Decisions, concurrency: int) -> Decided:
        """The same with the layout that has fewer tokens between a text and its label."""
        return await self._batch(server, work, {"layout": "short"})

    async def _batch(self, server: Server, work: Decisions, more: Mapping[str, Any]) -> Decided:
        question = await self._question(server, work)
        body = {"model": server.model, "inputs": work.texts, "questions": [question], **more}
        reply = await server.post("/v1/decisions/batch", body)
        failed = [row["error"] for row in reply["results"] if "error" in row]
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(work.texts)} texts got no answer: {failed[0]}")
        return _decided([row["answers"][0]["choice"] for row in reply["results"]], [reply["usage"]])

    async def single_calls(self, server: Server, work: Decisions, concurrency: int) -> Decided:
        question = await self._question(server, work)

        async def one(text: str) -> Any:
            return await server.post("/v1/decisions", {"model": server.model, "input": text, "questions": [question]})

        replies = await at_once(work.texts, concurrency, one)
        return _decided([reply["answers"][0]["choice"] for reply in replies], [reply["usage"] for reply in replies])

    async def extract(self, server: Server, work: Receipts, concurrency: int) -> Sequence[bool]:
        async def one(text: str) -> bool:
            body = {"model": server.model, "text": text, "schema": work.schema, "instructions": work.instructions}
            path = "/v1/extract"
            async with server.session.post(path, json={**body, "max_tokens": work.max_tokens}) as response:
                if response.status == 502:  # the gateway holds an answer back that does not match the schema
                    return False
                if response.status != 200:
                    raise RuntimeError(f"{server.name}: {response.status}: {(await response.text())[:300]}")
                return matches((await response.json())["object"], work)

        return await at_once(work.texts, concurrency, one)

    async def _question(self, server: Server, work: Decisions) -> Mapping[str, Any]:
        """The question, its instructions as long as it takes for the prompt to have the workload's length."""
        fillers = work.fillers
        if work.fillers:
            if work.labels not in self._fillers:
                body = {"model": server.model, "input": work.texts[0], "questions": [_choice(work, fillers)]}
                used: int = (await server.post("/v1/decisions", body))["usage"]["input_tokens"]
                self._fillers[work.labels] = max(0, fillers - (used - work.prompt_tokens))
            fillers = self._fillers[work.labels]
        return _choice(work, fillers)


def _choice(work: Decisions, fillers: int) -> Mapping[str, Any]:
    choices = [
        {"value": label, "description": about} for label, about in zip(work.labels, work.descriptions, strict=True)
    ]
    return {"type": "choice", "instructions": work.instructions_with(fillers), "choices": choices}


def _decided(labels: Sequence[str], usages: Sequence[Mapping[str, Any]]) -> Decided:
    cached = sum(usage["input_tokens_details"]["cached_tokens"] for usage in usages)
    return Decided(labels, sum(usage["input_tokens"] for usage in usages), cached)


def _borrow_models(home: Path) -> None:
    """What the user has pulled, variants that the product has made of it included."""
    shared = Path.home() / ".local/share/appliance/models"
    if not shared.is_dir():
        raise PeerMissing(f"{shared} does not exist: serve once, so that the product has chosen its variant")
    (home / "models").symlink_to(shared)


# The engine itself, behind the gateway.


def engine_session(server: Server) -> aiohttp.ClientSession:
    """A client of the engine's own unix socket."""
    command = psutil.Process(server.pids()[0]).cmdline()
    return connect(Path(command[command.index("--uds") + 1]))


async def score_directly(engine: aiohttp.ClientSession, work: Decisions) -> Decided:
    """The same decisions without the gateway: one call for all label scores."""
    body = {
        "messages": [{"role": "system", "content": work.system}],
        "label_sets": {"labels": work.labels},
        "items": [{"content": text, "labels": "labels"} for text in work.texts],
    }
    async with engine.post("/v1/labels", json=body) as response:
        response.raise_for_status()
        reply = await response.json()
    best = [max(row["labels"], key=lambda label: label["probability"])["label"] for row in reply["results"]]
    usage = reply["usage"]
    return Decided(best, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"])


async def prefill_directly(engine: aiohttp.ClientSession, prompts: Sequence[list[int]]) -> None:
    """Nothing but prompts: one token each is generated."""
    body = {"prompt": list(prompts), "max_tokens": 1, "temperature": 0}
    async with engine.post("/v1/completions", json=body) as response:
        response.raise_for_status()
        await response.read()


async def load_of(engine: aiohttp.ClientSession) -> Mapping[str, Any]:
    async with engine.get("/load") as response:
        found: Mapping[str, Any] = await response.json()
        return found
