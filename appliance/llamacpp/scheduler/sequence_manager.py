"""Which sequences wait, which run, and their KV cells: admission, preemption, slots, cells for the next step.

`scheduler` decides, `kv_allocator` moves cells. Owned by the thread that steps.
"""

from collections import deque

from appliance.llamacpp.decode.sequence import Sequence
from appliance.llamacpp.fair_queue import FairQueue
from appliance.llamacpp.kv.capacity import BatchCapacity
from appliance.llamacpp.kv.prefix_cache import PrefixCache
from appliance.llamacpp.labels.scorer import LabelScorer
from appliance.llamacpp.model import LlamaModel
from appliance.llamacpp.scheduler.kv_allocator import KvAllocator
from appliance.llamacpp.scheduler.scheduler import (
    IDLE_PRIORITY,
    WaitQueue,
    choose_preempted,
    choose_victim,
    computes_shared_prefix,
    count_charged_tokens,
    count_promised_tokens,
    is_worth_a_slot,
)

Chunk = tuple[Sequence, int]
"""A sequence and how many tokens of its prompt the step computes."""


class SequenceManager:
    """The sequences of one model, waiting and running, beside its label calls."""

    def __init__(self, model: LlamaModel) -> None:
        self.model = model
        free_ids = list(range(model.sequence_ids))
        self.prefix_cache = PrefixCache(model, free_ids)
        self.kv = KvAllocator(model, self.prefix_cache, free_ids)
        self.fair_queue = FairQueue()
        self.wait_queue = WaitQueue()
        self.running: list[Sequence] = []
        self.urgent_priority = IDLE_PRIORITY
        """Priority of the most urgent of what is running."""
        self.suspects: deque[Sequence] = deque()
        """Sequences of a step that failed. Each runs alone until it has computed what it had, or has failed again."""
        self.label_scorer = LabelScorer(model, self.prefix_cache, free_ids, self.fair_queue, self.measure_capacity)

    def submit(self, sequence: Sequence) -> None:
        sequence.start_tag = self.fair_queue.assign_start_tag(
            sequence.request.cache_salt, count_charged_tokens(sequence)
        )
        self.wait_queue.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence that runs out, and free its cells."""
        self.running.remove(sequence)
        self.kv.release(sequence)
        if sequence in self.suspects:
            self.suspects.remove(sequence)

    def admit_waiting(self) -> None:
        """Start what waits, in order, as long as there is room. A more urgent one may take the place of another."""
        for sequence in self.wait_queue.list_in_order():
            if (
                self.select_runnable([sequence])
                and not self._waits_for_shared_prefix(sequence)
                and not self._start_or_preempt(sequence)
            ):
                return

    def _start_or_preempt(self, sequence: Sequence) -> bool:
        """Start a sequence, in the place of less urgent ones where that is needed; False when it has to wait."""
        while not self._try_start(sequence):
            last = (
                choose_victim(self.running)
                if self.running and self.suspects
                else choose_preempted(self.running, sequence)
            )
            if last is None:
                return False
            self.kv.cache_computed(last, self.count_unused_cells())
            self.preempt(last)
        return True

    def _waits_for_shared_prefix(self, sequence: Sequence) -> bool:
        if not self.model.forkable:
            return False
        cached = self.prefix_cache.count_cached(sequence.tokens[: sequence.length - 1], sequence.request.cache_salt)
        return any(computes_shared_prefix(leader, sequence, cached) for leader in self.running)

    def _try_start(self, sequence: Sequence) -> bool:
        """Give a sequence its id and cells if they fit; False when it has to wait."""
        if len(self.running) >= self.model.sequences or not self.prefix_cache.free_up_ids(1):
            return False
        self.kv.pin_cached_prefix(sequence)
        if not self.measure_capacity().fits(count_promised_tokens(sequence)) and (
            self.running or self.label_scorer.window_tokens
        ):
            self.kv.unpin_prefix(sequence)
            return False
        self.wait_queue.remove(sequence)
        self.fair_queue.advance(sequence.start_tag, count_charged_tokens(sequence))
        self.kv.assign_id(sequence)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
        self.running.append(sequence)
        return True

    def select_runnable(self, sequences: list[Sequence]) -> list[Sequence]:
        """Those that may be computed now: after a failed step the suspects, one by one; else the most urgent, for what
        can wait holds still beside what cannot."""
        if self.suspects:
            return [sequence for sequence in sequences if sequence is self.suspects[0]]
        if self.label_scorer.isolates_suspects:
            return []
        return [sequence for sequence in sequences if sequence.request.priority <= self.urgent_priority]

    def preempt(self, sequence: Sequence) -> None:
        """Preempt: the cells go, the tokens stay, and the line takes it back at its old place."""
        self.running.remove(sequence)
        self.kv.release(sequence)
        self.wait_queue.push(sequence)

    # Cells.

    def assign_slots(self) -> None:
        """Move sequences that generate into slots, and out where they have outgrown them."""
        slots = self.model.slots
        if slots is None:
            return
        for sequence in [one for one in self.kv.in_slots if one.length > slots.tokens]:
            if not self.kv.move_to_shared(sequence, self.count_unused_cells()):
                self.preempt(sequence)
        for sequence in self.running:
            if sequence.slot < 0 and is_worth_a_slot(sequence, self.kv.free_slot_tokens, len(self.running)):
                self.kv.move_to_slot(sequence)

    def measure_capacity(self) -> BatchCapacity:
        used = sum(sequence.private_cells for sequence in self.running)
        promised = sum(count_promised_tokens(sequence) for sequence in self.running)
        used += self.prefix_cache.pinned_tokens + self.label_scorer.window_tokens
        return BatchCapacity(self.model.context_tokens, used, promised)

    def free_cells_for_step(self, decoding: list[Sequence], chunks: list[Chunk]) -> list[Chunk]:
        """Free the cells this step needs: first cached prefixes, then whole sequences, youngest first.

        Takes those that were put back out of `decoding`, and gives the chunks that are left.
        """
        while True:
            needed = sum(sequence.pending for sequence in decoding) + sum(tokens for _, tokens in chunks)
            free = self.count_unused_cells()
            shared = [sequence for sequence in self.running if sequence.slot < 0]
            if free + self.prefix_cache.evict(needed - free) >= needed or not shared:
                return chunks
            self.preempt(choose_victim(shared))
            decoding[:] = [sequence for sequence in decoding if sequence.id >= 0]
            chunks = [chunk for chunk in chunks if chunk[0].id >= 0]

    def count_unused_cells(self) -> int:
        """Cells of the shared memory that nothing holds, not even the cache."""
        own = sum(sequence.private_cells for sequence in self.running)
        return self.model.context_tokens - self.prefix_cache.tokens - own - self.label_scorer.window_tokens
