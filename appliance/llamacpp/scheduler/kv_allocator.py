"""Where the keys and values of every sequence lie: forked from the prefix tree, in a slot, cached, or given back."""

from appliance.errors import EngineFailed
from appliance.llamacpp.decode.sequence import Sequence
from appliance.llamacpp.kv.prefix_cache import PrefixCache
from appliance.llamacpp.model import LlamaModel


class KvAllocator:
    """Moves sequences between waiting, the shared memory and the slots. The engine's thread only."""

    def __init__(self, model: LlamaModel, prefix_cache: PrefixCache, free_ids: list[int]) -> None:
        self._model, self._prefix_cache, self._free_ids = model, prefix_cache, free_ids
        self._slots = model.slots
        self.in_slots: list[Sequence] = []
        """Number i lies in slot i."""

    @property
    def free_slot_tokens(self) -> int:
        """The length of a free slot; 0 where there is none."""
        return self._slots.tokens if self._slots is not None and len(self.in_slots) < self._slots.count else 0

    @property
    def used_slot_tokens(self) -> int:
        return sum(sequence.computed for sequence in self.in_slots)

    def count_held_positions(self, sequence: Sequence) -> int:
        """How many positions llama.cpp holds of a running sequence."""
        if sequence.slot >= 0:
            assert self._slots is not None
            return self._slots.memory_length(sequence.slot)
        return self._model.memory_length(sequence.id)

    # Waiting and the shared memory.

    def pin_cached_prefix(self, sequence: Sequence) -> None:
        """Pin the longest cached prefix of a waiting sequence; what it holds counts as computed."""
        if not self._model.forkable:
            return
        tokens = sequence.tokens[: sequence.length]
        match = self._prefix_cache.match(tokens, sequence.request.cache_salt, sequence.length - 1)
        self._prefix_cache.pin(match.node)
        sequence.node = match.node
        sequence.computed = sequence.shared = match.depth

    def assign_id(self, sequence: Sequence) -> None:
        """Give a sequence that has found its prefix an id; one must be free."""
        sequence.id = self._free_ids.pop()
        if sequence.node is not None:
            self._prefix_cache.share_cells(sequence.node, sequence.id, 0, sequence.shared)

    def unpin_prefix(self, sequence: Sequence) -> None:
        """Forget what `find` found."""
        if sequence.node is not None:
            self._prefix_cache.unpin(sequence.node)
        sequence.node, sequence.computed, sequence.shared = None, 0, 0

    def release(self, sequence: Sequence) -> None:
        """Give back all a sequence holds."""
        if sequence.slot >= 0:
            assert self._slots is not None
            self._slots.memory_remove(sequence.slot, 0)
            self._leave_slot(sequence)
        elif sequence.id >= 0:
            self._model.memory_remove(sequence.id, 0)
            self._free_ids.append(sequence.id)
            sequence.id = -1
        self.unpin_prefix(sequence)

    def cache_prefix(self, sequence: Sequence, length: int) -> None:
        """Hand the first `length` cells of a sequence in the shared memory to the prefix tree, and pin them there."""
        if sequence.node is None or length <= sequence.shared:
            return
        node = self._prefix_cache.insert(
            sequence.tokens[:length], sequence.request.cache_salt, sequence.id, sequence.shared
        )
        if node is None:
            return
        self._prefix_cache.pin(node)
        self._prefix_cache.unpin(sequence.node)
        sequence.node, sequence.shared = node, length

    # Slots.

    def move_to_slot(self, sequence: Sequence) -> None:
        """Move a sequence from the shared memory into the next slot; it stays where it is when that fails."""
        assert self._slots is not None
        slot = len(self.in_slots)
        if not self._slots.copy_in(sequence.id, slot):
            return
        computed = sequence.computed
        self.release(sequence)
        sequence.slot, sequence.computed = slot, computed
        self.in_slots.append(sequence)

    def move_to_shared(self, sequence: Sequence, unused_cells: int) -> bool:
        """Move a sequence out of its slot, forking what is cached of it. False: there was no room.

        `unused_cells`: cells of the shared memory that nothing holds.
        """
        assert self._slots is not None
        match = self._prefix_cache.match(sequence.tokens, sequence.request.cache_salt, sequence.computed)
        self._prefix_cache.pin(match.node)
        rest = sequence.computed - match.depth
        if unused_cells + self._prefix_cache.evict(rest - unused_cells) < rest or not self._prefix_cache.free_up_ids(1):
            self._prefix_cache.unpin(match.node)
            return False
        target = self._free_ids.pop()
        moved = rest == 0 or self._slots.move_out(sequence.slot, target, match.depth)
        self._slots.memory_remove(sequence.slot, 0)
        self._leave_slot(sequence)
        if not moved:
            self._free_ids.append(target)
            self._prefix_cache.unpin(match.node)
            sequence.computed = 0
            return False
        self._prefix_cache.share_cells(match.node, target, 0, match.depth)
        sequence.id, sequence.node, sequence.shared = target, match.node, match.depth
        return True

    def cache_computed(self, sequence: Sequence, unused_cells: int) -> None:
        """Cache all that a sequence has computed, wherever it lies; the caller frees it next."""
        if sequence.slot < 0 or self.move_to_shared(sequence, unused_cells):
            self.cache_prefix(sequence, sequence.computed)

    def _leave_slot(self, sequence: Sequence) -> None:
        """Close the gap that an emptied slot leaves: llama.cpp computes only neighbouring slots together."""
        assert self._slots is not None
        gap, sequence.slot = sequence.slot, -1
        last = self.in_slots.pop()
        if last is sequence:
            return
        self.in_slots[gap] = last
        if not self._slots.move_slot(last.slot, gap):
            raise EngineFailed(f"slot {last.slot} cannot be moved to {gap}: {self._model.last_log_lines()}")
        last.slot = gap

    def forget(self) -> None:
        """The memory was cleared: nothing lies anywhere. Sequences must have been freed before."""
        self._prefix_cache.clear()
