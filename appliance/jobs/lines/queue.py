"""The lines of one run that are still to be asked, in groups, a few at a time: never all of a batch."""

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from appliance.jobs.deps import JobDeps, JobStopped, group_lines
from appliance.jobs.models import BatchLine, LineAnswer
from appliance.jobs.storage.batch_state import BatchState

_FETCHED_LINES: Final = 128
_FETCHED_BYTES: Final = 4_000_000
_MOST_AGAIN: Final = 256
"""So many lines may wait to be asked again before new ones are left alone."""
_MOST_TRIES: Final = 4
"""Of a line whose target failed; one that was only busy is tried until the deadline."""

LineSelector = Callable[[list[BatchLine]], Awaitable[list[BatchLine]]]


@dataclass(slots=True)
class _RetryLine:
    line: BatchLine
    ready: float


class LineQueue:
    """Lines are fetched in order, and again from where some came back to. None is handed out twice at a time."""

    def __init__(self, deps: JobDeps) -> None:
        self._deps = deps
        self._fetched_to = 0
        self._groups: deque[list[BatchLine]] = deque()
        self._again: list[_RetryLine] = []
        self._tries: dict[int, int] = {}
        self._in_hand: set[int] = set()
        """Fetched, and neither committed nor put back."""

    @property
    def has_retries(self) -> bool:
        return bool(self._again)

    @property
    def next_retry_at(self) -> float:
        """When the next line may be asked again."""
        return min((one.ready for one in self._again), default=float("inf"))

    def mark_done(self, numbers: Iterable[int]) -> None:
        """They are committed, or lie in a provider's batch by what is on disk."""
        self._in_hand.difference_update(numbers)

    def requeue(self, numbers: Sequence[int]) -> None:
        """They wait again, by what is on disk."""
        if numbers:
            self._in_hand.difference_update(numbers)
            self._fetched_to = min(self._fetched_to, min(numbers) - 1)

    def ready_lines(self, group: Sequence[BatchLine]) -> Sequence[BatchLine]:
        """`group`, and what was fetched after it."""
        return [*group, *(line for one in self._groups for line in one)]

    def refetch_group(self, group: Sequence[BatchLine]) -> None:
        """All that is ready is fetched anew: there may be another way for it now."""
        numbers = [line.number for line in self.ready_lines(group)]
        self._groups.clear()
        self.requeue(numbers)

    def retry_later(self, line: BatchLine, answer: LineAnswer) -> bool:
        """Whether the line is to be asked once more, which it will be when its time has come."""
        tries = self._tries.pop(line.number, 0) + 1
        is_busy = answer.status in (429, 503)
        if answer.retry_after_seconds is None or (not is_busy and tries >= _MOST_TRIES):
            return False
        self._tries[line.number] = tries
        pause = max(answer.retry_after_seconds, min(60.0, 2.0 ** min(tries, 6)))
        self._again.append(_RetryLine(line, self._deps.clock() + pause))
        return True

    async def next_group(self, batch_state: BatchState, select: LineSelector) -> list[BatchLine] | None:
        """Lines to be asked in one call; empty where none is ready now, None where `select` took all that was fetched,
        and there may be more.

        Raises JobStopped where the batch's input is gone.
        """
        now = self._deps.clock()
        due = next((one for one in self._again if one.ready <= now), None)
        if due is not None:
            self._again.remove(due)
            return [due.line]
        if not self._groups and len(self._again) < _MOST_AGAIN:
            fetched = await self._fetch(batch_state)
            lines = await select(fetched)
            if fetched and not lines:
                return None
            self._groups += group_lines(lines, self._deps.line_handler.group_key)
        return self._groups.popleft() if self._groups else []

    async def _fetch(self, batch_state: BatchState) -> list[BatchLine]:
        """The next lines that wait and are not in hand."""
        while True:
            more = partial(self._deps.store.list_ready_lines, batch_state.batch.id, self._fetched_to, _FETCHED_LINES)
            places = await batch_state.retry_storage(more)
            size, taken = 0, 0
            while taken < len(places) and (not taken or size + places[taken].length <= _FETCHED_BYTES):
                size, taken = size + places[taken].length, taken + 1
            if not taken:
                return []
            self._fetched_to = places[taken - 1].number
            free = [place for place in places[:taken] if place.number not in self._in_hand]
            if free:
                break
        try:
            lines = list(await batch_state.results.read_lines(free))
        except FileNotFoundError as error:
            raise JobStopped("failed", "input_lost", f"the batch's input cannot be read any more: {error}") from error
        self._in_hand.update(line.number for line in lines)
        return lines
