"""Label calls in line: which item of which call is taken next, and which calls are answered."""

from collections.abc import Callable, Iterator
from heapq import nsmallest
from itertools import count
from operator import attrgetter
from typing import Final

from appliance.llamacpp.fair_queue import FairQueue
from appliance.llamacpp.kv.prefix_cache import Tokens, to_token_array
from appliance.llamacpp.labels.jobs import LabelItemState, LabelJob, PromptPiece, failed_scores

_EXPECTED_CALLS: Final = 8
"""Calls are served item by item, so what several of them fork is kept: of so many, those that are next."""


class LabelQueue:
    """The label calls of one engine. Its thread only. Calls with equal cache salts are served item by item."""

    def __init__(self, fair_queue: FairQueue) -> None:
        self._fair_queue = fair_queue
        self._jobs: list[LabelJob] = []
        """Calls with items that are not taken yet."""
        self._open: list[LabelJob] = []
        """Calls not answered yet, those with all items taken included."""
        self._answered: list[LabelJob] = []
        self._numbers = count()

    @property
    def has_pieces(self) -> bool:
        """Whether there is anything to take."""
        return bool(self._jobs)

    @property
    def busy(self) -> bool:
        return bool(self._jobs or self._answered)

    @property
    def waiting_tokens(self) -> int:
        return sum(job.waiting_tokens for job in self._open)

    @property
    def untouched_jobs(self) -> int:
        return sum(1 for job in self._jobs if not job.cursor)

    @property
    def open_items(self) -> int:
        return sum(job.open for job in self._open)

    @property
    def priority(self) -> int | None:
        """Of the most urgent call with something to take; None: there is none."""
        return min((job.priority for job in self._jobs), default=None)

    def add(self, job: LabelJob) -> None:
        self._open.append(job)
        job.number = next(self._numbers)
        if job.items:
            self._assign_start_tag(job)
            self._jobs.append(job)
        else:
            self._answered.append(job)

    def remove(self, job: LabelJob) -> None:
        """Take a call out that was cancelled."""
        if job in self._open:
            self._open.remove(job)
        if job in self._jobs:
            self._jobs.remove(job)

    def take_answered(self) -> list[LabelJob]:
        """The calls whose last item was answered since the last time."""
        done = [job for job in self._open if not job.open]
        if done:
            self._open = [job for job in self._open if job.open]
        self._answered.clear()
        return done

    def next_job(self) -> LabelJob:
        """The call that is served next; there must be one."""
        return min(self._jobs, key=attrgetter("rank"))

    def take_piece(
        self,
        prepare: Callable[[LabelJob, int], LabelItemState | str],
        first_pieces: Callable[[LabelItemState], list[PromptPiece]],
    ) -> PromptPiece | None:
        """The next piece of the next call; None where its next item cannot be scored and is answered so.

        `prepare` checks an item, `first_pieces` says what of it is computed first.
        """
        job = self.next_job()
        if not job.pieces:
            index, job.cursor = job.cursor, job.cursor + 1
            self._fair_queue.advance(job.start_tag, len(job.items[index].prompt))
            self._assign_start_tag(job)
            item = prepare(job, index)
            if isinstance(item, str):
                job.answer(index, failed_scores(len(job.items[index].prompt), item))
            else:
                job.pieces = first_pieces(item)
        piece = job.pieces.pop(0) if job.pieces else None
        if not job.untaken:
            self._jobs.remove(job)
        return piece

    def requeue(self, piece: PromptPiece) -> None:
        """A piece that was taken comes first of its call's next time."""
        job = piece.item.job
        job.pieces.insert(0, piece)
        if job not in self._jobs:
            self._jobs.append(job)

    def drop_pieces(self, item: LabelItemState) -> None:
        """Take what is left of an item out."""
        job = item.job
        job.pieces = [other for other in job.pieces if other.item is not item]
        if job in self._jobs and not job.untaken:
            self._jobs.remove(job)

    def list_expected_prompts(self) -> Iterator[tuple[Tokens, str]]:
        """Prompts and cache salts of the pieces that wait, and of the items that are next, each of another call."""
        for job in self._jobs:
            yield from ((piece.item.prompt, piece.item.cache_salt) for piece in job.pieces)
        for job in nsmallest(_EXPECTED_CALLS, self._jobs, key=attrgetter("rank")):
            if job.following is not None:
                yield to_token_array(job.following.prompt), job.following.cache_salt

    def _assign_start_tag(self, job: LabelJob) -> None:
        """Give the next item of a call its place in the fair order."""
        if job.cursor < len(job.items):
            item = job.items[job.cursor]
            job.start_tag = self._fair_queue.assign_start_tag(item.cache_salt, len(item.prompt))
