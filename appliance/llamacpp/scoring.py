"""Label calls in work: takes items from the calls in turn, computes them a window at a time, and answers.

A window is as many items as fit into what is left of a step; it may last several steps when one item is longer.
"""

from collections import deque
from collections.abc import Callable
from typing import Final

from appliance.llamacpp.labels import Piece, ScoreJob, Window, cut, failed, judge, open_window
from appliance.llamacpp.model import Model
from appliance.llamacpp.prefix import PrefixTree, Tokens, common_prefix
from appliance.llamacpp.scheduler import Room

_PATHS: Final = 128
"""Sequence ids a window may take; the others are left to running sequences and to cached prefixes."""
_CHAINS_AT_ONCE: Final = 96
"""Ids one item may take; items with more chains are computed in several pieces."""
_RECENT_PROMPTS: Final = 8
"""Prompts remembered (as tokens, not cells): what the next one shares with any of them is worth caching."""
_WORTH_CACHING_TOKENS: Final = 16


class Scorer:
    """The label side of a runner; its thread only. `room` tells the KV cells in use and promised."""

    def __init__(self, model: Model, tree: PrefixTree, free_ids: list[int], room: Callable[[], Room]) -> None:
        self._model, self._batch, self._tree, self._free_ids, self._room = model, model.batch, tree, free_ids, room
        self._paths = _PATHS if model.forkable else 1
        self._jobs: deque[ScoreJob] = deque()
        self._open: list[ScoreJob] = []
        """Calls not answered yet, those with all items taken included."""
        self._answered: list[ScoreJob] = []
        self._window: Window | None = None
        self._stop = 0
        """Where the part of the window ends that is in the batch; 0: none is."""
        self._recent: deque[tuple[str, Tokens]] = deque(maxlen=_RECENT_PROMPTS)

    @property
    def busy(self) -> bool:
        return bool(self._jobs or self._window or self._answered)

    @property
    def window_tokens(self) -> int:
        """Cells the window in work holds or will hold."""
        return self._window.tokens if self._window else 0

    @property
    def waiting_tokens(self) -> int:
        return sum(job.waiting_tokens for job in self._open)

    @property
    def untouched_jobs(self) -> int:
        return sum(1 for job in self._jobs if not job.cursor)

    def add(self, job: ScoreJob) -> None:
        self._open.append(job)
        if job.items:
            self._jobs.append(job)
        else:
            self._answered.append(job)

    def cancel(self, job: ScoreJob) -> None:
        """Drop a call. A window in work goes on when it holds items of others too."""
        job.cancelled = True
        if job in self._open:
            self._open.remove(job)
        if job in self._jobs:
            self._jobs.remove(job)
        if self._window is not None and all(piece.item.job.cancelled for piece in self._window.pieces):
            self._close(keep_prefixes=False)

    def take_answered(self) -> list[ScoreJob]:
        """The calls whose last item was answered since the last time."""
        done = [job for job in self._open if not job.open]
        if done:
            self._open = [job for job in self._open if job.open]
        self._answered.clear()
        return done

    def fill(self, tokens: int, *, alone: bool) -> None:
        """Add up to `tokens` of label work to the batch. `alone`: nobody else holds KV cells or will free any."""
        self._stop = 0
        if self._window is None and self._jobs and tokens > 0:
            self._open_window(tokens, alone)
        window = self._window
        if window is None:
            return
        stop = window.slice_end(min(tokens, self._batch.room_tokens), self._batch.room_outputs)
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

    def read(self, first_row: int) -> None:
        """Take the rows of what `fill` added, once it is decoded."""
        if not self._stop or self._window is None:
            return
        self._window.take(self._stop, self._model.rows[first_row:])
        self._stop = 0
        if self._window.done:
            self._close(keep_prefixes=True)

    def fail(self, reason: str) -> None:
        """The decode of what `fill` added failed: the items of the window get the reason."""
        if self._window is not None:
            for piece in self._window.pieces:
                piece.item.fail(reason)
            self._close(keep_prefixes=False)

    # Windows.

    def _open_window(self, tokens: int, alone: bool) -> None:
        pieces: list[Piece] = []
        total = paths = 0
        while total < tokens and self._jobs:
            piece = self._next_piece()
            if piece is None:
                continue
            self._attach(piece)
            needed = self._needed(piece, pieces)
            crowded = bool(pieces) and (total + needed > tokens or paths + len(piece.chains) > self._paths)
            if crowded or not self._fits(total + needed, paths + len(piece.chains)):
                self._give_back(piece, impossible=alone and not pieces)
                break
            pieces.append(piece)
            total += needed
            paths += len(piece.chains)
        if not pieces:
            return
        ids = [self._free_ids.pop() for _ in range(paths)]
        self._window = window = open_window(pieces, ids, merge=self._model.forkable)
        self._evict_for_window()
        for piece, first in zip(window.pieces, window.paths_of, strict=True):
            if piece.node is not None:
                for path in range(first, first + len(piece.chains)):
                    self._tree.share(piece.node, int(window.ids[path]), 0, piece.depth)

    def _next_piece(self) -> Piece | None:
        """The next piece of the calls in turn, so that a small call need not wait for a large one."""
        job = self._jobs[0]
        self._jobs.rotate(-1)
        if not job.pieces:
            index, job.cursor = job.cursor, job.cursor + 1
            item = judge(job, index, self._model.sequence_context_tokens, self._model.vocabulary_size)
            if isinstance(item, str):
                job.answer(index, failed(len(job.items[index].prompt), item))
            else:
                job.pieces = cut(item, _CHAINS_AT_ONCE if self._model.forkable else 1)
        piece = job.pieces.pop(0) if job.pieces else None
        if not job.pieces and job.cursor >= len(job.items):
            self._jobs.remove(job)
        return piece

    def _give_back(self, piece: Piece, *, impossible: bool) -> None:
        """A piece that does not fit now comes first next time, or is refused where it could never fit."""
        self._detach(piece)
        job = piece.item.job
        if impossible:
            piece.item.fail(
                f"prompt and labels take {piece.tokens} tokens of memory and there are {self._model.context_tokens}: "
                "shorten the text or use fewer labels"
            )
            job.pieces = [other for other in job.pieces if other.item is not piece.item]
            if job in self._jobs and not job.pieces and job.cursor >= len(job.items):
                self._jobs.remove(job)
            return
        job.pieces.insert(0, piece)
        if job in self._jobs:
            self._jobs.remove(job)
        self._jobs.appendleft(job)

    def _attach(self, piece: Piece) -> None:
        if self._model.forkable:
            match = self._tree.match(piece.item.prompt, piece.item.salt, len(piece.item.prompt) - 1)
            self._tree.pin(match.node)
            piece.node, piece.depth = match.node, match.depth

    def _detach(self, piece: Piece) -> None:
        if piece.node is not None:
            self._tree.unpin(piece.node)
        piece.node, piece.depth = None, 0

    def _needed(self, piece: Piece, pieces: list[Piece]) -> int:
        """Cells a piece adds to a window; what it shares with the piece before it is computed once."""
        if not pieces or not self._model.forkable:
            return piece.tokens
        before = pieces[-1]
        if before.depth != piece.depth or before.item.salt != piece.item.salt:
            return piece.tokens
        return piece.tokens - common_prefix(before.item.prompt[piece.depth :], piece.item.prompt[piece.depth :])

    def _fits(self, tokens: int, paths: int) -> bool:
        return self._room().fits(tokens) and self._tree.free_up_ids(paths)

    def _evict_for_window(self) -> None:
        """Make the cells free that `_fits` found to be only cached; running sequences keep what they were promised."""
        room = self._room()
        self._tree.evict(room.used + room.promised + self._tree.evictable_tokens - room.capacity)

    def _close(self, *, keep_prefixes: bool) -> None:
        window, self._window, self._stop = self._window, None, 0
        assert window is not None
        if keep_prefixes and self._model.forkable:
            for piece, path in zip(window.pieces, window.paths_of, strict=True):
                self._keep_prefix(piece, int(window.ids[path]))
        for sequence in window.ids.tolist():
            self._model.memory_remove(sequence, 0)
            self._free_ids.append(sequence)
        for piece in window.pieces:
            self._detach(piece)
            if keep_prefixes:
                piece.item.close_piece()

    def _keep_prefix(self, piece: Piece, sequence: int) -> None:
        """Cache what the prompt shares with a recent one; all of it where another piece of the same item follows."""
        prompt, salt = piece.item.prompt, piece.item.salt
        if piece.item.pieces_open > 1:
            shared = len(prompt)
        else:
            shared = max((common_prefix(prompt, other) for kept, other in self._recent if kept == salt), default=0)
            self._recent.append((salt, prompt))
        if shared - self._tree.depth(prompt[:shared], salt) >= _WORTH_CACHING_TOKENS:
            self._tree.insert(prompt[:shared], salt, sequence, piece.depth)
