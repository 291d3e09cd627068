"""llama-cpp-python's own server: the same llama.cpp as ours, one request at a time."""

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from scripts.benchmarks.clients import at_once, is_valid
from scripts.benchmarks.peers.base import Decided, Method
from scripts.benchmarks.peers.installing import Environment, Say, installed, own_llama_cpp
from scripts.benchmarks.peers.llama_server import grammar
from scripts.benchmarks.peers.processes import Server, Setup, free_port, serving
from scripts.benchmarks.tokens import chat
from scripts.benchmarks.workloads import Decisions, Receipts

START_SECONDS: Final = 60.0
_END_TOKEN: Final = "2"
"""`<|im_end|>` of the benchmarked model: this server knows no ignore_eos."""


class LlamaCppServer:
    name = "llama_cpp.server"
    any_length: Mapping[str, Any] = {"logit_bias": {_END_TOKEN: -100}}

    def __init__(self) -> None:
        self.environment = Environment(self.name, (own_llama_cpp(),))
        self.methods: Mapping[str, Method] = {"grammar": _grammar}

    def prepare(self, say: Say) -> None:
        installed(self.environment, say)

    @contextlib.asynccontextmanager
    async def start(self, setup: Setup) -> AsyncIterator[Server]:
        port = free_port()
        threads = str(setup.threads)
        options = {"model": str(setup.model), "n_threads": threads, "n_threads_batch": threads, "flash_attn": "true"}
        options |= {"n_ctx": str(setup.slot_tokens), "logits_all": "false", "verbose": "false"}
        options |= {"host": "127.0.0.1", "port": str(port), "interrupt_requests": "false"}

        def command(folder: Path) -> list[str]:
            flags = [text for name, value in options.items() for text in (f"--{name}", value)]
            return [str(self.environment.python), "-m", "llama_cpp.server", *flags]

        started = serving(
            self.name,
            command,
            address=lambda folder: f"http://127.0.0.1:{port}",
            health="/v1/models",
            model="default",
            seconds=START_SECONDS,
        )
        async with started as server:
            yield server

    async def extract(self, server: Server, work: Receipts, concurrency: int) -> Sequence[bool]:
        wanted = {"type": "json_object", "schema": work.schema}

        async def one(text: str) -> bool:
            body = {"messages": chat(work.system, text), "response_format": wanted, "temperature": 0}
            reply = await server.post("/v1/chat/completions", {**body, "max_tokens": work.max_tokens})
            return is_valid(reply["choices"][0]["message"]["content"], work)

        return await at_once(work.texts, concurrency, one)


async def _grammar(server: Server, work: Decisions, concurrency: int) -> Decided:
    """As llama-server's; more than one request at once only waits."""
    return await grammar(server, work, 1)
