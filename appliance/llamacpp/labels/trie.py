"""The labels of one item as a trie of tokens: what can be computed, what is read at each node, and what lies below."""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

ROOT: Final = 0
"""The trie's root: the end of the prompt."""

Path = tuple[int, ...]
"""The tokens from the prompt's end to a node."""


class LabelTrie:
    """Node 0 is the prompt's end, the others are proper prefixes of labels. Immutable, so that items share one."""

    def __init__(self, labels: Sequence[Sequence[int]]) -> None:
        self.labels = [tuple(label) for label in labels]
        nodes: dict[Path, int] = {(): ROOT}
        for label in self.labels:
            for length in range(1, len(label)):
                nodes.setdefault(label[:length], len(nodes))
        reads: list[list[tuple[int, int]]] = [[] for _ in nodes]
        for index, label in enumerate(self.labels):
            for length, token in enumerate(label):
                reads[nodes[label[:length]]].append((token, index))
        self.read_tokens = [np.array([token for token, _ in pairs], np.intp) for pairs in reads]
        self.read_labels = [np.array([index for _, index in pairs], np.intp) for pairs in reads]
        self._nodes = nodes
        self.longest = max(map(len, self.labels), default=0)
        self.lowest = min(map(min, self.labels), default=0)
        self.highest = max(map(max, self.labels), default=0)

    def __len__(self) -> int:
        return len(self._nodes)

    @cached_property
    def chains(self) -> list[Path]:
        """The paths to compute after the prompt, sorted, none of them a prefix of another; at least the empty one."""
        paths = sorted(self._nodes)
        following = [*paths[1:], None]
        return [
            path for path, after in zip(paths, following, strict=True) if after is None or after[: len(path)] != path
        ]

    def list_nodes(self, chain: Path) -> list[int]:
        """The nodes along a chain, the prompt's end first."""
        return [self._nodes[chain[:length]] for length in range(len(chain) + 1)]

    @cached_property
    def paths(self) -> list[Path]:
        """Of every node."""
        return list(self._nodes)

    @cached_property
    def parents(self) -> npt.NDArray[np.intp]:
        """Of every node; the root is its own."""
        return np.array([self._nodes[path[:-1]] for path in self._nodes], np.intp)

    @cached_property
    def any_label(self) -> npt.NDArray[np.intp]:
        """Of every node: one of the labels below it."""
        return np.array([labels[0] if len(labels) else 0 for labels in self.read_labels], np.intp)

    @cached_property
    def last_nodes(self) -> npt.NDArray[np.intp]:
        """Of every label: the node where its last token is read."""
        return np.array([self._nodes[label[:-1]] for label in self.labels], np.intp)

    @cached_property
    def prefix_free(self) -> npt.NDArray[np.bool_]:
        """The labels that no other begins, one of each where two are the same: these exclude each other."""
        known: dict[Path, int] = {}
        for index, label in enumerate(self.labels):
            known.setdefault(label, index)
        return np.array(
            [
                known[label] == index and not any(label[:length] in known for length in range(1, len(label)))
                for index, label in enumerate(self.labels)
            ],
            np.bool_,
        )

    @cached_property
    def nesting(self) -> npt.NDArray[np.int64]:
        """Of every node: the most labels below it that one text can go on with, as each of them begins the next.

        The likelihoods of the labels below a node sum to at most so many times the probability of reaching it.
        """
        ends = Counter(self.labels)
        deepest = np.zeros(len(self), np.int64)
        for path in sorted(self._nodes, key=len, reverse=True):
            node = self._nodes[path]
            for token in set(self.read_tokens[node].tolist()):
                after = (*path, token)
                below = int(deepest[self._nodes[after]]) if after in self._nodes else 0
                deepest[node] = max(deepest[node], ends[after] + below)
        return deepest

    def extend_to_choice(self, node: int) -> Path:
        """The path to a node and on from there to the first that leaves a choice, or that has no node below it."""
        path = self.paths[node]
        while True:
            following = set(self.read_tokens[self._nodes[path]].tolist())
            after = (*path, *following)
            if len(following) != 1 or after not in self._nodes:
                return path
            path = after

    def compute_mass(self, logprobs: npt.ArrayLike) -> float:
        """Probability that the text goes on with any of the labels; a label that begins another includes it."""
        return min(1.0, float(np.exp(np.asarray(logprobs)[self.prefix_free]).sum()))
