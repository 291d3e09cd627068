"""Scoring labels: every label of an item is a path in a trie, and the nodes of the trie that have children are computed
as forks of the prompt. A label's likelihood is the product of its tokens' probabilities at the nodes it passes.

The last token of a label is only read off its parent's distribution, so single-token labels cost no decoding at all.
Where labels are many, nodes that cannot matter are left out (see `search`). Items of one call differ in a few tokens;
side by side they make a forest, in which a shared run of tokens is computed once and belongs to all the sequences
under it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from appliance.llamacpp.decode.sampling import compute_log_normalizer
from appliance.llamacpp.engine_protocol import LabelItem, LabelScores, Logits
from appliance.llamacpp.kv.prefix_cache import (
    PrefixNode,
    Tokens,
    count_common_prefix,
    count_shared_prefix,
    to_token_array,
)
from appliance.llamacpp.labels.search import LabelSearch
from appliance.llamacpp.labels.trie import LabelTrie, Path

Ints = npt.NDArray[np.int32]


class LabelJob:
    """One call: items in order, of which `cursor` are taken. Results arrive in any order."""

    def __init__(self, items: Sequence[LabelItem]) -> None:
        self.items = items
        self.cursor = 0
        self.results: list[LabelScores | None] = [None] * len(items)
        self.open = len(items)
        self.waiting_tokens = sum(len(item.prompt) for item in items)
        """Prompt tokens of items that are not answered yet."""
        self.priority = min((item.priority for item in items), default=0)
        self.start_tag = 0.0
        """Start tag of its next item; see `fair_queue`."""
        self.number = 0
        """Order of arrival."""
        self.dropped = False
        """Its caller has left. Set by the event loop's thread before the engine's takes note."""
        self.cancelled = False
        self.pieces: list[PromptPiece] = []
        """Pieces that are not taken yet, of the item before the cursor and of items between two waves."""
        self._tries: dict[int, tuple[object, LabelTrie]] = {}

    @property
    def rank(self) -> tuple[int, float, int]:
        """Lower goes first: by priority value, then what is begun, then the start tag of the next item."""
        return self.priority, 0.0 if self.pieces else self.start_tag, self.number

    @property
    def untaken(self) -> bool:
        return bool(self.pieces) or self.cursor < len(self.items)

    @property
    def following(self) -> LabelItem | None:
        """The item that is taken next."""
        return self.items[self.cursor] if self.cursor < len(self.items) else None

    def trie(self, labels: Sequence[Sequence[int]]) -> LabelTrie:
        """The trie of a label set; items that share the very same list share it."""
        known = self._tries.get(id(labels))
        if known is None:
            if len(self._tries) >= 64:
                self._tries.clear()
            known = self._tries[id(labels)] = (labels, LabelTrie(labels))
        return known[1]

    def answer(self, index: int, scores: LabelScores) -> None:
        if self.results[index] is None:
            self.results[index] = scores
            self.open -= 1
            self.waiting_tokens -= len(self.items[index].prompt)


@dataclass(eq=False, slots=True)
class LabelItemState:
    """An item in work: what is known of its labels so far, and how many pieces are still out."""

    job: LabelJob
    index: int
    search: LabelSearch
    prompt: Tokens
    pieces_open: int = 0
    cached_tokens: int = -1

    @property
    def trie(self) -> LabelTrie:
        return self.search.trie

    @property
    def cache_salt(self) -> str:
        return self.job.items[self.index].cache_salt

    def plan_next_chains(self) -> list[Path]:
        """What the next wave computes once all pieces are in; nothing where the item can be answered."""
        return self.search.plan_next_chains(self.job.items[self.index].tolerance)

    def answer(self) -> None:
        logprobs = self.search.compute_logprobs()
        mass, cached = self.trie.compute_mass(logprobs), max(0, self.cached_tokens)
        self.job.answer(self.index, LabelScores(logprobs.tolist(), mass, len(self.prompt), cached))

    def fail(self, error: str) -> None:
        self.job.answer(self.index, failed_scores(len(self.prompt), error))


@dataclass(eq=False, slots=True)
class PromptPiece:
    """Some chains of an item that are computed together, and the nodes to be read along them."""

    item: LabelItemState
    chains: list[Path]
    fresh: list[int]
    """Of every chain: how many of its nodes, counted from the prompt's end, are read already or by an earlier chain."""
    node: PrefixNode | None = None
    """Where it leaves the prefix tree, pinned while it is in work."""
    depth: int = 0

    @property
    def reads_prompt(self) -> bool:
        """Whether the distribution at the prompt's end is read, so that its last token must be computed."""
        return self.fresh[0] == 0

    @property
    def starts_search(self) -> bool:
        """Whether other nodes may follow, by what is read at the prompt's end."""
        return self.chains == [()] and len(self.item.trie) > 1

    @property
    def tokens(self) -> int:
        """Cells it needs at most: the rest of the prompt and the chains' own nodes."""
        repeated = sum(count_shared_prefix(before, chain) for before, chain in pairwise(self.chains))
        return len(self.item.prompt) - self.depth + sum(map(len, self.chains)) - repeated


