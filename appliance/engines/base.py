"""What the control plane knows of an engine before it runs: where it is placed and what memory that takes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from pydantic import TypeAdapter, ValidationError

from appliance.catalog import EngineKind, ModelSpec, Variant
from appliance.core import Ability, EngineLoad
from appliance.core.json_types import JsonObject
from appliance.errors import BackendGarbage


@dataclass(frozen=True, slots=True)
class EngineShape:
    """How much an engine may do at once."""

    threads: int
    context_tokens: int
    """KV cells shared by all sequences."""
    sequences: int
    sequence_context_tokens: int
    """The longest one sequence may become; what vLLM calls max_model_len."""
    max_queued_requests: int


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """What an engine will hold, in bytes, part by part. Of an engine on GPUs: on each of its devices."""

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
class GpuShare:
    """What an engine takes of which GPUs. Every one of `devices` gives the same."""

    devices: tuple[str, ...]
    """UUIDs as NVML tells them (`GPU-...`, `MIG-...`), or indices where it tells none; as CUDA_VISIBLE_DEVICES takes
    them. There are tensor_parallel x data_parallel of them."""
    memory_utilization: float
    """Share of a device's total memory that the engine may hold, all parts together."""
    kv_cache_bytes: int
    """KV cache on each device. Its part of `EngineMemory`; it is passed to the engine, so that it need not measure."""
    max_batched_tokens: int
    """Tokens computed in one step, over all sequences."""
    tensor_parallel: int = 1
    """Each layer is split over so many devices."""
    data_parallel: int = 1
    """So many whole copies of the model, each on `tensor_parallel` devices."""
    dtype: str = "auto"
    """Of activations, in the engine's words; auto: what the checkpoint says."""
    kv_dtype: str = "auto"
    """Of keys and values, in the engine's words; auto: as `dtype`."""
    unified_memory: bool = False
    """The devices share the machine's RAM."""


@dataclass(frozen=True, slots=True)
class Placement:
    """One model, in one variant, on this machine."""

    model: str
    """The name the engine serves it by; its target is `onsite/MODEL`."""
    variant: str
    engine: EngineKind
    path: Path
    shape: EngineShape
    memory: EngineMemory
    abilities: frozenset[Ability]
    reasons: tuple[str, ...]
    """Why the figures are what they are, in the order in which they were decided."""
    quality: float | None = None
    """How good its answers are, from 0 to 1, if it was declared."""
    gpu: GpuShare | None = None
    """None: it computes on the processor. Then `shape.threads` count; on GPUs they do not."""
    settings: tuple[tuple[str, str], ...] = ()
    """Further options of the engine, each with its value, as the catalogue or the operator gives them
    (`--reasoning-parser`, `qwen3`); an empty value stands for an option that takes none."""

    @property
    def target(self) -> str:
        return f"onsite/{self.model}"


class LoadReader(Protocol):
    """Reads what one running engine tells of its load; may remember what it needs between two readings."""

    @property
    def path(self) -> str:
        """What is to be fetched from the engine."""

    def read(self, page: str, now: float) -> EngineLoad:
        """The page as it was at `now` (monotonic seconds). Raises BackendGarbage for what is no such page."""


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """A request for the least possible work, sent where nothing moves: whether the engine still computes."""

    path: str
    body: JsonObject


