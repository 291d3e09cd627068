"""The prefix tree over a memory that is a table: what is shared, what is freed, and that every cell is counted once."""

from dataclasses import dataclass, field
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.llamacpp.kv.prefix_cache import PrefixCache, PrefixNode, Tokens, count_common_prefix, to_token_array


@dataclass
class Table:
    """KV memory as llama.cpp keeps it: cells with a token each, held by any number of sequences."""

    held: dict[int, dict[int, tuple[int, int]]] = field(default_factory=dict)
    cells: "count[int]" = field(default_factory=count)

    def compute(self, sequence: int, tokens: Tokens, start: int) -> None:
        for position in range(start, len(tokens)):
            self.held.setdefault(sequence, {})[position] = (next(self.cells), int(tokens[position]))

    def memory_copy(self, source: int, target: int, start: int, stop: int) -> None:
        cells = self.held[source]
        self.held.setdefault(target, {}).update({p: cells[p] for p in range(start, stop)})

    def memory_remove(self, sequence: int, start: int, stop: int = -1) -> None:
        cells = self.held.get(sequence, {})
        for position in [p for p in cells if p >= start and (stop < 0 or p < stop)]:
            del cells[position]

    def content(self, sequence: int) -> list[int]:
        cells = self.held.get(sequence, {})
        return [cells[position][1] for position in range(len(cells))]

    @property
    def used(self) -> int:
        return len({cell for cells in self.held.values() for cell, _ in cells.values()})


class Kitchen:
    """A tree, its memory, and sequences that compute prompts the way the runner does."""

    def __init__(self, ids: int = 8) -> None:
        self.table, self.free = Table(), list(range(ids))
        self.tree = PrefixCache(self.table, self.free)

    def begin(self, prompt: list[int], salt: str = "") -> tuple[int, int, PrefixNode]:
        tokens = to_token_array(prompt)
        match = self.tree.match(tokens, salt, len(tokens) - 1)
        self.tree.pin(match.node)
        assert self.tree.free_up_ids(1)
        sequence = self.free.pop()
        self.tree.share_cells(match.node, sequence, 0, match.depth)
        self.table.compute(sequence, tokens, match.depth)
        return sequence, match.depth, match.node

    def end(self, prompt: list[int], begun: tuple[int, int, PrefixNode], salt: str = "") -> None:
        sequence, shared, node = begun
        self.tree.insert(to_token_array(prompt), salt, sequence, shared)
        self.table.memory_remove(sequence, 0)
        self.free.append(sequence)
        self.tree.unpin(node)

    def run(self, prompt: list[int], salt: str = "") -> int:
        """Compute a prompt from beginning to end; give how many of its tokens were cached."""
        begun = self.begin(prompt, salt)
        self.end(prompt, begun, salt)
        return begun[1]


def test_a_prompt_seen_before_is_cached_but_for_its_last_token() -> None:
    kitchen = Kitchen()
    assert [kitchen.run([1, 2, 3, 4]), kitchen.run([1, 2, 3, 4])] == [0, 3]
    assert kitchen.tree.tokens == kitchen.table.used == 4


@pytest.mark.parametrize(
    ("prompts", "cached"),
    [
        ([[1, 2, 3], [1, 2, 4], [1, 2, 3, 5]], [0, 2, 3]),
        ([[1, 2, 3, 4, 5], [1, 2, 9], [1, 2, 3, 4, 8]], [0, 2, 4]),
        ([[1], [1], [2]], [0, 0, 0]),
        ([[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5]], [0, 2, 4]),
    ],
)
def test_the_longest_common_part_is_found(prompts: list[list[int]], cached: list[int]) -> None:
    kitchen = Kitchen()
    assert [kitchen.run(prompt) for prompt in prompts] == cached


def test_tenants_with_other_salts_share_nothing() -> None:
    kitchen = Kitchen()
    assert [kitchen.run([1, 2, 3], "a"), kitchen.run([1, 2, 3], "b"), kitchen.run([1, 2, 3], "a")] == [0, 0, 2]


def test_the_least_recently_used_prefix_goes_first() -> None:
    kitchen = Kitchen()
    for prompt in ([1, 1, 1], [2, 2, 2], [1, 1, 1]):
        kitchen.run(prompt)
    assert kitchen.tree.evict(1) == 3
    assert [kitchen.run([1, 1, 1]), kitchen.run([2, 2, 2])] == [2, 0]


def test_eviction_takes_a_tail_before_what_others_share() -> None:
    kitchen = Kitchen()
    kitchen.run([1, 2, 3, 4])
    kitchen.run([1, 2, 5, 6])
    assert kitchen.tree.evict(2) == 2
    assert kitchen.table.used == kitchen.tree.tokens == 4
    assert kitchen.run([1, 2, 5, 6]) == 3


