"""Where the keys and values of every sequence lie: forked from the prefix tree, in a lane, cached, or given back."""

from appliance.errors import EngineFailed
from appliance.llamacpp.decode.sequence import Sequence
from appliance.llamacpp.kv.prefix_cache import PrefixCache
from appliance.llamacpp.model import LlamaModel


class KvAllocator:
    """Moves sequences between waiting, the shared memory and the lanes. The engine's thread only."""

    def __init__(self, model: LlamaModel, tree: PrefixCache, free_ids: list[int]) -> None:
        self._model, self._tree, self._free_ids = model, tree, free_ids
        self._lanes = model.lanes
        self.in_lanes: list[Sequence] = []
        """Number i lies in lane i."""

    @property
    def lane_tokens(self) -> int:
        """The length of a free lane; 0 where there is none."""
        return self._lanes.tokens if self._lanes is not None and len(self.in_lanes) < self._lanes.count else 0

    @property
    def used_in_lanes(self) -> int:
        return sum(sequence.computed for sequence in self.in_lanes)

    def held(self, sequence: Sequence) -> int:
        """How many positions llama.cpp holds of a running sequence."""
        if sequence.lane >= 0:
            assert self._lanes is not None
            return self._lanes.memory_length(sequence.lane)
        return self._model.memory_length(sequence.id)

    # Waiting and the shared memory.

    def find(self, sequence: Sequence) -> None:
        """Pin the longest cached prefix of a waiting sequence; what it holds counts as computed."""
        if not self._model.forkable:
            return
        tokens = sequence.tokens[: sequence.length]
        match = self._tree.match(tokens, sequence.request.cache_salt, sequence.length - 1)
        self._tree.pin(match.node)
        sequence.node = match.node
        sequence.computed = sequence.shared = match.depth

    def seat(self, sequence: Sequence) -> None:
        """Give a sequence that has found its prefix an id; one must be free."""
        sequence.id = self._free_ids.pop()
        if sequence.node is not None:
            self._tree.share(sequence.node, sequence.id, 0, sequence.shared)

    def let_go(self, sequence: Sequence) -> None:
        """Forget what `find` found."""
        if sequence.node is not None:
            self._tree.unpin(sequence.node)
        sequence.node, sequence.computed, sequence.shared = None, 0, 0

    def free(self, sequence: Sequence) -> None:
        """Give back all a sequence holds."""
        if sequence.lane >= 0:
            assert self._lanes is not None
            self._lanes.memory_remove(sequence.lane, 0)
            self._leave_lane(sequence)
        elif sequence.id >= 0:
            self._model.memory_remove(sequence.id, 0)
            self._free_ids.append(sequence.id)
            sequence.id = -1
        self.let_go(sequence)

    def cache(self, sequence: Sequence, length: int) -> None:
        """Hand the first `length` cells of a sequence in the shared memory to the prefix tree, and pin them there."""
        if sequence.node is None or length <= sequence.shared:
            return
        node = self._tree.insert(sequence.tokens[:length], sequence.request.cache_salt, sequence.id, sequence.shared)
        if node is None:
            return
        self._tree.pin(node)
        self._tree.unpin(sequence.node)
        sequence.node, sequence.shared = node, length

    # Lanes.

    def to_lane(self, sequence: Sequence) -> None:
        """Move a sequence from the shared memory into the next lane; it stays where it is when that fails."""
        assert self._lanes is not None
        lane = len(self.in_lanes)
        if not self._lanes.take(sequence.id, lane):
            return
        computed = sequence.computed
        self.free(sequence)
        sequence.lane, sequence.computed = lane, computed
        self.in_lanes.append(sequence)

    def to_shared(self, sequence: Sequence, spare: int) -> bool:
        """Move a sequence out of its lane, forking what is cached of it. False: there was no room.

        `spare`: cells of the shared memory that nothing holds.
        """
        assert self._lanes is not None
        match = self._tree.match(sequence.tokens, sequence.request.cache_salt, sequence.computed)
        self._tree.pin(match.node)
        rest = sequence.computed - match.depth
        if spare + self._tree.evict(rest - spare) < rest or not self._tree.free_up_ids(1):
            self._tree.unpin(match.node)
            return False
        target = self._free_ids.pop()
        moved = rest == 0 or self._lanes.give(sequence.lane, target, match.depth)
        self._lanes.memory_remove(sequence.lane, 0)
        self._leave_lane(sequence)
        if not moved:
            self._free_ids.append(target)
            self._tree.unpin(match.node)
            sequence.computed = 0
            return False
        self._tree.share(match.node, target, 0, match.depth)
        sequence.id, sequence.node, sequence.shared = target, match.node, match.depth
        return True

    def keep(self, sequence: Sequence, spare: int) -> None:
        """Cache all that a sequence has computed, wherever it lies; the caller frees it next."""
        if sequence.lane < 0 or self.to_shared(sequence, spare):
            self.cache(sequence, sequence.computed)

    def _leave_lane(self, sequence: Sequence) -> None:
        """Close the gap that an emptied lane leaves: llama.cpp computes only neighbouring lanes together."""
        assert self._lanes is not None
        gap, sequence.lane = sequence.lane, -1
        last = self.in_lanes.pop()
        if last is sequence:
            return
        self.in_lanes[gap] = last
        if not self._lanes.shift(last.lane, gap):
            raise EngineFailed(f"lane {last.lane} cannot be moved to {gap}: {self._model.last_words()}")
        last.lane = gap

    def forget(self) -> None:
        """The memory was cleared: nothing lies anywhere. Sequences must have been freed before."""
        self._tree.forget()
