"""The encoder program as the control plane sees it: one process for all embedding models and classifiers of a node."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from appliance.catalog import EngineKind, ModelSpec, Variant
from appliance.core import Ability
from appliance.engines.base import EngineDefaults, EngineMemory, EngineShape, Placement, build_command_line
from appliance.engines.llamacpp import LlamaCpp

MODEL: Final = "encoders"
"""What its placement is called. It is no model itself: what it serves are rows of their own."""
CLASSIFIERS: Final = "classifiers"
"""Folder of the trained classifiers in the data directory."""
_MODELS: Final = "models"
_PROGRAM_BYTES: Final = 180_000_000
"""Interpreter, numerical libraries and a head or two. Measured: 148 MB with a head of 77 labels."""
_WEIGHTS_BYTES: Final = 120_000_000
"""A small encoder in int8 with its run-time buffers, and static vectors."""
_EXIT_SECONDS: Final = 3.0


class Encoder(EngineDefaults):
    """`python -m appliance.encoders`."""

    @property
    def kind(self) -> EngineKind:
        return "encoder"

    @property
    def permanent_exits(self) -> frozenset[int]:
        """2: bad arguments, or a folder that cannot be made."""
        return frozenset({2})

    def build_argv(
        self, python: str, placement: Placement, *, socket: Path, parent_guard_fd: int, drain_seconds: float
    ) -> list[str]:
        """`placement.path` is the data directory."""
        return build_command_line(
            [python, "-m", "appliance.encoders"],
            {
                "--uds": socket,
                "--data": placement.path / CLASSIFIERS,
                "--models": placement.path / _MODELS,
                "--threads": placement.shape.threads,
                "--drain-seconds": max(0.0, drain_seconds - _EXIT_SECONDS),
                "--parent-guard-fd": parent_guard_fd,
            },
        )

    def build_environment(self, placement: Placement, folder: Path) -> Mapping[str, str]:
        """Matrices are small here: threads of a numerical library would only wait for each other."""
        return {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

    def find_crash_reason(self, lines: Sequence[str]) -> str:
        return LlamaCpp().find_crash_reason(lines)

    def estimate_memory(
        self, model: ModelSpec, variant: Variant, *, context_tokens: int, sequences: int
    ) -> EngineMemory:
        return EngineMemory(variant.size_bytes, 0, 0, _PROGRAM_BYTES)

    def list_abilities(self, model: ModelSpec) -> frozenset[Ability]:
        return frozenset(model.abilities) & {"embeddings"}


def build_encoder_placement(home: Path, threads: int) -> Placement:
    """The one encoder program of the node whose data directory is `home`."""
    return Placement(
        model=MODEL,
        variant="program",
        engine="encoder",
        path=home,
        shape=EngineShape(threads, 0, 1, 0, 0),
        memory=EngineMemory(_WEIGHTS_BYTES, 0, 0, _PROGRAM_BYTES),
        abilities=frozenset(),
        reasons=("started for embedding models and classifiers",),
    )


def has_encoder_work(home: Path) -> bool:
    """Whether there is anything for an encoder program: a classifier, or an embedding model that was pulled."""
    if any((home / CLASSIFIERS).glob("*/serving.json")):
        return True
    return any(_embeds(path.parent) for path in (home / _MODELS).glob("*/*/tokenizer.json"))


def _embeds(folder: Path) -> bool:
    """A folder whose configuration names a class of language model is another engine's."""
    if (folder / "model.onnx").is_file():
        return True
    try:
        return '"architectures"' not in (folder / "config.json").read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return (folder / "model.safetensors").is_file()
