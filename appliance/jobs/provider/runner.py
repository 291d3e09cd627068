"""Which lines of one run leave in providers' own batches, and when. What becomes of each batch is in `lifecycle`."""

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from appliance.core import Residency
from appliance.jobs.deps import JobDeps
from appliance.jobs.lines.queue import LineQueue
from appliance.jobs.models import BatchLine, BatchTerms, ProviderBatch
from appliance.jobs.provider.lifecycle import SPARE_SHARE, ProviderBatchLifecycle
from appliance.jobs.storage.batch_state import BatchState
from appliance.router.provider_batches import PreparedLine
from appliance.upstream.provider_batches import MAX_BYTES, MAX_LINES

GATHERING_SECONDS: Final = 60.0
"""How long lines wait for others to leave with them, while the ones between them are asked the usual way."""
_MIN_LATE_LINES: Final = 20
"""So many lines are worth a batch, where they only leave because they would be late."""


@dataclass(slots=True)
class _Gathering:
    """Lines that are going to leave together."""

    started_at: float
    prepared: dict[int, PreparedLine] = field(default_factory=dict)
    size_bytes: int = 0

    def has_room(self, line: PreparedLine) -> bool:
        return len(self.prepared) < MAX_LINES and self.size_bytes + line.size_bytes <= MAX_BYTES


class ProviderBatchRunner:
    """`select_lines` of what is fetched, `send_gathered` once no more comes, `withdraw` when the run has to end."""

    def __init__(
        self, deps: JobDeps, batch_state: BatchState, queue: LineQueue, make_terms: Callable[[bool], BatchTerms]
    ) -> None:
        """`make_terms` gives the terms of now, for lines that would be late or not."""
        self._deps, self._batch_state, self._make_terms = deps, batch_state, make_terms
        self._lifecycle = ProviderBatchLifecycle(deps, batch_state, queue, make_terms)
        self._gatherings: dict[tuple[str, str], _Gathering] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def error(self) -> Exception | None:
        """Why its lines cannot come back; the run is to end with it."""
        return self._lifecycle.error

    @property
    def lines(self) -> int:
        """Lines on their way in providers' batches, or gathered for one."""
        return self._lifecycle.lines

    @property
    def is_busy(self) -> bool:
        return bool(self._tasks)

    def wake(self) -> None:
        self._lifecycle.wake()

    def has_time(self) -> bool:
        """Whether a provider that is known to be cheaper so has the time that it may take."""
        deps, now = self._deps, self._deps.wall_clock()
        window = deps.config.provider_batch_seconds * (1.0 + SPARE_SHARE)
        if deps.provider_lines is None or self._lifecycle.is_withdrawing:
            return False
        if self._batch_state.batch.expires_at - now < window:
            return False
        residency, submitter = Residency.parse(self._batch_state.batch.residency), deps.provider_lines.submitter
        return any(submitter.takes(target) and residency.allows(target) for target in deps.state.snapshot.targets)

    def would_take(self, lines: Sequence[BatchLine], late_lines: int) -> bool:
        """Whether lines that are ready to be asked the usual way had better be selected anew: they will be late."""
        singly = self._lifecycle.asked_singly
        return late_lines >= _MIN_LATE_LINES and any(line.number not in singly for line in lines) and self._is_open()

    def _is_open(self) -> bool:
        return self._deps.clock() >= self._lifecycle.paused_until and self.has_time()

    async def resume(self) -> None:
        """Go on with what was sent, or was about to be, before a restart."""
        store, batch_state = self._deps.store, self._batch_state
        for provider_batch in await batch_state.retry_storage(
            partial(store.list_provider_batches, batch_state.batch.id)
        ):
            if self._deps.provider_lines is None:  # nothing can ask about it any more; its money stays reserved
                await batch_state.retry_storage(partial(store.end_provider_batch, provider_batch))
                continue
            self._lifecycle.lines += await batch_state.retry_storage(partial(store.count_unanswered, provider_batch))
            self._spawn(self._lifecycle.follow(provider_batch, is_resumed=True))

    async def select_lines(self, lines: list[BatchLine], late_lines: int) -> list[BatchLine]:
        """What is to be asked the usual way; the rest is gathered.

        `late_lines`: so many more lines should leave the site than are on their way.
        """
        provider_lines, asked_singly = self._deps.provider_lines, self._lifecycle.asked_singly
        if provider_lines is None or not lines or not self._is_open():
            self.send_gathered()
            return lines
        leaving = late_lines if late_lines >= _MIN_LATE_LINES or self._gatherings else 0
        willing = [line for line in lines if line.number not in asked_singly]
        prepared: dict[int, PreparedLine] = {}
        for part, is_late in ((willing[:leaving], True), (willing[leaving:], False)):
            found = await provider_lines.prepare_lines(part, self._make_terms(is_late)) if part else ()
            prepared |= {line.number: one for line, one in zip(part, found, strict=True) if one is not None}
            if is_late:  # what cannot leave so is not tried over and over
                asked_singly.update(line.number for line, one in zip(part, found, strict=True) if one is None)
        for number, one in prepared.items():
            self._gather(number, one)
        if not prepared or 0 < leaving < len(willing):
            self.send_gathered()
        return [line for line in lines if line.number not in prepared]

    def send_gathered(self, older_than_seconds: float = 0.0) -> None:
        before = self._deps.clock() - older_than_seconds
        for key, gathering in tuple(self._gatherings.items()):
            if gathering.started_at <= before:
                self._send(key)

    async def withdraw(self) -> None:
        """Cancel what is on its way, take what was done of it, and put the rest back."""
        self._lifecycle.is_withdrawing = True
        self._gatherings.clear()
        while self._tasks:
            self._lifecycle.wake()
            await asyncio.wait(self._tasks, timeout=1.0)

    async def stop(self) -> None:
        """Leave everything as it is, for the next run to go on with."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _gather(self, number: int, line: PreparedLine) -> None:
        key = line.target.name, line.endpoint
        gathering = self._gatherings.get(key)
        if gathering is not None and not gathering.has_room(line):
            self._send(key)
            gathering = None
        if gathering is None:
            gathering = self._gatherings[key] = _Gathering(self._deps.clock())
        gathering.prepared[number] = line
        gathering.size_bytes += line.size_bytes
        self._lifecycle.lines += 1

    def _send(self, key: tuple[str, str]) -> None:
        gathering, batch_id = self._gatherings.pop(key), self._batch_state.batch.id
        name = f"{batch_id}-{secrets.token_hex(6)}"
        provider_batch = ProviderBatch(name, batch_id, key[0], self._deps.wall_clock())
        self._spawn(self._lifecycle.begin(provider_batch, gathering.prepared))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._guard(work), name=f"jobs {self._batch_state.batch.id} provider batch")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # its lines stay where they are on disk, and the next start goes on with them
            self._lifecycle.error = error
        finally:
            self._batch_state.wake()