def test_what_a_running_sequence_uses_is_never_evicted() -> None:
    kitchen = Kitchen()
    kitchen.run([1, 2, 3, 4])
    begun = kitchen.begin([1, 2, 3, 9])
    assert kitchen.tree.pinned_tokens == 3
    assert kitchen.tree.evict(100) == 1
    kitchen.end([1, 2, 3, 9], begun)
    assert kitchen.tree.pinned_tokens == 0
    assert kitchen.tree.evict(100) == 4
    assert kitchen.table.used == 0


def test_a_prompt_nobody_will_ask_for_again_is_dropped_without_what_others_share() -> None:
    kitchen = Kitchen()
    for prompt in ([1, 2, 3, 4], [1, 2, 5, 6]):
        kitchen.run(prompt)
    begun = kitchen.begin([1, 2, 5, 6, 7])
    for prompt in ([1, 2, 3, 4], [1, 2, 5, 6], [1, 2], [8]):
        kitchen.tree.discard(to_token_array(prompt), "")
    assert kitchen.tree.tokens == kitchen.table.used - 1 == 4
    kitchen.end([1, 2, 5, 6, 7], begun)
    kitchen.tree.discard(to_token_array([1, 2, 5, 6, 7]), "")
    assert kitchen.tree.tokens == kitchen.table.used == 4


def test_two_that_computed_the_same_keep_it_once() -> None:
    kitchen = Kitchen()
    one, other = kitchen.begin([1, 2, 3]), kitchen.begin([1, 2, 3])
    assert kitchen.table.used == 6
    kitchen.end([1, 2, 3], one)
    kitchen.end([1, 2, 3], other)
    assert kitchen.table.used == kitchen.tree.tokens == 3


def test_sequence_ids_are_taken_from_cold_prefixes_when_they_run_out() -> None:
    kitchen = Kitchen(ids=3)
    for first in range(10):
        kitchen.run([first, 7, 7])
    assert kitchen.run([9, 7, 7]) == 2


def test_nothing_is_cached_when_every_id_is_in_use() -> None:
    kitchen = Kitchen(ids=1)
    begun = kitchen.begin([1, 2, 3])
    assert kitchen.tree.insert(to_token_array([1, 2, 3]), "", begun[0], 0) is None
    assert kitchen.tree.tokens == 0


def test_a_lookup_for_a_new_tenant_leaves_no_trace() -> None:
    kitchen = Kitchen()
    for number in range(100):
        kitchen.tree.match(to_token_array([1, 2]), f"tenant {number}", 1)
    kitchen.run([1, 2], "kept")
    kitchen.tree.evict(10)
    assert not kitchen.tree._roots


def test_common_prefix_counts_equal_leading_tokens() -> None:
    assert count_common_prefix(to_token_array([1, 2, 3]), to_token_array([1, 2, 4, 5])) == 2
    assert count_common_prefix(to_token_array([]), to_token_array([1])) == 0
    assert count_common_prefix(to_token_array([1, 2]), to_token_array([1, 2])) == 2


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=7),
            st.sampled_from(["a", "b"]),
            st.integers(0, 6),
            st.booleans(),
        ),
        max_size=14,
    )
)
def test_whatever_comes_every_cell_is_counted_once_and_every_leaf_holds_its_path(
    steps: list[tuple[list[int], str, int, bool]],
) -> None:
    kitchen = Kitchen(ids=9)
    open_ones: list[tuple[list[int], str, tuple[int, int, PrefixNode]]] = []
    for prompt, salt, evict, keep_open in steps:
        if len(open_ones) > 2:
            known, known_salt, begun = open_ones.pop(0)
            kitchen.end(known, begun, known_salt)
        begun = kitchen.begin(prompt, salt)
        assert kitchen.table.content(begun[0]) == prompt
        if keep_open:
            open_ones.append((prompt, salt, begun))
        else:
            kitchen.end(prompt, begun, salt)
        kitchen.tree.evict(evict)
        _check(kitchen, open_ones)
    for prompt, salt, begun in open_ones:
        kitchen.end(prompt, begun, salt)
    kitchen.tree.evict(10_000)
    assert kitchen.tree.tokens == kitchen.table.used == kitchen.tree.pinned_tokens == 0
    assert sorted(kitchen.free) == list(range(9))


def _check(kitchen: Kitchen, open_ones: list[tuple[list[int], str, tuple[int, int, PrefixNode]]]) -> None:
    private = sum(len(prompt) - begun[1] for prompt, _, begun in open_ones)
    assert kitchen.table.used == kitchen.tree.tokens + private
    for leaf in kitchen.tree._leaves():
        path: list[int] = []
        node: PrefixNode | None = leaf
        while node is not None:
            path = node.tokens.tolist() + path
            node = node.parent
        assert kitchen.table.content(leaf.sequence) == path
        assert leaf.depth == len(path)
    for prompt, _, begun in open_ones:
        assert kitchen.table.content(begun[0]) == prompt
    assert np.all([node.pins >= 0 for node in kitchen.tree._leaves()])
