"""Which part of a label trie has to be computed: all of it, or as much as can matter.

The probability of reaching a node bounds the likelihood of every label below it. So the distribution at the prompt's
end is read first, then the nodes below are computed in waves, most probable first, until the rest cannot matter:

- `W`, the summed probabilities of reaching the nodes left out (each times its `nesting`), is at most `tolerance`
  times the summed likelihoods of labels that are known and exclude each other;
- none of the labels left out can be as likely as the best of those known.

The labels below a node left out are given its probability in equal parts, which is at most what they may have. Where
`K` is the likelihood of all known labels, true and given shares of the known ones stand in the same proportions, so
the two distributions over the set lie at most W / (K + W) apart, in total variation (half the sum of absolute
differences), which is below the tolerance. The top label is the same. The label mass differs by at most the tolerance
times itself.
"""

from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from appliance.llamacpp.kv.prefix_cache import count_shared_prefix
from appliance.llamacpp.labels.trie import LabelTrie, Path

_HOPEFUL_WAVES: Final = 2
"""So many waves leave out what would not matter if all that is computed led to labels; later ones only what does not
matter for certain, so that there are few of them."""
_FEWEST_TOKENS: Final = 8
_STEPS_TOKENS: Final = 48
"""About what two or three more steps cost, in tokens (a step reads all weights); the items of a call share it."""
_ROW_TOKENS: Final = 0.25
"""What it costs to read a node's distribution, where computing a token without reading costs 1."""
_WAVE_TOKENS: Final = 1.0
"""What a wave costs besides its tokens."""
_EXPECTED: Final = 0.5
_OBSERVED: Final = 0.1
_FORGOTTEN: Final = 0.01


class SearchBudget:
    """Whether a search pays, from what recent ones cost as a share of computing whole tries.

    Where a model is sure of its answers a search ends after a small part. Where it is not, nearly all has to be
    computed, and the tokens that several waves pass are computed several times.
    """

    def __init__(self) -> None:
        self._share = _EXPECTED

    def is_worth_searching(self, trie: LabelTrie, items: int, tolerance: float) -> bool:
        """For an item in a call of so many. Experience against searching is forgotten little by little."""
        most = len(trie) - 1
        least = _FEWEST_TOKENS + _STEPS_TOKENS / max(1, items)
        if tolerance <= 0 or most * (1 - _EXPECTED) < least:
            return False
        if most * (1 - self._share) >= least:
            return True
        self._share += _FORGOTTEN * (_EXPECTED - self._share)
        return False

    def observe(self, search: "LabelSearch") -> None:
        """Take note of a search that is over."""
        whole = (len(search.trie) - 1) * (1 + _ROW_TOKENS)
        self._share += _OBSERVED * (search.spent_tokens / whole - self._share)


class LabelSearch:
    """What is known of the labels of one item."""

    def __init__(self, trie: LabelTrie) -> None:
        self.trie = trie
        self._read = np.zeros(len(trie), np.bool_)
        self._sums = np.zeros(len(trie.labels))
        """Of every label: log probability of its tokens as far as they are read."""
        self._waves = 0
        self.spent_tokens = 0.0
        """What the waves after the first have cost, in tokens."""

    def has_read(self, node: int) -> bool:
        return bool(self._read[node])

    def add_logprobs(self, node: int, logprobs: npt.NDArray[np.float64]) -> None:
        """Take the log probabilities of the tokens that are read at a node (`LabelTrie.read_tokens`)."""
        self._sums[self.trie.read_labels[node]] += logprobs
        self._read[node] = True

    def plan_next_chains(self, tolerance: float) -> list[Path]:
        """The paths that the next wave computes, sorted, none of them a prefix of another; none: enough is known.

        All that is read must have been added, parents with their children.
        """
        heads = self._next_nodes(tolerance)
        chains = sorted(self.trie.extend_to_choice(node) for node in heads)
        if chains:
            self._waves += 1
            nodes = sum(map(len, chains)) - sum(len(self.trie.paths[node]) - 1 for node in heads)
            repeated = sum(count_shared_prefix(one, other) for one, other in pairwise(chains))
            self.spent_tokens += sum(map(len, chains)) - repeated + _ROW_TOKENS * nodes + _WAVE_TOKENS
        return chains

    def compute_logprobs(self) -> npt.NDArray[np.float64]:
        """Of every label; of those left out, an equal part of the probability of reaching the node above them."""
        found = self._sums.copy()
        for node in self._open().tolist():
            below = self.trie.read_labels[node]
            found[below] -= np.log(len(below))
        return found

    def _open(self) -> npt.NDArray[np.intp]:
        """The nodes not read whose parents are."""
        return np.flatnonzero(~self._read & self._read[self.trie.parents])

    def _next_nodes(self, tolerance: float) -> list[int]:
        trie, nodes = self.trie, self._open()
        reach, known = self._sums[trie.any_label[nodes]], self._read[trie.last_nodes]
        best = float(self._sums[known].max(initial=-np.inf))
        scale = max(best, float(reach.max(initial=-np.inf)))
        if not len(nodes) or scale == -np.inf:
            return []
        upper = np.exp(reach - scale)
        sure = float(np.exp(self._sums[known & trie.prefix_free] - scale).sum())
        weights = trie.nesting[nodes] * upper
        rivals = (reach >= best) & (upper > 0)
        order = np.lexsort((weights, rivals))
        left_out = np.cumsum(weights[order]) <= tolerance * sure
        count = min(int(np.count_nonzero(left_out)), len(nodes) - int(np.count_nonzero(rivals)))
        if count < len(nodes) and self._waves < _HOPEFUL_WAVES:
            order = np.argsort(weights)
            before = np.cumsum(weights[order]) - weights[order]
            hoped = sure + np.cumsum(upper[order][::-1])[::-1]
            count = int(np.flatnonzero(before <= tolerance * hoped).max(initial=0))
        chosen: list[int] = nodes[order[count:]].tolist()
        return chosen
