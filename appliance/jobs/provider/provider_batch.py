"""The lines of one run that leave in providers' own batches, and come back. Read `_carry` first.

A parcel is on disk before it is sent, under a name that stands in the provider's metadata: after a crash it is looked
for there, and adopted, before any of its lines is asked again. Whatever a provider does not answer waits again.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import structlog

from appliance.core import Residency
from appliance.errors import (
    ApplianceError,
    BackendAuth,
    BackendRefused,
    BackendUnreachable,
    RequestError,
    ResidencyRefused,
    Unauthorized,
    Unavailable,
)
from appliance.jobs.deps import JobDeps
from appliance.jobs.lines.queue import LineQueue
from appliance.jobs.models import BatchLine, BatchTerms, LineAnswer
from appliance.jobs.provider.models import ProviderBatch, ProviderBatchLines, SealedLine, line_number
from appliance.jobs.storage.batch_state import BatchState
from appliance.upstream.provider_batches import MAX_BYTES, MAX_LINES, BatchResult, BatchStatus

_SPARE_SHARE: Final = 0.1
"""Of the time a provider may take: what is left for asking singly whatever it did not answer."""
GATHERING_SECONDS: Final = 60.0
"""How long lines wait for others to leave with them, while the ones between them are asked the usual way."""
_FEWEST_LATE: Final = 20
"""So many lines are worth a batch, where they only leave because they would be late."""
_RESERVED_AT_ONCE: Final = 64
_READ_AT_ONCE: Final = 64
_FIRST_LOOK_SECONDS: Final = 5.0
_LAST_LOOK_SECONDS: Final = 120.0
_WITHDRAWING_SECONDS: Final = 900.0
"""How long a provider may take to cancel: OpenAI says up to ten minutes."""
_REFUSED_SECONDS: Final = 60.0
"""After a batch could not be sent none is tried for so long."""

_NEVER: Final = object()

_log = structlog.stdlib.get_logger(__name__)


@dataclass(slots=True)
class _Gathering:
    """Lines that are going to leave together."""

    begun: float
    sealed: dict[int, SealedLine] = field(default_factory=dict)
    size_bytes: int = 0

    def takes(self, one: SealedLine) -> bool:
        return len(self.sealed) < MAX_LINES and self.size_bytes + one.size_bytes <= MAX_BYTES


class ProviderBatchRunner:
    """One run's. `sift` what is fetched; `close` what was gathered once no more comes; `wind_up` when it has to end."""

    def __init__(
        self, deps: JobDeps, batch_state: BatchState, queue: LineQueue, terms: Callable[[bool], BatchTerms]
    ) -> None:
        """`terms` of now, for lines that would be late or not."""
        self._deps, self._batch_state, self._queue, self._terms = deps, batch_state, queue, terms
        self._gatherings: dict[tuple[str, str], _Gathering] = {}
        self._alone: set[int] = set()
        """Lines that came back once: they are asked the usual way."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._woken = asyncio.Event()
        self._withdraws = False
        self.error: Exception | None = None
        """Why its lines cannot come back; the run is to end with it."""
        self._not_before = float("-inf")
        self.lines = 0
        """In parcels on their way, or gathered for one."""

    @property
    def is_busy(self) -> bool:
        return bool(self._tasks)

    @property
    def has_gathered(self) -> bool:
        return bool(self._gatherings)

    def nudge(self) -> None:
        self._woken.set()

    def has_time(self) -> bool:
        """Whether a provider that is known to be cheaper so has the time that it may take."""
        deps, now = self._deps, self._deps.wall_clock()
        window = deps.config.provider_batch_seconds * (1.0 + _SPARE_SHARE)
        if deps.provider_batches is None or self._withdraws or self._batch_state.batch.expires_at - now < window:
            return False
        bound = Residency.parse(self._batch_state.batch.residency)
        targets = deps.state.snapshot.targets
        return any(deps.provider_batches.takes(target) and bound.allows(target) for target in targets)

    def wants(self, lines: Sequence[BatchLine], late: int) -> bool:
        """Whether lines that are ready to be asked the usual way had better be sifted anew: they will be late."""
        is_worth_it = late >= _FEWEST_LATE and any(line.number not in self._alone for line in lines)
        return is_worth_it and self._is_open()

    def _is_open(self) -> bool:
        return self._deps.clock() >= self._not_before and self.has_time()

    async def resume(self) -> None:
        """Go on with what was sent, or was about to be, before a restart."""
        for provider_batch in await self._batch_state.retry_storage(
            partial(self._deps.store.list_provider_batches, self._batch_state.batch.id)
        ):
            if self._deps.provider_batches is None:  # nobody can ask about it any more; its money stays put aside
                await self._batch_state.retry_storage(partial(self._deps.store.end_provider_batch, provider_batch))
                continue
            self.lines += await self._batch_state.retry_storage(
                partial(self._deps.store.count_unanswered, provider_batch)
            )
            self._spawn(self._carry(provider_batch, resumed=True))

    async def sift(self, lines: list[BatchLine], late: int) -> list[BatchLine]:
        """What is to be asked the usual way. `late`: so many more lines should leave the site than are on their way."""
        posting = self._deps.provider_batches
        if posting is None or not lines or not self._is_open():
            self.close()
            return lines
        leaving = late if late >= _FEWEST_LATE or self.has_gathered else 0
        willing = [line for line in lines if line.number not in self._alone]
        sealed: dict[int, SealedLine] = {}
        for part, is_late in ((willing[:leaving], True), (willing[leaving:], False)):
            found = await posting.made_ready(part, self._terms(is_late)) if part else ()
            sealed |= {line.number: one for line, one in zip(part, found, strict=True) if one is not None}
            if is_late:  # what cannot leave so is not tried over and over
                self._alone.update(line.number for line, one in zip(part, found, strict=True) if one is None)
        for number, one in sealed.items():
            self._gather(number, one)
        if not sealed or 0 < leaving < len(willing):
            self.close()
        return [line for line in lines if line.number not in sealed]

    def close(self, older_than_seconds: float = 0.0) -> None:
        """Send what was gathered."""
        before = self._deps.clock() - older_than_seconds
        for key, gathering in tuple(self._gatherings.items()):
            if gathering.begun <= before:
                self._post(key)

    async def wind_up(self) -> None:
        """Cancel what is on its way, take what was done of it, and put the rest back."""
        self._withdraws = True
        self._gatherings.clear()
        while self._tasks:
            self._woken.set()
            await asyncio.wait(self._tasks, timeout=1.0)

    async def stop(self) -> None:
        """Leave everything as it is, for the next run to go on with."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _gather(self, number: int, one: SealedLine) -> None:
        key = one.target.name, one.endpoint
        gathering = self._gatherings.get(key)
        if gathering is not None and not gathering.takes(one):
            self._post(key)
            gathering = None
        if gathering is None:
            gathering = self._gatherings[key] = _Gathering(self._deps.clock())
        gathering.sealed[number] = one
        gathering.size_bytes += one.size_bytes
        self.lines += 1

    def _post(self, key: tuple[str, str]) -> None:
        gathering = self._gatherings.pop(key)
        name = f"{self._batch_state.batch.id}-{secrets.token_hex(6)}"
        provider_batch = ProviderBatch(name, self._batch_state.batch.id, key[0], self._deps.wall_clock())
        self._spawn(self._begin(provider_batch, gathering.sealed))

    # One parcel.

    async def _begin(self, provider_batch: ProviderBatch, sealed: dict[int, SealedLine]) -> None:
        """Money first, then the intent on disk, then the provider."""
        tickets = dict[int, str]()
        try:
            await self._reserve(sealed, tickets)
            if tickets and not self._withdraws:
                await self._batch_state.retry_storage(
                    partial(self._deps.store.add_provider_batch, provider_batch, tickets)
                )
        except BaseException:
            self._release(tickets)
            raise
        if self._withdraws:
            self._release(tickets)
            return
        self._return([number for number in sealed if number not in tickets])
        if tickets:
            self._queue.mark_done(tickets)
            await self._send(provider_batch, [one for number, one in sealed.items() if number in tickets])

    async def _send(self, provider_batch: ProviderBatch, sealed: Sequence[SealedLine]) -> None:
        _log.info(
            "lines leave in a provider's batch",
            provider_batch=provider_batch.name,
            target=provider_batch.target,
            lines=len(sealed),
        )

        async def note(uploaded: str) -> None:
            nonlocal provider_batch
            provider_batch = replace(provider_batch, uploaded=uploaded)
            await self._batch_state.retry_storage(partial(self._deps.store.save_provider_batch, provider_batch))

        try:
            remote_id = await self._posting.send(provider_batch, sealed, note)
            provider_batch = await self._known_as(provider_batch, remote_id)
        except ApplianceError as error:
            self._not_before = self._deps.clock() + _REFUSED_SECONDS
            self._batch_state.reason = f"a provider's batch was not made: {error.message}"
            _log.warning("a provider's batch was not made", provider_batch=provider_batch.name, reason=error.message)
            if _was_not_made(error):
                await self._forget(provider_batch, None)
                await self._end(provider_batch, bills_nothing=True)
                return
        await self._carry(provider_batch)

    async def _carry(self, provider_batch: ProviderBatch, *, resumed: bool = False) -> None:
        """From wherever it stands to its end. `resumed`: a restart may have kept it from being sent."""
        if provider_batch.remote_id is None:
            found = await self._persist(partial(self._posting.find, provider_batch))
            if found is None or found is _NEVER:
                was_not_made = found is None and self._posting.finds(provider_batch)
                await self._end(provider_batch, bills_nothing=was_not_made, alone=not (resumed and was_not_made))
                return
            provider_batch = await self._known_as(provider_batch, found)
        if not await self._batch_state.retry_storage(partial(self._deps.store.count_unanswered, provider_batch)):
            await self._forget(provider_batch, await self._looked_at(provider_batch))
            await self._end(provider_batch, bills_nothing=True)
            return
        status = await self._watched(provider_batch)
        is_read = (
            status is not None and await self._persist(partial(self._collect, provider_batch, status)) is not _NEVER
        )
        if is_read:
            await self._forget(provider_batch, status)
        await self._end(provider_batch, bills_nothing=is_read and self.error is None)

    async def _known_as(self, provider_batch: ProviderBatch, remote_id: str) -> ProviderBatch:
        known = replace(provider_batch, remote_id=remote_id)
        await self._batch_state.retry_storage(partial(self._deps.store.save_provider_batch, known))
        return known

    async def _forget(self, provider_batch: ProviderBatch, status: BatchStatus | None) -> None:
        """Have what the provider keeps of it deleted, where that works."""
        if provider_batch.remote_id is None and provider_batch.uploaded is None:
            return
        with contextlib.suppress(ApplianceError):
            await self._posting.forget(provider_batch, status)

    async def _looked_at(self, provider_batch: ProviderBatch) -> BatchStatus | None:
        try:
            return await self._posting.look(provider_batch)
        except ApplianceError:
            return None

    async def _watched(self, provider_batch: ProviderBatch) -> BatchStatus | None:
        """How it stood when it was over; None where the provider did not say so in time."""
        pause, cancelled_at = _FIRST_LOOK_SECONDS, None
        give_up = self._batch_state.batch.expires_at - _SPARE_SHARE * self._deps.config.provider_batch_seconds
        while True:
            now = self._deps.wall_clock()
            try:
                status = await self._posting.look(provider_batch)
                if status.is_over:
                    if status.said:
                        self._batch_state.reason = f"{provider_batch.target}: {status.said}"
                    return status
                if cancelled_at is None and (self._withdraws or now >= give_up):
                    await self._posting.cancel(provider_batch)
                    cancelled_at, pause = now, _FIRST_LOOK_SECONDS
            except BackendRefused as error:
                _log.warning(
                    "a provider does not know its batch", provider_batch=provider_batch.name, reason=error.message
                )
                return None
            except ApplianceError as error:  # it is looked at again
                _log.info("a provider's batch cannot be seen", provider_batch=provider_batch.name, reason=error.message)
            begun = cancelled_at if cancelled_at is not None else (now if self._withdraws else give_up)
            if now >= begun + _WITHDRAWING_SECONDS:
                return None
            await self._rest(pause)
            pause = min(_LAST_LOOK_SECONDS, pause * 1.5)

    async def _collect(self, provider_batch: ProviderBatch, status: BatchStatus) -> None:
        """Its rows as answers. Those that were committed before a crash are passed over."""
        rows: dict[int, BatchResult] = {}
        async for row in self._posting.rows(provider_batch, status):
            number = line_number(row.request_id)
            if number is not None and row.status == 200:
                rows[number] = row
            if len(rows) >= _READ_AT_ONCE:
                await self._read(provider_batch, rows)
                rows = {}
        await self._read(provider_batch, rows)

    async def _read(self, provider_batch: ProviderBatch, rows: dict[int, BatchResult]) -> None:
        if not rows:
            return
        known = await self._batch_state.retry_storage(
            partial(self._deps.store.list_line_records, provider_batch, tuple(rows))
        )
        lines = await self._batch_state.results.read_lines([place for place, _ in known])
        asked = [(line, ticket, rows[line.number]) for line, (_, ticket) in zip(lines, known, strict=True)]
        try:
            answers = await self._posting.read(asked, self._terms(False), provider_batch)
        except Unauthorized as error:  # nobody is there any more whom they could be given to
            self.error = error
            return
        good: list[tuple[BatchLine, LineAnswer]] = [
            (line, answer) for (line, _, _), answer in zip(asked, answers, strict=True) if answer is not None
        ]
        if good:
            await self._batch_state.retry_storage(partial(self._batch_state.commit_answers, good))
            self.lines -= len(good)
            self._batch_state.wake()

    async def _end(self, provider_batch: ProviderBatch, *, bills_nothing: bool, alone: bool = True) -> None:
        """What is left of it waits again, to be asked alone or not. What may have been billed stays put aside."""
        tickets = await self._batch_state.retry_storage(partial(self._deps.store.end_provider_batch, provider_batch))
        if bills_nothing:
            self._release(tickets)  # of one that was settled by its row this changes nothing
        self._return(list(tickets), alone=alone)
        _log.info("a provider's batch ended", provider_batch=provider_batch.name, back=len(tickets))

    def _release(self, tickets: Mapping[int, str]) -> None:
        for ticket in tickets.values():
            self._posting.release(ticket)

    def _return(self, numbers: Sequence[int], *, alone: bool = True) -> None:
        self.lines -= len(numbers)
        if alone:
            self._alone.update(numbers)
        self._queue.requeue(numbers)
        self._batch_state.wake()

    async def _reserve(self, sealed: Mapping[int, SealedLine], tickets: dict[int, str]) -> None:
        """Tickets for those lines that there is money for."""
        numbers = list(sealed)
        for at in range(0, len(numbers), _RESERVED_AT_ONCE):
            part = numbers[at : at + _RESERVED_AT_ONCE]
            work = (self._posting.reserve(sealed[number]) for number in part)
            found = await asyncio.gather(*work, return_exceptions=True)
            tickets |= {number: one for number, one in zip(part, found, strict=True) if isinstance(one, str)}
            failed = [one for one in found if isinstance(one, BaseException)]
            for error in failed:
                if not isinstance(error, ApplianceError):
                    raise error
                self._batch_state.reason = error.message
            if failed:  # the budget is spent: what is not reserved waits
                break

    async def _persist(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """Do it, however long the provider cannot be reached; `_NEVER` where that lasted to the end."""
        pause = _FIRST_LOOK_SECONDS
        while True:
            try:
                return await work()
            except ApplianceError as error:
                _log.info("a provider's batch cannot be seen", reason=error.message)
                if isinstance(error, BackendRefused):  # it knows nothing of it, or not any more
                    return _NEVER
                if self._deps.wall_clock() >= self._batch_state.batch.expires_at or self._withdraws:
                    return _NEVER
            await self._rest(pause)
            pause = min(_LAST_LOOK_SECONDS, pause * 1.5)

    async def _rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        self._woken.clear()

    @property
    def _posting(self) -> ProviderBatchLines:
        assert self._deps.provider_batches is not None
        return self._deps.provider_batches

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._guarded(work), name=f"jobs {self._batch_state.batch.id} upstream")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # its lines stay where they are on disk, and the next start goes on with them
            self.error = error
        finally:
            self._batch_state.wake()


def _was_not_made(error: ApplianceError) -> bool:
    """Whether the provider surely did not take the batch; of what is not sure it is asked."""
    if isinstance(error, BackendUnreachable):
        return not error.may_have_cost
    return isinstance(error, BackendRefused | BackendAuth | RequestError | ResidencyRefused | Unavailable)
