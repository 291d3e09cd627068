"""Label calls in work: items of all calls are computed a window at a time, and answered.

A window is as many items as fit into what is left of a step; it may last several steps when one item is longer. An item
whose labels are computed in waves (see `search`) is in one window after the other, each time beside items that are new.
Between two windows it holds nothing: its prompt is cached, and computed again where the cells were needed meanwhile.
"""

from collections import deque
from collections.abc import Callable
from typing import Final

from appliance.llamacpp.fair_queue import FairQueue
from appliance.llamacpp.kv.capacity import BatchCapacity
from appliance.llamacpp.kv.prefix_cache import PrefixCache, PrefixNode, Tokens, count_common_prefix, to_token_array
from appliance.llamacpp.labels.jobs import (
    LabelItemState,
    LabelJob,
    LabelWindow,
    PromptPiece,
    build_window,
    count_shared_tokens,
    prepare_item,
    split_into_pieces,
)
from appliance.llamacpp.labels.queue import LabelQueue
from appliance.llamacpp.labels.search import SearchBudget
from appliance.llamacpp.model import LlamaModel

_PATHS: Final = 96
"""Sequence ids a window may take; the others are left to running sequences and to cached prefixes."""
_CHAINS_AT_ONCE: Final = 80
"""Ids one item may take; items with more chains are computed in several pieces."""
_SEARCHES_AT_ONCE: Final = 32
"""Items that may begin a search in one window: between two waves the prompt of each takes an id in the prefix tree."""
_RECENT_PROMPTS: Final = 8
"""Prompts remembered (as tokens, not cells): what the next one shares with any of them is worth caching."""
_WORTH_CACHING_TOKENS: Final = 16


