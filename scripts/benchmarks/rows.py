"""All rows of the engine benchmark, by the names of `--only`."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from scripts.benchmarks.bench import MANY_SLOTS, SLOTS, Bench
from scripts.benchmarks.decision_rows import decisions, many_labels, questions, singles
from scripts.benchmarks.generation_rows import gaps, generation, receipts


async def _generation_at_8(bench: Bench) -> None:
    await generation(bench, SLOTS)


async def _generation_at_32(bench: Bench) -> None:
    await generation(bench, MANY_SLOTS)


ROWS: Final[Mapping[str, Callable[[Bench], Awaitable[None]]]] = {
    "decisions": decisions,
    "labels77": many_labels,
    "questions": questions,
    "singles": singles,
    "receipts": receipts,
    "gaps": gaps,
    "generation8": _generation_at_8,
    "generation32": _generation_at_32,
}
"""In the order that starts servers the least often. `decisions` measures the floor too, `generation32` memory and
Python's share."""
