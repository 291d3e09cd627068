"""The CPU engine as the control plane sees it: its command line, its memory, its `/load`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from appliance.catalog import EngineKind, ModelSpec, Variant
from appliance.core import Ability
from appliance.engines.base import EngineDefaults, EngineMemory, Placement, build_command_line

_PASS_TOKENS: Final = 256
"""The engine computes so many tokens at once; a longer batch takes several passes."""
_SPARE_ROWS: Final = 32
"""Rows of logits that a step may read beside one for each running sequence; the compute graph holds each again."""
_CELL_ROUNDING_TOKENS: Final = 256
_ACTIVATION_WIDTHS: Final = 12
"""Rows as wide as the hidden state that one token needs at once (queries, keys, values, a feed-forward 4 times as wide,
residuals), in f32. Together with the other parts above what llama.cpp reserved for SmolLM2-135M."""
_PROGRAM_BYTES: Final = 130_000_000
"""Interpreter, libraries, vocabulary, graphs, compiled grammars, and the token embeddings that are read from the file
beside a copy in another order. Measured: 62 MB after imports, before a model is loaded."""

_EXIT_SECONDS: Final = 3.0
"""From the end of its drain to its exit the engine needs up to 2 s, in which clients get the end of their answers."""

ENVIRONMENT: Final[Mapping[str, str]] = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "300",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}
"""Threads that wait for each other look 300 times, some microseconds, and then sleep. There are about 1,100 such waits
in a step of SmolLM2-135M. Two threads, milliseconds a step, on an idle machine and beside a program that keeps a core:

    sequences   sleep at once   300 looks   OpenMP's own 300,000    one thread
           32         47 | 54     27 | 58                   27 | -     48 | 48
           16         34 | 32     17 | 40            18 | over 100     28 | 28
            1         15 | 12      8 | 17                    7 | -      9 | 9

The sequences held a few tokens each: with 220 apiece one thread took 80 ms of CPU for 32 (busy machine), for attention.
Beside others one thread is the quickest: `appliance.llamacpp.scheduler.thread_governor` sees to that. The policy is for
OpenMP libraries other than GNU's, which know no count. numpy's own threads would have nothing to do. One malloc
arena for all threads: what a thread frees serves the others too (5 MB after a schema), and almost all that allocates
holds Python's lock."""


class LlamaCpp(EngineDefaults):
    """`python -m appliance.llamacpp`."""

    @property
    def kind(self) -> EngineKind:
        return "llamacpp"

    @property
    def permanent_exits(self) -> frozenset[int]:
        """Exit codes that another start cannot mend: 2 bad arguments, 3 a model file that cannot be read."""
        return frozenset({2, 3})

    def build_argv(
        self, python: str, placement: Placement, *, socket: Path, parent_guard_fd: int, drain_seconds: float
    ) -> list[str]:
        """The command line that serves `placement` on the unix socket and ends when `parent_guard_fd` reaches its end.

        After SIGTERM the engine gives running requests up in time to end by itself within `drain_seconds`.
        """
        shape = placement.shape
        return build_command_line(
            [python, "-m", "appliance.llamacpp"],
            {
                "--model": placement.path,
                "--uds": socket,
                "--alias": placement.model,
                "--threads": shape.threads,
                "--context-tokens": shape.context_tokens,
                "--sequences": shape.sequences,
                "--max-queued-requests": shape.max_queued_requests,
                "--drain-seconds": max(0.0, drain_seconds - _EXIT_SECONDS),
                "--parent-guard-fd": parent_guard_fd,
                **dict(placement.settings),
            },
        )

    def build_environment(self, placement: Placement, folder: Path) -> Mapping[str, str]:
        return ENVIRONMENT

    def find_crash_reason(self, lines: Sequence[str]) -> str:
        """The last reason the engine logged (as JSON), or the last line of anything else, such as a traceback."""
        for line in reversed(lines):
            try:
                event = json.loads(line)
            except ValueError:
                return line
            if isinstance(event, dict) and event.get("reason"):
                return str(event["reason"])
        return ""

    def estimate_memory(
        self, model: ModelSpec, variant: Variant, *, context_tokens: int, sequences: int
    ) -> EngineMemory:
        """Bytes held once the engine is ready: f16 keys and values for every cell, sliding windows kept whole."""
        cells = -(-context_tokens // _CELL_ROUNDING_TOKENS) * _CELL_ROUNDING_TOKENS
        return EngineMemory(
            weights_bytes=variant.size_bytes,
            kv_bytes=2 * cells * model.layers * model.kv_elements_per_token_per_layer,
            buffers_bytes=_buffers_bytes(model, sequences, cells),
            program_bytes=_PROGRAM_BYTES,
        )

    def list_abilities(self, model: ModelSpec) -> frozenset[Ability]:
        """What the model can do, and what the engine does with any model that generates text."""
        own = frozenset(model.abilities) - {"vision", "embeddings"}
        if not own & {"chat", "completions"}:
            return frozenset()
        return own | {"completions", "labels", "json_schema", "logprobs"}


def _buffers_bytes(model: ModelSpec, sequences: int, cells: int) -> int:
    """The logits that are read and their double in the graph, shared and the slots', the attention mask (f16), and the
    activations."""
    logits = 2 * 4 * (sequences + _SPARE_ROWS + sequences) * model.vocabulary_tokens
    mask = 2 * _PASS_TOKENS * cells
    activations = 4 * _PASS_TOKENS * _ACTIVATION_WIDTHS * model.embedding
    return logits + mask + activations
