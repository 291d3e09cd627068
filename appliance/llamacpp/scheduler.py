"""What goes into the next step: decisions over numbers, with no llama.cpp and no clock in them.

A step computes first one token of every generating sequence, then pieces of prompts, then label forks, up to a budget.
Room in KV memory is promised when a sequence is admitted: all of its prompt and the first part of its output. The rest
comes from cells that others free, from cached prefixes, and at last from the youngest sequence, which is put back.
"""

from bisect import insort
from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import Final

from appliance.llamacpp.prefix import common_prefix
from appliance.llamacpp.sequence import Sequence

OUTPUT_RESERVE_TOKENS: Final = 64
"""Output promised at admission. Most answers are shorter than what max_tokens would reserve; longer ones take what is
free when they get there."""
FOLLOW_TOKENS: Final = 32
"""A prompt waits for another that is computing at least this many of its tokens; for fewer, waiting costs more."""
LEAST_STEP_TOKENS: Final = 64
"""Smaller prefill batches than this waste the matrix kernels."""


class Line:
    """Waiting sequences: lower priority value first, then in order of arrival."""

    def __init__(self) -> None:
        self._waiting: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def in_order(self) -> tuple[Sequence, ...]:
        return tuple(self._waiting)

    def push(self, sequence: Sequence) -> None:
        """A sequence that was put back returns to its old place, since its number says how long it has waited."""
        insort(self._waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.priority, sequence.number


@dataclass(frozen=True, slots=True)
class Room:
    """KV cells: `capacity`, those in use by somebody running, and those promised but not yet used."""

    capacity: int
    used: int
    promised: int

    def fits(self, tokens: int) -> bool:
        return self.used + self.promised + tokens <= self.capacity


def promised_tokens(sequence: Sequence) -> int:
    """Cells that an admitted sequence may still count on."""
    return sequence.pending + min(sequence.remaining, OUTPUT_RESERVE_TOKENS)


def leads(leader: Sequence, follower: Sequence, cached: int) -> bool:
    """Whether `leader` is computing a good part of what `follower` would compute, so that waiting for it saves work.

    `cached` is what `follower` finds in the prefix tree already.
    """
    if leader.pending <= 1 or leader.request.cache_salt != follower.request.cache_salt:
        return False
    # At least the last token of a prompt is computed by each for itself.
    shared = common_prefix(leader.tokens[: leader.length], follower.tokens[: follower.length - 1])
    return shared - cached >= FOLLOW_TOKENS


def step_budget(batch_tokens: int, decoding: int, prefill_tokens_per_second: float, step_seconds: float) -> int:
    """Tokens one step may compute.

    While somebody is reading a stream, a step lasts about `step_seconds`, so that a long prompt cannot stall it.
    """
    if not decoding:
        return batch_tokens
    batch_tokens = max(batch_tokens, decoding + 1)
    if prefill_tokens_per_second <= 0:
        return min(batch_tokens, decoding + LEAST_STEP_TOKENS)
    affordable = int(prefill_tokens_per_second * step_seconds)
    return min(batch_tokens, decoding + max(LEAST_STEP_TOKENS, affordable))


def split_budget(tokens: int, prefill_pending: int, labels_waiting: bool) -> int:
    """How many of `tokens` go to prompts when label work waits too: half, or what the prompts need if that is less."""
    return min(prefill_pending, tokens // 2 if labels_waiting else tokens)


def share_prefill(sequences: Iterable[Sequence], tokens: int, outputs: int) -> list[tuple[Sequence, int]]:
    """Chunks of prompts in order of rank until `tokens` are given out; each sequence that ends needs an output row."""
    chunks: list[tuple[Sequence, int]] = []
    for sequence in sorted(sequences, key=_rank):
        if tokens <= 0 or outputs <= 0:
            break
        chunk = min(sequence.pending, tokens)
        chunks.append((sequence, chunk))
        tokens -= chunk
        outputs -= 1
    return chunks


def victim(running: Ordered[Sequence]) -> Sequence:
    """Who gives way when KV room runs out: the one that ranks last. It waited least, and has least to recompute."""
    return max(running, key=_rank)
