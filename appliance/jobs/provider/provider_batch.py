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
        self, means: JobDeps, keeper: BatchState, queue: LineQueue, terms: Callable[[bool], BatchTerms]
    ) -> None:
        """`terms` of now, for lines that would be late or not."""
        self._means, self._keeper, self._queue, self._terms = means, keeper, queue, terms
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
        means, now = self._means, self._means.wall()
        window = means.config.provider_batch_seconds * (1.0 + _SPARE_SHARE)
        if means.posting is None or self._withdraws or self._keeper.batch.expires_at - now < window:
            return False
        bound = Residency.parse(self._keeper.batch.residency)
        targets = means.state.snapshot.targets
        return any(means.posting.takes(target) and bound.allows(target) for target in targets)

    def wants(self, lines: Sequence[BatchLine], late: int) -> bool:
        """Whether lines that are ready to be asked the usual way had better be sifted anew: they will be late."""
        is_worth_it = late >= _FEWEST_LATE and any(line.number not in self._alone for line in lines)
        return is_worth_it and self._is_open()

    def _is_open(self) -> bool:
        return self._means.clock() >= self._not_before and self.has_time()

    async def resume(self) -> None:
        """Go on with what was sent, or was about to be, before a restart."""
        for parcel in await self._keeper.patiently(partial(self._means.store.parcels, self._keeper.batch.id)):
            if self._means.posting is None:  # nobody can ask about it any more; its money stays put aside
                await self._keeper.patiently(partial(self._means.store.end_parcel, parcel))
                continue
            self.lines += await self._keeper.patiently(partial(self._means.store.posted, parcel))
            self._spawn(self._carry(parcel, resumed=True))

    async def sift(self, lines: list[BatchLine], late: int) -> list[BatchLine]:
        """What is to be asked the usual way. `late`: so many more lines should leave the site than are on their way."""
        posting = self._means.posting
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
        before = self._means.clock() - older_than_seconds
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
            gathering = self._gatherings[key] = _Gathering(self._means.clock())
        gathering.sealed[number] = one
        gathering.size_bytes += one.size_bytes
        self.lines += 1

    def _post(self, key: tuple[str, str]) -> None:
        gathering = self._gatherings.pop(key)
        name = f"{self._keeper.batch.id}-{secrets.token_hex(6)}"
        parcel = ProviderBatch(name, self._keeper.batch.id, key[0], self._means.wall())
        self._spawn(self._begin(parcel, gathering.sealed))

    # One parcel.

    async def _begin(self, parcel: ProviderBatch, sealed: dict[int, SealedLine]) -> None:
        """Money first, then the intent on disk, then the provider."""
        tickets = dict[int, str]()
        try:
            await self._reserve(sealed, tickets)
            if tickets and not self._withdraws:
                await self._keeper.patiently(partial(self._means.store.add_parcel, parcel, tickets))
        except BaseException:
            self._release(tickets)
            raise
        if self._withdraws:
            self._release(tickets)
            return
        self._return([number for number in sealed if number not in tickets])
        if tickets:
            self._queue.done(tickets)
            await self._send(parcel, [one for number, one in sealed.items() if number in tickets])

    async def _send(self, parcel: ProviderBatch, sealed: Sequence[SealedLine]) -> None:
        _log.info("lines leave in a provider's batch", parcel=parcel.name, target=parcel.target, lines=len(sealed))

        async def note(uploaded: str) -> None:
            nonlocal parcel
            parcel = replace(parcel, uploaded=uploaded)
            await self._keeper.patiently(partial(self._means.store.save_parcel, parcel))

        try:
            remote_id = await self._posting.send(parcel, sealed, note)
            parcel = await self._known_as(parcel, remote_id)
        except ApplianceError as error:
            self._not_before = self._means.clock() + _REFUSED_SECONDS
            self._keeper.reason = f"a provider's batch was not made: {error.message}"
            _log.warning("a provider's batch was not made", parcel=parcel.name, reason=error.message)
            if _was_not_made(error):
                await self._forget(parcel, None)
                await self._end(parcel, bills_nothing=True)
                return
        await self._carry(parcel)

    async def _carry(self, parcel: ProviderBatch, *, resumed: bool = False) -> None:
        """From wherever it stands to its end. `resumed`: a restart may have kept it from being sent."""
        if parcel.remote_id is None:
            found = await self._persist(partial(self._posting.find, parcel))
            if found is None or found is _NEVER:
                was_not_made = found is None and self._posting.finds(parcel)
                await self._end(parcel, bills_nothing=was_not_made, alone=not (resumed and was_not_made))
                return
            parcel = await self._known_as(parcel, found)
        if not await self._keeper.patiently(partial(self._means.store.posted, parcel)):
            await self._forget(parcel, await self._looked_at(parcel))
            await self._end(parcel, bills_nothing=True)
            return
        standing = await self._watched(parcel)
        is_read = standing is not None and await self._persist(partial(self._collect, parcel, standing)) is not _NEVER
        if is_read:
            await self._forget(parcel, standing)
        await self._end(parcel, bills_nothing=is_read and self.error is None)

    async def _known_as(self, parcel: ProviderBatch, remote_id: str) -> ProviderBatch:
        known = replace(parcel, remote_id=remote_id)
        await self._keeper.patiently(partial(self._means.store.save_parcel, known))
        return known

    async def _forget(self, parcel: ProviderBatch, standing: BatchStatus | None) -> None:
        """Have what the provider keeps of it deleted, where that works."""
        if parcel.remote_id is None and parcel.uploaded is None:
            return
        with contextlib.suppress(ApplianceError):
            await self._posting.forget(parcel, standing)

    async def _looked_at(self, parcel: ProviderBatch) -> BatchStatus | None:
        try:
            return await self._posting.look(parcel)
        except ApplianceError:
            return None

    async def _watched(self, parcel: ProviderBatch) -> BatchStatus | None:
        """How it stood when it was over; None where the provider did not say so in time."""
        pause, cancelled_at = _FIRST_LOOK_SECONDS, None
        give_up = self._keeper.batch.expires_at - _SPARE_SHARE * self._means.config.provider_batch_seconds
        while True:
            now = self._means.wall()
            try:
                standing = await self._posting.look(parcel)
                if standing.is_over:
                    if standing.said:
                        self._keeper.reason = f"{parcel.target}: {standing.said}"
                    return standing
                if cancelled_at is None and (self._withdraws or now >= give_up):
                    await self._posting.cancel(parcel)
                    cancelled_at, pause = now, _FIRST_LOOK_SECONDS
            except BackendRefused as error:
                _log.warning("a provider does not know its batch", parcel=parcel.name, reason=error.message)
                return None
            except ApplianceError as error:  # it is looked at again
                _log.info("a provider's batch cannot be seen", parcel=parcel.name, reason=error.message)
            begun = cancelled_at if cancelled_at is not None else (now if self._withdraws else give_up)
            if now >= begun + _WITHDRAWING_SECONDS:
                return None
            await self._rest(pause)
            pause = min(_LAST_LOOK_SECONDS, pause * 1.5)

    async def _collect(self, parcel: ProviderBatch, standing: BatchStatus) -> None:
        """Its rows as answers. Those that were committed before a crash are passed over."""
        rows: dict[int, BatchResult] = {}
        async for row in self._posting.rows(parcel, standing):
            number = line_number(row.request_id)
            if number is not None and row.status == 200:
                rows[number] = row
            if len(rows) >= _READ_AT_ONCE:
                await self._read(parcel, rows)
                rows = {}
        await self._read(parcel, rows)

    async def _read(self, parcel: ProviderBatch, rows: dict[int, BatchResult]) -> None:
        if not rows:
            return
        known = await self._keeper.patiently(partial(self._means.store.tickets, parcel, tuple(rows)))
        lines = await self._keeper.results.read([place for place, _ in known])
        asked = [(line, ticket, rows[line.number]) for line, (_, ticket) in zip(lines, known, strict=True)]
        try:
            answers = await self._posting.read(asked, self._terms(False), parcel)
        except Unauthorized as error:  # nobody is there any more whom they could be given to
            self.error = error
            return
        good: list[tuple[BatchLine, LineAnswer]] = [
            (line, answer) for (line, _, _), answer in zip(asked, answers, strict=True) if answer is not None
        ]
        if good:
            await self._keeper.patiently(partial(self._keeper.put, good))
            self.lines -= len(good)
            self._keeper.nudge()

    async def _end(self, parcel: ProviderBatch, *, bills_nothing: bool, alone: bool = True) -> None:
        """What is left of it waits again, to be asked alone or not. What may have been billed stays put aside."""
        tickets = await self._keeper.patiently(partial(self._means.store.end_parcel, parcel))
        if bills_nothing:
            self._release(tickets)  # of one that was settled by its row this changes nothing
        self._return(list(tickets), alone=alone)
        _log.info("a provider's batch ended", parcel=parcel.name, back=len(tickets))

    def _release(self, tickets: Mapping[int, str]) -> None:
        for ticket in tickets.values():
            self._posting.release(ticket)

    def _return(self, numbers: Sequence[int], *, alone: bool = True) -> None:
        self.lines -= len(numbers)
        if alone:
            self._alone.update(numbers)
        self._queue.back(numbers)
        self._keeper.nudge()

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
                self._keeper.reason = error.message
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
                if self._means.wall() >= self._keeper.batch.expires_at or self._withdraws:
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
        assert self._means.posting is not None
        return self._means.posting

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._guarded(work), name=f"jobs {self._keeper.batch.id} upstream")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # its lines stay where they are on disk, and the next start goes on with them
            self.error = error
        finally:
            self._keeper.nudge()


def _was_not_made(error: ApplianceError) -> bool:
    """Whether the provider surely did not take the batch; of what is not sure it is asked."""
    if isinstance(error, BackendUnreachable):
        return not error.may_have_cost
    return isinstance(error, BackendRefused | BackendAuth | RequestError | ResidencyRefused | Unavailable)
