"""What the control plane knows of an engine before it runs: where it is placed and what memory that takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from appliance.catalog import EngineKind, ModelSpec, Variant
from appliance.core import Ability


@dataclass(frozen=True, slots=True)
class Shape:
    """How much an engine may do at once."""

    threads: int
    context_tokens: int
    """KV cells shared by all sequences."""
    sequences: int
    sequence_context_tokens: int
    """The longest one sequence may become."""
    max_queued_requests: int


@dataclass(frozen=True, slots=True)
class Memory:
    """What an engine will hold, in bytes, part by part."""

    weights_bytes: int
    kv_bytes: int
    buffers_bytes: int
    """Activations and logits of one step, reserved at start."""
    program_bytes: int
    """The interpreter and the libraries."""

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.buffers_bytes + self.program_bytes

    def __str__(self) -> str:
        return (
            f"{self.total_bytes:,} bytes (weights {self.weights_bytes:,} + KV {self.kv_bytes:,} "
            f"+ buffers {self.buffers_bytes:,} + program {self.program_bytes:,})"
        )


@dataclass(frozen=True, slots=True)
class Placement:
    """One model, in one variant, on this machine."""

    model: str
    """The name the engine serves it by; its target is `onsite/MODEL`."""
    variant: str
    engine: EngineKind
    path: Path
    shape: Shape
    memory: Memory
    abilities: frozenset[Ability]
    reasons: tuple[str, ...]
    """Why the figures are what they are, in the order in which they were decided."""
    quality: float | None = None
    """How good its answers are, from 0 to 1, where somebody has declared it."""

    @property
    def target(self) -> str:
        return f"onsite/{self.model}"


class Engine(Protocol):
    """A kind of inference server that can be launched. Pure: it reckons and words, the supervisor acts."""

    @property
    def kind(self) -> EngineKind: ...

    @property
    def permanent_exits(self) -> frozenset[int]:
        """Exit codes before readiness that another start cannot mend."""

    def argv(
        self, python: str, placement: Placement, *, socket: Path, leash_fd: int, drain_seconds: float
    ) -> list[str]:
        """The command line that serves `placement` on the unix socket, ends when `leash_fd` reaches its end, and
        after SIGTERM ends by itself within `drain_seconds`."""

    def environment(self) -> Mapping[str, str]:
        """Variables the program needs beside those that every engine gets."""

    def last_words(self, lines: Sequence[str]) -> str:
        """Why it ended, from the last lines it wrote; empty where they do not say."""

    def memory(self, model: ModelSpec, variant: Variant, *, context_tokens: int, sequences: int) -> Memory: ...

    def abilities(self, model: ModelSpec) -> frozenset[Ability]: ...


def command_line(words: Sequence[str], options: dict[str, object]) -> list[str]:
    """`words`, then every option with its value."""
    return [*words, *(part for name, value in options.items() for part in (name, str(value)))]
