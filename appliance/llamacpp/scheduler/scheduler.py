"""What goes into the next step: decisions over numbers, with no llama.cpp and no clock in them.

A step computes first one token of every generating sequence, then pieces of prompts, then label forks, up to a budget.
Room in KV memory is promised when a sequence is admitted: all of its prompt and the first part of its output. The rest
comes from cells that others free, from cached prefixes, and at last from the youngest sequence, which is put back.
"""

from bisect import insort
from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from typing import Final

from appliance.llamacpp.decode.sequence import Sequence
from appliance.llamacpp.kv.prefix_cache import count_common_prefix

OUTPUT_RESERVE_TOKENS: Final = 64
"""Output promised at admission. Most answers are shorter than what max_tokens would reserve; longer ones take what is
free when they get there."""
WORTH_WAITING_TOKENS: Final = 32
"""A prompt waits for another that is computing at least this many of its tokens; for fewer, waiting costs more."""
TILE_TOKENS: Final = 64
"""llama.cpp's flash attention works on so many tokens at once, and takes a slow path for fewer: 63 tokens of a long
prompt take twice as long as 64, and 96 as long as 128."""
SLOW_STEP_TOKENS: Final = 32
"""The least part of a prompt, where a model is so slow that a tile takes seconds; less wastes the matrix kernels."""
BACKGROUND_STEP_SECONDS: Final = 0.04
"""Of a step in which nothing is urgent: what a reader that comes in its middle does not notice."""
BACKGROUND_AFTER_SECONDS: Final = 10.0
"""After so long without anything urgent no reader is expected, and steps are as long as is quickest."""
IDLE_PRIORITY: Final = 1 << 30
CROWDED_CACHE_TOKENS: Final = 2048
CACHED_SHARE: Final = 0.5
SLOT_MARGIN_TOKENS: Final = 64
"""Room to grow that makes moving into a slot worth its copy."""
SLOT_MIN_OUTPUT_TOKENS: Final = 8


class WaitQueue:
    """Waiting sequences: lower priority value first, then by start tag, then in order of arrival."""

    def __init__(self) -> None:
        self._waiting: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def list_in_order(self) -> tuple[Sequence, ...]:
        return tuple(self._waiting)

    def push(self, sequence: Sequence) -> None:
        """A sequence that was put back returns to its old place, since its rank says how long it has waited."""
        insort(self._waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)


def _rank(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.rank


def count_promised_tokens(sequence: Sequence) -> int:
    """Cells of the shared memory that an admitted sequence may still count on."""
    if sequence.slot >= 0:
        return 0
    return sequence.pending + min(sequence.remaining, OUTPUT_RESERVE_TOKENS)


def is_worth_a_slot(sequence: Sequence, slot_tokens: int, running: int) -> bool:
    """Whether a generating sequence should leave the shared memory: where others run too, each pays for all cells."""
    fits = sequence.length + min(sequence.remaining, SLOT_MARGIN_TOKENS) <= slot_tokens
    return running > 1 and fits and sequence.pending == 1 and sequence.remaining >= SLOT_MIN_OUTPUT_TOKENS


def count_charged_tokens(sequence: Sequence) -> int:
    """Tokens a request is charged with in fair queueing: its prompt and the first part of its output."""
    return sequence.length + min(sequence.remaining, OUTPUT_RESERVE_TOKENS)


def computes_shared_prefix(leader: Sequence, follower: Sequence, cached: int) -> bool:
    """Whether `leader` is computing a good part of what `follower` would compute, so that waiting for it saves work.

    `cached` is what `follower` finds in the prefix tree already.
    """
    if leader.pending <= 1 or leader.request.cache_salt != follower.request.cache_salt:
        return False
    # At least the last token of a prompt is computed by each for itself.
    shared = count_common_prefix(leader.tokens[: leader.length], follower.tokens[: follower.length - 1])
    return shared - cached >= WORTH_WAITING_TOKENS


def find_urgent_priority(running: Iterable[int], labels: int | None) -> int:
    """The least of the priorities of what runs: everything else holds still until that is done."""
    urgent = min(running, default=IDLE_PRIORITY)
    return urgent if labels is None else min(urgent, labels)


def plan_step_tokens(
    batch_tokens: int,
    decoding: int,
    readers: int,
    prefill_tokens_per_second: float,
    step_seconds: float,
    *,
    can_wait: bool = False,
) -> int:
    """Tokens one step may compute in the shared memory, `decoding` of them for sequences that generate there.

    `can_wait`: nothing in it is urgent, and a request that arrives meanwhile waits for its end: it is as short as pays.

    While `readers` streams are read, there or in slots, prompts and labels get about `step_seconds` of a step, so that
    a long prompt cannot stall them. An answer that is given whole is there sooner when all prompts that came with its
    own are computed first, in large pieces: a step reads all weights however few sequences it generates for, which
    costs 11 ms of CPU for one sequence of SmolLM2-135M in BF16 and 80 ms for 32.
    """
    if can_wait:
        tiles = max(1, int(prefill_tokens_per_second * BACKGROUND_STEP_SECONDS) // TILE_TOKENS)
        return max(min(batch_tokens, tiles * TILE_TOKENS), decoding + 1)
    batch_tokens = max(batch_tokens, decoding + 1)
    if not readers:
        return batch_tokens
    affordable = int(prefill_tokens_per_second * step_seconds)
    if 0 < affordable < SLOW_STEP_TOKENS // 2:
        return min(batch_tokens, decoding + SLOW_STEP_TOKENS)
    tiles = max((decoding + affordable) // TILE_TOKENS, -(-(decoding + SLOW_STEP_TOKENS) // TILE_TOKENS))
    return min(batch_tokens, tiles * TILE_TOKENS)


def limit_cached_tokens(context_tokens: int, crowded: bool) -> int:
    """How many cells unused prefixes may keep: a share of all, but while more work waits than a step takes, few.

    Attention passes every cell in use, whatever holds it: 4,000 idle ones make prompts and labels of SmolLM2-135M take
    40 % longer. A prefix that is forked again and again stays, as the least recently used go first.
    """
    kept = int(CACHED_SHARE * context_tokens)
    return min(kept, CROWDED_CACHE_TOKENS) if crowded else kept


def allot_prompt_tokens(
    tokens: int, prompts: int, prompt_priority: int, labels: int, label_priority: int | None
) -> int:
    """How many of `tokens` go to prompts, which need `prompts`, when `labels` wait too (priority None: none do).

    The more urgent take all they need. Equally urgent ones get half each, and what the others leave.
    """
    if label_priority is None or prompt_priority < label_priority:
        return min(prompts, tokens)
    left = max(0, tokens - labels)
    return min(prompts, max(left, tokens // 2) if prompt_priority == label_priority else left)


def plan_prefill_chunks(sequences: Iterable[Sequence], tokens: int, outputs: int) -> list[tuple[Sequence, int]]:
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


def choose_victim(running: Ordered[Sequence]) -> Sequence:
    """The sequence to preempt when KV cells run out: the one that ranks last. It waited least."""
    return max(running, key=_rank)


def choose_preempted(running: Ordered[Sequence], arrived: Sequence) -> Sequence | None:
    """The sequence to preempt for a more urgent one that waits; never one of the same priority."""
    last = max(running, key=_rank, default=None)
    return last if last is not None and last.request.priority > arrived.request.priority else None