class EngineAdapter(Protocol):
    """A kind of inference server that can be launched. Pure: it reckons and words, the supervisor acts.

    `EngineDefaults` has what most of it is for an engine of our own.
    """

    @property
    def kind(self) -> EngineKind: ...

    @property
    def permanent_exits(self) -> frozenset[int]:
        """Exit codes before readiness that another start cannot mend."""

    @property
    def key_variable(self) -> str:
        """Name of the variable that it takes an API key from; empty: it asks for none, its folder is private."""

    def build_argv(
        self, python: str, placement: Placement, *, socket: Path, parent_guard_fd: int, drain_seconds: float
    ) -> list[str]:
        """The command line that serves `placement` on the unix socket, ends when `parent_guard_fd` reaches its end, and
        after SIGTERM to its first process ends by itself within `drain_seconds`."""

    def build_environment(self, placement: Placement, folder: Path) -> Mapping[str, str]:
        """Variables the program needs beside those that every engine gets. `folder` is private to this engine, and is
        emptied when it has ended."""

    def make_load_reader(self, placement: Placement) -> LoadReader:
        """A reader of its load, for one run of the engine."""

    def build_liveness_probe(self, placement: Placement) -> ProbeRequest | None:
        """What to ask when no counter moves; None: its load is true even when it hangs."""

    def build_warm_up(self, placement: Placement) -> ProbeRequest | None:
        """Work to begin with, from which its load reader learns how fast it is; None: it measures itself. Until it is
        measured an engine counts as slow, and requests that may go elsewhere do."""

    def parse_progress(self, lines: Sequence[str]) -> str:
        """What it is doing while it starts, from the last lines it wrote; empty if they do not say."""

    def find_crash_reason(self, lines: Sequence[str]) -> str:
        """Why it ended, from the last lines it wrote; empty if they do not say."""

    def shrink_placement(self, placement: Placement, crash_reason: str) -> Placement | None:
        """What to start instead where memory was too small for `placement`; None: that was not the matter, or nothing
        smaller is of use."""

    def can_sleep(self, placement: Placement) -> bool:
        """Whether it can give its memory back and keep its process."""

    def build_model_settings(self, model: ModelSpec) -> tuple[tuple[str, str], ...]:
        """Options that `model` needs whatever the machine (`Placement.settings` begins with them)."""

    def estimate_memory(
        self, model: ModelSpec, variant: Variant, *, context_tokens: int, sequences: int
    ) -> EngineMemory: ...

    def list_abilities(self, model: ModelSpec) -> frozenset[Ability]: ...


_LOAD: Final[TypeAdapter[EngineLoad]] = TypeAdapter(EngineLoad)


def read_load(payload: object) -> EngineLoad:
    """An engine's `/load` as a value. Raises BackendGarbage on anything else; unknown fields are left out."""
    try:
        return _LOAD.validate_python(payload)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise BackendGarbage(f"the engine's /load is not what it promises: {field}: {first['msg']}") from error


class LoadEndpointReader:
    """`/load` as our own engines tell it."""

    path = "/load"

    def read(self, page: str, now: float) -> EngineLoad:
        try:
            return read_load(json.loads(page))
        except ValueError as error:
            raise BackendGarbage(f"the engine's /load is not JSON: {error}") from error


class EngineDefaults:
    """What an engine of our own needs not say: its `/load` is true, and what it writes tells no progress."""

    @property
    def key_variable(self) -> str:
        return ""

    def build_environment(self, placement: Placement, folder: Path) -> Mapping[str, str]:
        return {}

    def make_load_reader(self, placement: Placement) -> LoadReader:
        return LoadEndpointReader()

    def build_liveness_probe(self, placement: Placement) -> ProbeRequest | None:
        return None

    def build_warm_up(self, placement: Placement) -> ProbeRequest | None:
        return None

    def parse_progress(self, lines: Sequence[str]) -> str:
        return ""

    def find_crash_reason(self, lines: Sequence[str]) -> str:
        return lines[-1] if lines else ""

    def shrink_placement(self, placement: Placement, crash_reason: str) -> Placement | None:
        return None

    def can_sleep(self, placement: Placement) -> bool:
        return False

    def build_model_settings(self, model: ModelSpec) -> tuple[tuple[str, str], ...]:
        return ()


def build_command_line(words: Sequence[str], options: dict[str, object]) -> list[str]:
    """`words`, then every option with its value."""
    return [*words, *(part for name, value in options.items() for part in (name, str(value)))]
