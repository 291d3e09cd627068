"""Whole labels scored by few reads of one next-token distribution each. Pure.

Labels are token sequences; where they part, the model's distribution decides between them, so one read is needed for
each place where they part: one in all where their first tokens differ. A stretch that no other label shares is taken as
certain: the labels' shares stay true, and their mass is that of the places where they part.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LabelTreeNode:
    """A place where labels part. `prefix`: the tokens of a label up to here."""

    prefix: Tokens
    children: Mapping[int, "LabelTreeNode | int"]
    """By next token: a further place, or the index of the one label that goes on with it."""

    @property
    def leaves(self) -> Sequence[int]:
        found: list[int] = []
        for child in self.children.values():
            found += [child] if isinstance(child, int) else child.leaves
        return found


def tree(labels: Sequence[Tokens], end: int) -> LabelTreeNode:
    """The places where `labels` part. `end` is the token that ends a turn: it tells a label from a longer one that
    begins with it. Raises ValueError where two labels are the same tokens."""
    return _branch(labels, list(range(len(labels))), 0, end)


def _branch(labels: Sequence[Tokens], indices: Sequence[int], depth: int, end: int) -> LabelTreeNode:
    groups: dict[int, list[int]] = {}
    for index in indices:
        tokens = labels[index]
        groups.setdefault(tokens[depth] if depth < len(tokens) else end, []).append(index)
    children: dict[int, LabelTreeNode | int] = {}
    for token, members in groups.items():
        if len(members) == 1:
            children[token] = members[0]
            continue
        if all(len(labels[index]) <= depth for index in members):
            raise ValueError("two labels are the same to the model")
        below = depth + 1
        while len({labels[index][below : below + 1] for index in members}) == 1 and len(labels[members[0]]) > below:
            below += 1
        children[token] = _branch(labels, members, below, end)
    return LabelTreeNode(labels[indices[0]][:depth], children)


class LabelTreeScoring:
    """Of one text: give it the reads it asks for until it asks for none."""

    def __init__(self, root: LabelTreeNode, count: int, *, worth: float = 0.01) -> None:
        """`worth`: places that hold less than this share of what was found so far are not read; what they hold is
        spread over their labels."""
        self._worth = worth
        self.scores = [-math.inf] * count
        self.due: list[tuple[LabelTreeNode, float]] = [(root, 0.0)]
        """Places to read, each with the logprob of getting there."""

    def give(self, reads: Sequence[Mapping[int, float]]) -> None:
        """The logprobs of the children's tokens at each place of `due`, in order."""
        ahead: list[tuple[LabelTreeNode, float]] = []
        for (place, before), read in zip(self.due, reads, strict=True):
            for token, child in place.children.items():
                logprob = before + read.get(token, -math.inf)
                if isinstance(child, int):
                    self.scores[child] = logprob
                else:
                    ahead.append((child, logprob))
        found = [*self.scores, *(logprob for _, logprob in ahead)]
        bar = math.log(self._worth) + mass(found) if self._worth > 0 else -math.inf
        self.due = [(place, logprob) for place, logprob in ahead if logprob >= bar]
        for place, logprob in ahead:
            if logprob < bar:
                for leaf in place.leaves:
                    self.scores[leaf] = logprob - math.log(len(place.leaves))


def mass(logprobs: Sequence[float]) -> float:
    """The logarithm of the probabilities' sum."""
    highest = max(logprobs)
    if not math.isfinite(highest):
        return -math.inf
    return highest + math.log(sum(math.exp(one - highest) for one in logprobs))