class LabelScorer:
    """Computes label calls for a StepRunner. The engine's thread only.

    `measure_capacity` gives the KV cells in use and promised.
    """

    def __init__(
        self,
        model: LlamaModel,
        prefix_cache: PrefixCache,
        free_ids: list[int],
        fair_queue: FairQueue,
        measure_capacity: Callable[[], BatchCapacity],
    ) -> None:
        self._model, self._batch = model, model.batch
        self._prefix_cache, self._free_ids = prefix_cache, free_ids
        self._measure_capacity, self._search_budget = measure_capacity, SearchBudget()
        self.queue = LabelQueue(fair_queue)
        self._max_paths = _PATHS if model.forkable else 1
        self._suspects = 0
        """So many items in a row are computed alone: one of them made a step fail."""
        self._window: LabelWindow | None = None
        self._stop = 0
        """Where the part of the window ends that is in the batch; 0: none is."""
        self._recent: deque[tuple[str, Tokens]] = deque(maxlen=_RECENT_PROMPTS)

    @property
    def busy(self) -> bool:
        return self.queue.busy or self._window is not None

    @property
    def window_tokens(self) -> int:
        """Cells the window in work holds or will hold."""
        return self._window.tokens if self._window else 0

    @property
    def priority(self) -> int | None:
        """Of the most urgent work there is; None: there is none."""
        waiting = self.queue.priority
        if self._window is None:
            return waiting
        urgent = min(piece.item.job.priority for piece in self._window.pieces)
        return urgent if waiting is None else min(waiting, urgent)

    @property
    def in_step(self) -> set[LabelJob]:
        """The calls whose items are in the batch."""
        return {piece.item.job for piece in self._window.pieces} if self._window is not None and self._stop else set()

    @property
    def isolates_suspects(self) -> bool:
        """Items have to be computed alone to find the one that makes steps fail."""
        return bool(self._suspects and self.busy)

    def touch_expected_prefixes(self) -> int:
        """Mark the prefixes that the next items fork as used, so that they are the last to go; give their cells."""
        warm: set[PrefixNode] = set()
        if not self._model.forkable:
            return 0
        for prompt, cache_salt in self.queue.list_expected_prompts():
            node: PrefixNode | None = self._prefix_cache.match(prompt, cache_salt, len(prompt)).node
            while node is not None and node not in warm:
                warm.add(node)
                node = node.parent
        return sum(len(node.tokens) for node in warm)

    def cancel(self, job: LabelJob) -> None:
        """Drop a call. A window in work goes on when it holds items of others too."""
        job.cancelled = True
        self.queue.remove(job)
        if self._window is not None and all(piece.item.job.cancelled for piece in self._window.pieces):
            self._close_window(keep_prefixes=False)

    def fill_batch(self, tokens: int, *, alone: bool, urgent: int) -> None:
        """Add up to `tokens` of label work to the batch. `alone`: nothing else holds KV cells or will free any;
        `urgent`: what is less urgent than that holds still."""
        self._stop = 0
        priority = self.priority
        if priority is not None and priority > urgent:
            return
        if self._window is None and self.queue.has_pieces and tokens > 0:
            self._open_window(tokens, alone)
        window = self._window
        if window is None:
            return
        stop = window.slice_end(min(tokens, self._batch.free_tokens), self._batch.free_outputs)
        if stop <= window.cursor:
            return
        part, forest = slice(window.cursor, stop), window.forest
        self._batch.add_forks(
            forest.tokens[part],
            forest.positions[part],
            forest.starts[part],
            forest.sizes[part],
            window.wanted[part],
            window.ids,
        )
        self._stop = stop

    def read_rows(self, first_row: int) -> None:
        """Take the rows of what `fill` added, once it is decoded."""
        if not self._stop or self._window is None:
            return
        self._window.read_rows(self._stop, self._model.rows[first_row:])
        self._stop = 0
        if self._window.done:
            self._close_window(keep_prefixes=True)

    def recover(self, reason: str, *, alone: bool) -> None:
        """The decode of what `fill` added failed, and memory is cleared next. An item that was alone in it gets the
        reason; of several it is unknown which it was, so they come again one by one."""
        if self._window is None:
            return
        items = {id(piece.item): piece.item for piece in self._window.pieces}
        if self._stop and alone and len(items) == 1:
            for item in items.values():
                item.fail(reason)
                self.queue.drop_pieces(item)
            self._suspects = max(0, self._suspects - 1)
            self._close_window(keep_prefixes=False)
            return
        if self._stop:
            self._suspects = len(items)
        self.requeue_window()

    def requeue_window(self) -> None:
        """Take the window in work apart; its items are taken first next time. Nothing of it counts."""
        window = self._window
        if window is None:
            return
        self._close_window(keep_prefixes=False)
        for piece in reversed(window.pieces):
            if not piece.item.job.cancelled:
                self.queue.requeue(piece)

    # Windows.

    def _open_window(self, tokens: int, alone: bool) -> None:
        pieces: list[PromptPiece] = []
        total = paths = searches = 0
        while total < tokens and self.queue.has_pieces and not (self._suspects and pieces):
            if pieces and self.queue.next_job().priority > pieces[0].item.job.priority:
                break  # a window is computed to its end, and what is urgent does not wait for what is not
            piece = self.queue.take_piece(self._prepare_item, self._first_pieces)
            if piece is None:
                continue
            self._attach(piece)
            needed = self._count_needed(piece, pieces)
            searches += piece.starts_search
            crowded = bool(pieces) and (
                total + needed > tokens or paths + len(piece.chains) > self._max_paths or searches > _SEARCHES_AT_ONCE
            )
            if crowded or not self._fits(total + needed, paths + len(piece.chains)):
                self._refuse_or_requeue(piece, impossible=alone and not pieces)
                break
            pieces.append(piece)
            total += needed
            paths += len(piece.chains)
        if not pieces:
            return
        ids = [self._free_ids.pop() for _ in range(paths)]
        self._window = window = build_window(pieces, ids, merge=self._model.forkable)
        self._evict_for_window()
        for piece, first in zip(window.pieces, window.paths_of, strict=True):
            if piece.node is not None:
                for path in range(first, first + len(piece.chains)):
                    self._prefix_cache.share_cells(piece.node, int(window.ids[path]), 0, piece.depth)

    def _prepare_item(self, job: LabelJob, index: int) -> LabelItemState | str:
        return prepare_item(job, index, self._model.sequence_context_tokens, self._model.vocabulary_size)

    def _first_pieces(self, item: LabelItemState) -> list[PromptPiece]:
        """The whole trie, or the prompt alone where the rest depends on what is read at its end."""
        if not self._model.forkable:
            return split_into_pieces(item, item.trie.chains, 1)
        searches = self._search_budget.is_worth_searching(
            item.trie, len(item.job.items), item.job.items[item.index].tolerance
        )
        return split_into_pieces(item, [()] if searches else item.trie.chains, _CHAINS_AT_ONCE)

    def _refuse_or_requeue(self, piece: PromptPiece, *, impossible: bool) -> None:
        """A piece that does not fit now comes first next time, or is refused where it could never fit."""
        self._detach(piece)
        if impossible:
            piece.item.fail(
                f"prompt and labels take {piece.tokens} tokens of memory and there are {self._model.context_tokens}: "
                "shorten the text or use fewer labels"
            )
            self.queue.drop_pieces(piece.item)
        else:
            self.queue.requeue(piece)

    def _attach(self, piece: PromptPiece) -> None:
        if self._model.forkable:
            match = self._prefix_cache.match(
                piece.item.prompt, piece.item.cache_salt, len(piece.item.prompt) - piece.reads_prompt
            )
            self._prefix_cache.pin(match.node)
            piece.node, piece.depth = match.node, match.depth

    def _detach(self, piece: PromptPiece) -> None:
        self._unpin(piece)
        piece.depth = 0

    def _unpin(self, piece: PromptPiece) -> None:
        if piece.node is not None:
            self._prefix_cache.unpin(piece.node)
        piece.node = None

    def _count_needed(self, piece: PromptPiece, pieces: list[PromptPiece]) -> int:
        """Cells a piece adds to a window; what it shares with the piece before it is computed once."""
        if not pieces or not self._model.forkable:
            return piece.tokens
        return piece.tokens - count_shared_tokens(pieces[-1], piece)

    def _fits(self, tokens: int, paths: int) -> bool:
        return self._measure_capacity().fits(tokens) and self._prefix_cache.free_up_ids(paths)

    def _evict_for_window(self) -> None:
        """Make the cells free that `_fits` found to be only cached; running sequences keep what they were promised."""
        room = self._measure_capacity()
        self._prefix_cache.evict(room.used + room.promised + self._prefix_cache.evictable_tokens - room.capacity)

    def _close_window(self, *, keep_prefixes: bool) -> None:
        """Give back what the window holds. `keep_prefixes`: it was computed, so it counts, and its items go on."""
        window, self._window, self._stop = self._window, None, 0
        assert window is not None
        over = self._commit_window(window) if keep_prefixes else set()
        seen: set[LabelItemState] = set()
        for piece, path in zip(window.pieces, window.paths_of, strict=True):
            sequence, first = int(window.ids[path]), piece.item not in seen
            seen.add(piece.item)
            if keep_prefixes and first and self._model.forkable:
                self._keep_prefix(piece, sequence, over=piece.item in over)
            self._detach(piece)
        for sequence in window.ids.tolist():
            self._model.memory_remove(sequence, 0)
            self._free_ids.append(sequence)

    def _commit_window(self, window: LabelWindow) -> set[LabelItemState]:
        """Let what was read count: answer the items that are done, and queue the next wave of those that are not.

        Gives the items of which nothing follows.
        """
        window.commit_reads()
        over: set[LabelItemState] = set()
        for item in (piece.item for piece in window.pieces):
            item.pieces_open -= 1
            if item.job.cancelled:
                over.add(item)
            elif not item.pieces_open:
                chains = item.plan_next_chains()
                for following in reversed(split_into_pieces(item, chains, _CHAINS_AT_ONCE)):
                    self.queue.requeue(following)
                if not chains:
                    if item.search.spent_tokens:
                        self._search_budget.observe(item.search)
                    item.answer()
                    over.add(item)
        self._suspects = max(0, self._suspects - len(over))
        return over

    def _keep_prefix(self, piece: PromptPiece, sequence: int, *, over: bool) -> None:
        """Cache what the prompt shares with a recent one or with the call's next item; all of it where more of the same
        item follows."""
        prompt, cache_salt, following = piece.item.prompt, piece.item.cache_salt, piece.item.job.following
        shared, worth = len(prompt), 1
        if over:
            if piece.depth == len(prompt):  # cached for this item's waves only
                self._unpin(piece)
                self._prefix_cache.discard(prompt, cache_salt)
            worth = _WORTH_CACHING_TOKENS
            shared = max(
                (count_common_prefix(prompt, other) for kept, other in self._recent if kept == cache_salt), default=0
            )
            self._recent.append((cache_salt, prompt))
            if following is not None and following.cache_salt == cache_salt:
                shared = max(shared, count_common_prefix(prompt, to_token_array(following.prompt)))
        if shared - self._prefix_cache.count_cached(prompt[:shared], cache_salt) >= worth:
            self._prefix_cache.insert(
                prompt[:shared],
                cache_salt,
                sequence,
                min(piece.depth, self._prefix_cache.count_cached(prompt, cache_salt)),
            )
