"""The prefix tree: which computed prompts lie in KV memory, what uses them, and which go first when cells are short.

Every leaf owns one sequence id whose cells hold its whole path, so any point inside the tree can be forked by sharing
the cells of a leaf below it. Nodes on a pinned path are not evicted. Every cell of the tree counts once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


class SequenceMemory(Protocol):
    """KV memory by sequence id: sharing cells and letting go of them. llama.cpp's, or a table in tests."""

    def memory_copy(self, source: int, target: int, start: int, stop: int) -> None: ...

    def memory_remove(self, sequence: int, start: int, stop: int = -1) -> None: ...


@dataclass(eq=False, slots=True)
class PrefixNode:
    """An edge of the tree and the point where it ends, `depth` tokens from the start."""

    tokens: Tokens
    depth: int
    parent: "PrefixNode | None"
    children: dict[int, "PrefixNode"] = field(default_factory=dict)
    sequence: int = -1
    """Leaves only: the id whose cells hold the path."""
    pins: int = 0
    """Pins on this node and on all below it."""
    used: int = 0
    cache_salt: str = ""
    """Roots only."""

    @property
    def leaf(self) -> "PrefixNode":
        """Some leaf at or under this node."""
        node = self
        while node.children:
            node = next(iter(node.children.values()))
        return node


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest cached prefix of some tokens: `node` ends exactly there."""

    node: PrefixNode
    depth: int


class PrefixCache:
    """Cached prefixes: one tree for each cache salt. One thread only."""

    def __init__(self, memory: SequenceMemory, free_ids: list[int]) -> None:
        self._memory, self._free_ids = memory, free_ids
        self._roots: dict[str, PrefixNode] = {}
        self._clock = count(1)
        self.tokens = 0
        """Cells held by the tree, pinned or not."""
        self.pinned_tokens = 0

    @property
    def evictable_tokens(self) -> int:
        return self.tokens - self.pinned_tokens

    def match(self, tokens: Tokens, cache_salt: str, limit: int) -> PrefixMatch:
        """The longest cached prefix of `tokens[:limit]`. Splits an edge where the match ends inside one."""
        node, now = self._root(cache_salt), next(self._clock)
        while True:
            node.used = now
            child = node.children.get(int(tokens[node.depth])) if node.depth < limit else None
            if child is None:
                return PrefixMatch(node, node.depth)
            shared = count_common_prefix(child.tokens, tokens[node.depth : limit])
            if shared < len(child.tokens):
                child = self._split(child, shared)
                child.used = now
                return PrefixMatch(child, child.depth)
            node = child

    def count_cached(self, tokens: Tokens, cache_salt: str) -> int:
        """How many of `tokens` are cached, changing nothing."""
        node = self._root(cache_salt)
        while node.depth < len(tokens):
            child = node.children.get(int(tokens[node.depth]))
            if child is None:
                break
            shared = count_common_prefix(child.tokens, tokens[node.depth :])
            if shared < len(child.tokens):
                return node.depth + shared
            node = child
        return node.depth

    def share_cells(self, node: PrefixNode, target: int, start: int, stop: int) -> None:
        """Let sequence `target` share the cells at positions [start, stop) of the path to `node`."""
        if stop > start:
            self._memory.memory_copy(node.leaf.sequence, target, start, stop)

    def insert(self, tokens: Tokens, cache_salt: str, source: int, shared: int) -> PrefixNode | None:
        """Cache `tokens`, whose cells sequence `source` holds; None when no sequence id can be had for it.

        The first `shared` cells of `source` are the tree's already. Where more is cached by now, `source` lets go of
        its own cells for that part and shares the tree's, so that afterwards all `len(tokens)` are the tree's.
        """
        match = self.match(tokens, cache_salt, len(tokens))
        node, known = match.node, match.depth
        if known < len(tokens):
            extends_leaf = node.parent is not None and not node.children
            sequence = node.sequence if extends_leaf else self._take_id(node)
            if sequence is None:
                return None
            self._dedupe(node, source, shared, known)
            self._memory.memory_copy(source, sequence, known if extends_leaf else 0, len(tokens))
            node.sequence = -1
            child = PrefixNode(tokens[known:].copy(), len(tokens), node, sequence=sequence, used=next(self._clock))
            node.children[int(tokens[known])] = child
            if node.parent is None:
                self._roots[cache_salt] = node
            self.tokens += len(child.tokens)
            return child
        self._dedupe(node, source, shared, known)
        return node

    def _dedupe(self, node: PrefixNode, source: int, start: int, stop: int) -> None:
        if stop > start:
            self._memory.memory_remove(source, start, stop)
            self.share_cells(node, source, start, stop)

    def pin(self, node: PrefixNode) -> None:
        """Keep the path to `node` until it is unpinned as often."""
        walker: PrefixNode | None = node
        while walker is not None:
            if walker.pins == 0:
                self.pinned_tokens += len(walker.tokens)
            walker.pins += 1
            walker = walker.parent

    def unpin(self, node: PrefixNode) -> None:
        walker: PrefixNode | None = node
        while walker is not None:
            walker.pins -= 1
            if walker.pins == 0:
                self.pinned_tokens -= len(walker.tokens)
            walker = walker.parent

    def evict(self, tokens: int) -> int:
        """Free at least `tokens` cells, least recently used first, as far as pins allow; give the number freed."""
        freed = 0
        while freed < tokens:
            leaf = self._coldest()
            if leaf is None:
                break
            freed += self._drop(leaf)
        return freed

    def discard(self, tokens: Tokens, cache_salt: str) -> None:
        """Drop a cached prompt that is not expected again, unless it is pinned or begins another."""
        node = self.match(tokens, cache_salt, len(tokens)).node
        if node.depth == len(tokens) and node.parent is not None and not node.children and not node.pins:
            self._drop(node)

    def free_up_ids(self, count: int) -> bool:
        """Evict until `count` sequence ids are free; False when what is pinned stands against it."""
        while len(self._free_ids) < count:
            leaf = self._coldest()
            if leaf is None:
                return False
            self._drop(leaf)
        return True

    def clear(self) -> None:
        """Drop everything without touching memory, which was cleared. Pins must be gone."""
        for node in list(self._leaves()):
            self._free_ids.append(node.sequence)
        self._roots.clear()
        self.tokens = self.pinned_tokens = 0

    def _take_id(self, keep: PrefixNode) -> int | None:
        self.pin(keep)
        found = self._free_ids.pop() if self.free_up_ids(1) else None
        self.unpin(keep)
        return found

    def _root(self, cache_salt: str) -> PrefixNode:
        """The tree of one salt; remembered once something is put into it, so that lookups leave no trace."""
        return self._roots.get(cache_salt) or PrefixNode(np.empty(0, np.int32), 0, None, cache_salt=cache_salt)

    def _split(self, node: PrefixNode, length: int) -> PrefixNode:
        """Cut an edge after `length` tokens; give the new upper node."""
        parent = node.parent
        assert parent is not None
        upper = PrefixNode(node.tokens[:length].copy(), parent.depth + length, parent, pins=node.pins, used=node.used)
        parent.children[int(node.tokens[0])] = upper
        node.tokens, node.parent = node.tokens[length:].copy(), upper
        upper.children[int(node.tokens[0])] = node
        return upper

    def _drop(self, leaf: PrefixNode) -> int:
        """Remove a leaf; its id stays with the parent where that becomes a leaf itself."""
        parent = leaf.parent
        assert parent is not None and not leaf.children and not leaf.pins
        del parent.children[int(leaf.tokens[0])]
        self._memory.memory_remove(leaf.sequence, parent.depth)
        if parent.parent is not None and not parent.children:
            parent.sequence = leaf.sequence
        else:
            self._memory.memory_remove(leaf.sequence, 0)
            self._free_ids.append(leaf.sequence)
        if parent.parent is None and not parent.children:
            del self._roots[parent.cache_salt]
        self.tokens -= len(leaf.tokens)
        return len(leaf.tokens)

    def _coldest(self) -> PrefixNode | None:
        return min((leaf for leaf in self._leaves() if not leaf.pins), key=lambda leaf: leaf.used, default=None)

    def _leaves(self) -> Iterator[PrefixNode]:
        stack = [node for root in self._roots.values() for node in root.children.values()]
        while stack:
            node = stack.pop()
            if node.children:
                stack.extend(node.children.values())
            else:
                yield node


def count_common_prefix(one: Tokens, other: Tokens) -> int:
    """Number of leading tokens that are equal."""
    length = min(len(one), len(other))
    different = one[:length] != other[:length]
    return int(different.argmax()) if different.any() else length


def count_shared_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """The same for plain sequences, which are short."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def to_token_array(tokens: Sequence[int]) -> Tokens:
    return np.asarray(tokens, dtype=np.int32)