def count_shared_tokens(before: PromptPiece, piece: PromptPiece) -> int:
    """Tokens of what is left of its prompt that a piece has in common with the one before it: both must leave the
    prefix tree at the same point, for equal tokens behind different ones are not the same."""
    if before.depth != piece.depth or before.item.cache_salt != piece.item.cache_salt:
        return 0
    if before.node is not piece.node and piece.depth:
        return 0
    return count_common_prefix(before.item.prompt[piece.depth :], piece.item.prompt[piece.depth :])


def failed_scores(prompt_tokens: int, error: str) -> LabelScores:
    return LabelScores((), 0.0, prompt_tokens, 0, error)


def prepare_item(job: LabelJob, index: int, context_tokens: int, vocabulary: int) -> LabelItemState | str:
    """Check an item and make it ready; the text of what is wrong with it otherwise."""
    item = job.items[index]
    if not item.prompt:
        return "the prompt is empty: give at least one token"
    if not item.labels or not all(len(label) for label in item.labels):
        return "an item needs at least one label, and every label at least one token"
    trie = job.trie(item.labels)
    needed = len(item.prompt) + trie.longest - 1
    if needed > context_tokens:
        return f"prompt and longest label are {needed} tokens and the context holds {context_tokens}: shorten the text"
    prompt = to_token_array(item.prompt)
    if min(trie.lowest, int(prompt.min())) < 0 or max(trie.highest, int(prompt.max())) >= vocabulary:
        return f"a token id is outside of the vocabulary of {vocabulary}"
    return LabelItemState(job, index, LabelSearch(trie), prompt)


def split_into_pieces(item: LabelItemState, chains: Sequence[Path], chains_at_once: int) -> list[PromptPiece]:
    """Pieces of at most so many of the chains, which are sorted and none a prefix of another; nodes that two pieces
    pass are read in the first only."""
    pieces: list[PromptPiece] = []
    before: Path | None = None
    for number, chain in enumerate(chains):
        if number % chains_at_once == 0:
            pieces.append(PromptPiece(item, [], []))
        read = next(
            (step for step, node in enumerate(item.trie.list_nodes(chain)) if not item.search.has_read(node)), 0
        )
        pieces[-1].chains.append(chain)
        pieces[-1].fresh.append(read if before is None else max(read, count_shared_prefix(before, chain) + 1))
        before = chain
    item.pieces_open = len(pieces)
    return pieces


@dataclass(frozen=True, slots=True)
class LabelForest:
    """Paths laid side by side for computing. Entry i is one token of the `sizes[i]` paths from `starts[i]` on.

    Entries of one path come in the order of its tokens, so the list may be cut anywhere into several batches.
    """

    tokens: Ints
    positions: Ints
    starts: Ints
    sizes: Ints
    first_entries: list[int]
    """The entry of each path's first own token."""
    shared: list[int]

    def find_entry(self, path: int, offset: int) -> int:
        """The entry that computes token `offset` of a path."""
        while offset < self.shared[path]:
            path -= 1
        return self.first_entries[path] + offset - self.shared[path]


def build_forest(paths: Sequence[Tokens], depths: Sequence[int], shared: Sequence[int]) -> LabelForest:
    """Lay out paths. Number i begins at position `depths[i]` and has its first `shared[i]` tokens in common with path
    i - 1 (0 for the first)."""
    starts: list[int] = []
    sizes: list[Ints] = []
    first: list[int] = []
    total = 0
    for index, path in enumerate(paths):
        own = len(path) - shared[index]
        first.append(total)
        starts.extend([index] * own)
        width = np.ones(own, np.int32)
        common, follower = len(path), index + 1
        while follower < len(paths):
            common = min(common, shared[follower])
            if common <= shared[index]:
                break
            width[: common - shared[index]] += 1
            follower += 1
        sizes.append(width)
        total += own
    own_tokens = [path[skip:] for path, skip in zip(paths, shared, strict=True)]
    positions = [
        np.arange(depth + skip, depth + len(path), dtype=np.int32)
        for path, depth, skip in zip(paths, depths, shared, strict=True)
    ]
    return LabelForest(
        np.concatenate(own_tokens),
        np.concatenate(positions),
        np.array(starts, np.int32),
        np.concatenate(sizes),
        first,
        list(shared),
    )


