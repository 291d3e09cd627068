"""Who waits, who runs, and the cells they get: admission, preemption, lanes, and room for the next step.

Decisions lie in `scheduler`, where a sequence's cells lie in `cells`. Owned by the thread that steps.
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
        self.tree = PrefixCache(model, free_ids)
        self.cells = KvAllocator(model, self.tree, free_ids)
        self.turns = FairQueue()
        self.line = WaitQueue()
        self.running: list[Sequence] = []
        self.urgent = IDLE_PRIORITY
        """Priority of the most urgent of what is running."""
        self.suspects: deque[Sequence] = deque()
        """Sequences of a step that failed. Each runs alone until it has computed what it had, or has failed again."""
        self.scorer = LabelScorer(model, self.tree, free_ids, self.turns, self.room)

    def submit(self, sequence: Sequence) -> None:
        sequence.place = self.turns.place(sequence.request.cache_salt, count_charged_tokens(sequence))
        self.line.push(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence that runs out, and free its cells."""
        self.running.remove(sequence)
        self.cells.free(sequence)
        if sequence in self.suspects:
            self.suspects.remove(sequence)

    def admit(self) -> None:
        """Start what waits, in order, as long as there is room. A more urgent one may take the place of another."""
        for sequence in self.line.in_order():
            if self.trial([sequence]) and not self._waits_for_leader(sequence) and not self._start_before(sequence):
                return

    def _start_before(self, sequence: Sequence) -> bool:
        """Start a sequence, in the place of less urgent ones where that is needed; False when it has to wait."""
        while not self._start(sequence):
            last = (
                choose_victim(self.running)
                if self.running and self.suspects
                else choose_preempted(self.running, sequence)
            )
            if last is None:
                return False
            self.cells.keep(last, self.spare_cells())
            self.put_back(last)
        return True

    def _waits_for_leader(self, sequence: Sequence) -> bool:
        if not self.model.forkable:
            return False
        cached = self.tree.depth(sequence.tokens[: sequence.length - 1], sequence.request.cache_salt)
        return any(computes_shared_prefix(leader, sequence, cached) for leader in self.running)

    def _start(self, sequence: Sequence) -> bool:
        """Give a sequence its id and cells if they fit; False when it has to wait."""
        if len(self.running) >= self.model.sequences or not self.tree.free_up_ids(1):
            return False
        self.cells.find(sequence)
        if not self.room().fits(count_promised_tokens(sequence)) and (self.running or self.scorer.window_tokens):
            self.cells.let_go(sequence)
            return False
        self.line.remove(sequence)
        self.turns.begin(sequence.place, count_charged_tokens(sequence))
        self.cells.seat(sequence)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
        self.running.append(sequence)
        return True

    def trial(self, sequences: list[Sequence]) -> list[Sequence]:
        """Those that may be computed now: after a failed step the suspects, one by one; else the most urgent, for what
        can wait holds still beside what cannot."""
        if self.suspects:
            return [sequence for sequence in sequences if sequence is self.suspects[0]]
        if self.scorer.careful:
            return []
        return [sequence for sequence in sequences if sequence.request.priority <= self.urgent]

    def put_back(self, sequence: Sequence) -> None:
        """Preempt: the cells go, the tokens stay, and the line takes it back at its old place."""
        self.running.remove(sequence)
        self.cells.free(sequence)
        self.line.push(sequence)

    # Cells.

    def settle(self) -> None:
        """Move sequences that generate into lanes, and out where they have outgrown them."""
        lanes = self.model.lanes
        if lanes is None:
            return
        for sequence in [one for one in self.cells.in_lanes if one.length > lanes.tokens]:
            if not self.cells.to_shared(sequence, self.spare_cells()):
                self.put_back(sequence)
        for sequence in self.running:
            if sequence.lane < 0 and is_worth_a_slot(sequence, self.cells.lane_tokens, len(self.running)):
                self.cells.to_lane(sequence)

    def room(self) -> BatchCapacity:
        used = sum(sequence.private for sequence in self.running)
        promised = sum(count_promised_tokens(sequence) for sequence in self.running)
        used += self.tree.pinned_tokens + self.scorer.window_tokens
        return BatchCapacity(self.model.context_tokens, used, promised)

    def make_room(self, decoding: list[Sequence], chunks: list[Chunk]) -> list[Chunk]:
        """Free the cells this step needs: first cached prefixes, then whole sequences, youngest first.

        Takes those that were put back out of `decoding`, and gives the chunks that are left.
        """
        while True:
            needed = sum(sequence.pending for sequence in decoding) + sum(tokens for _, tokens in chunks)
            free = self.spare_cells()
            shared = [sequence for sequence in self.running if sequence.lane < 0]
            if free + self.tree.evict(needed - free) >= needed or not shared:
                return chunks
            self.put_back(choose_victim(shared))
            decoding[:] = [sequence for sequence in decoding if sequence.id >= 0]
            chunks = [chunk for chunk in chunks if chunk[0].id >= 0]

    def spare_cells(self) -> int:
        """Cells of the shared memory that nobody holds, not even the cache."""
        own = sum(sequence.private for sequence in self.running)
        return self.model.context_tokens - self.tree.tokens - own - self.scorer.window_tokens