@dataclass(eq=False, slots=True)
class LabelWindow:
    """Pieces being computed together: a forest, the sequence ids of its paths, and what is read where."""

    pieces: list[PromptPiece]
    forest: LabelForest
    ids: Ints
    wanted: npt.NDArray[np.int8]
    reads: dict[int, list[tuple[LabelItemState, int]]]
    """By entry: whose node it is."""
    paths_of: list[int]
    """The first path of every piece."""
    cursor: int = 0
    """Entries computed so far."""
    wanted_before: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    found: list[tuple[LabelItemState, int, npt.NDArray[np.float64]]] = field(default_factory=list)
    """What was read so far. It counts once the whole window is computed, so that one that fails leaves no trace."""

    @property
    def tokens(self) -> int:
        return len(self.forest.tokens)

    @property
    def done(self) -> bool:
        return self.cursor >= self.tokens

    def slice_end(self, tokens: int, outputs: int) -> int:
        """Where the next batch ends when it may hold so many tokens and output rows."""
        by_outputs = (
            int(np.searchsorted(self.wanted_before, self.wanted_before[self.cursor] + outputs, side="right")) - 1
        )
        return min(self.cursor + tokens, by_outputs, self.tokens)

    def read_rows(self, stop: int, rows: Iterable[Logits]) -> None:
        """Read the rows of the entries up to `stop`, which are computed now."""
        entries = self.cursor + np.flatnonzero(self.wanted[self.cursor : stop])
        for entry, row in zip(entries.tolist(), rows, strict=True):
            normalizer = compute_log_normalizer(row)
            for item, node in self.reads[entry]:
                self.found.append((item, node, row[item.trie.read_tokens[node]].astype(np.float64) - normalizer))
        self.cursor = stop

    def commit_reads(self) -> None:
        """Let what was read count."""
        for item, node, logprobs in self.found:
            item.search.add_logprobs(node, logprobs)
        self.found.clear()


def build_window(pieces: Sequence[PromptPiece], ids: Sequence[int], *, merge: bool) -> LabelWindow:
    """Lay out pieces (attached to the prefix tree already). `merge` is off for models whose memory cannot be forked."""
    ordered = sorted(pieces, key=lambda piece: (piece.item.cache_salt, piece.item.prompt.tolist()))
    paths: list[Tokens] = []
    depths: list[int] = []
    shared: list[int] = []
    paths_of: list[int] = []
    before: PromptPiece | None = None
    for piece in ordered:
        paths_of.append(len(paths))
        suffix = piece.item.prompt[piece.depth :]
        in_common = count_shared_tokens(before, piece) if merge and before is not None else 0
        for number, chain in enumerate(piece.chains):
            if number and merge:
                in_common = len(suffix) + count_shared_prefix(piece.chains[number - 1], chain)
            paths.append(np.concatenate([suffix, to_token_array(chain)]) if chain else suffix)
            depths.append(piece.depth)
            shared.append(in_common)
        before = piece
    forest = build_forest(paths, depths, shared)
    reads: dict[int, list[tuple[LabelItemState, int]]] = {}
    for piece, path in zip(ordered, paths_of, strict=True):
        _note_reads(piece, path, forest, reads)
        if piece.item.cached_tokens < 0:
            piece.item.cached_tokens = piece.depth + min(shared[path], len(piece.item.prompt) - piece.depth)
    wanted = np.zeros(len(forest.tokens), np.int8)
    wanted[list(reads)] = 1
    before_counts = np.concatenate([[0], np.cumsum(wanted, dtype=np.int64)])
    return LabelWindow(
        ordered, forest, np.array(ids[: len(paths)], np.int32), wanted, reads, paths_of, 0, before_counts
    )


def _note_reads(
    piece: PromptPiece, path: int, forest: LabelForest, reads: dict[int, list[tuple[LabelItemState, int]]]
) -> None:
    end = len(piece.item.prompt) - piece.depth - 1
    for number, (chain, known) in enumerate(zip(piece.chains, piece.fresh, strict=True)):
        for step, node in enumerate(piece.item.trie.list_nodes(chain)):
            if step >= known:
                reads.setdefault(forest.find_entry(path + number, end + step), []).append((piece.item, node))
