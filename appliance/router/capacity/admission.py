"""Slots at targets, and a fair queue of requests for each on-site target.

One event loop, so no locks: every method that does not wait is atomic.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from appliance.core import HealthAlerts, NoAlerts, Target
from appliance.errors import Busy, Unavailable
from appliance.router.capacity.predictor import (
    NOT_PREDICTED,
    InFlight,
    Prediction,
    batch_sequences_beside,
    predict_latency,
)
from appliance.router.capacity.request_load import RequestLoad
from appliance.router.capacity.target_queue import NO_LOAD, Slot, TargetQueue, Waiter
from appliance.router.stats.estimators import Estimators
from appliance.state import State
from appliance.telemetry.background import GuardedTask

_RECHECK_SECONDS: Final = 1.0
"""Waiting requests are checked this often even when no slot is released and no snapshot comes: views grow old."""


class Admission:
    """In-flight ledger and queues of all targets. Outlives reloads: requests must not notice one."""

    def __init__(
        self,
        state: State,
        clock: Callable[[], float],
        estimators: Estimators | None = None,
        alerts: HealthAlerts | None = None,
    ) -> None:
        self._state = state
        self._alerts = alerts or NoAlerts()
        self._clock = clock
        self._estimators = estimators or Estimators()
        self._queues: dict[str, TargetQueue] = {}
        self._suspect_since: dict[str, float] = {}
        self._watcher: asyncio.Task[None] | None = None

    def inflight(self, target: str) -> InFlight:
        """What is in flight and waiting at one target now."""
        queue = self._queues.get(target)
        if queue is None:
            return NO_LOAD
        view = self._state.snapshot.engines.get(target)
        return queue.tally(view, self._clock(), queue.waiters.before(None, is_residency_bound=False))

    @property
    def total(self) -> int:
        """Requests in flight or waiting, over all targets."""
        return sum(queue.sequences + queue.waiting for queue in self._queues.values())

    def mark_suspect(self, target: str) -> None:
        """The engine did not answer: its status up to now is not believed any more."""
        self._suspect_since[target] = self._clock()

    def predict(
        self, target: Target, load: RequestLoad, *, can_fall_back: bool = False, is_residency_bound: bool = False
    ) -> Prediction:
        """For a call that would come last of its kind. `can_fall_back`: another target is left for it."""
        if target.provider is not None:
            seen = self._estimators.first_byte_seconds(target.name, True) if load.stream else None
            return (
                NOT_PREDICTED if seen is None else replace(NOT_PREDICTED, first_byte_seconds=seen, reason="as of late")
            )
        return self._corrected(
            target.name,
            load,
            self._predict(target.name, load, can_fall_back=can_fall_back, is_residency_bound=is_residency_bound),
        )

    async def enter(
        self,
        target: Target,
        load: RequestLoad,
        *,
        is_residency_bound: bool,
        wait_seconds: float,
        budget_seconds: float | None = None,
    ) -> Slot:
        """Take a slot, waiting up to `wait_seconds` where there is none. Residency-bound calls wait before others.

        `budget_seconds`: where the call can fall back, how long its first token may take; a call predicted to need
        longer is refused at once. Raises Busy with a hint when to come back, or Unavailable where no engine is up.
        """
        if target.provider is not None:
            return self._admit(target.name, load, NOT_PREDICTED)
        can_fall_back = budget_seconds is not None and not is_residency_bound
        plain = self._predict(target.name, load, can_fall_back=can_fall_back, is_residency_bound=is_residency_bound)
        prediction = self._corrected(target.name, load, plain)
        if not prediction.ready:
            self._state.want(target.name)
        queue = self._queue_of(target.name)
        is_next = not queue.waiters if load.is_batch else not queue.waiters.has_interactive
        if prediction.can_enter and is_next and _is_within_budget(prediction, budget_seconds):
            return self._admit(target.name, load, plain)
        if wait_seconds <= 0 or (budget_seconds is not None and not _is_within_budget(prediction, budget_seconds)):
            raise _full_error(target.name, prediction, budget_seconds)
        until = None if budget_seconds is None else self._clock() + budget_seconds
        waiter = Waiter(target, load, asyncio.get_running_loop().create_future(), until, can_fall_back)
        return await self._wait(
            waiter, queue.waiters.queue_for(load, is_residency_bound=is_residency_bound), wait_seconds
        )

    async def aclose(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
            self._watcher = None

    async def _wait(self, waiter: Waiter, waiters: deque[Waiter], seconds: float) -> Slot:
        target, load = waiter.target, waiter.load
        queue = self._queue_of(target.name)
        waiters.append(waiter)
        queue.waiting += load.share
        self._start_watcher()
        try:
            async with asyncio.timeout(seconds):
                return await waiter.entered
        except TimeoutError:
            if waiter.entered.done() and not waiter.entered.cancelled():
                return waiter.entered.result()
            raise _full_error(target.name, self.predict(target, load), None) from None
        except asyncio.CancelledError:
            _release_unclaimed(waiter.entered)
            raise
        finally:
            if waiter in waiters:
                waiters.remove(waiter)
                queue.waiting -= load.share
                self._admit_waiting(target.name)
            self._stop_watcher()

    def _queue_of(self, target: str) -> TargetQueue:
        queue = self._queues.get(target)
        if queue is None:
            queue = self._queues[target] = TargetQueue()
        return queue

    def _admit(self, target: str, load: RequestLoad, predicted: Prediction) -> Slot:
        queue = self._queue_of(target)
        slot = Slot(self, target, load, predicted, self._clock())
        self._state.use(target)
        queue.slots[slot] = None
        queue.count(load, 1)
        return slot

    def note_first_token(self, slot: Slot) -> None:
        """Called by the slot: its prompt has been computed."""
        self._admit_waiting(slot.target)

    def take_back(self, slot: Slot) -> None:
        """Called by the slot, once: it is free."""
        queue = self._queues[slot.target]
        del queue.slots[slot]
        queue.count(slot.load, -1)
        self._admit_waiting(slot.target)

    def _admit_waiting(self, target: str) -> None:
        """Give slots to waiting requests, in order, as long as the engine can take them."""
        queue = self._queues.get(target)
        while queue is not None and queue.waiters:
            waiters = queue.waiters.head()
            waiter = waiters[0]
            if waiter.entered.done():  # cancelled: its own task has nothing left to take out
                waiters.popleft()
                queue.waiting -= waiter.load.share
                continue
            # the head of the queue waits for nothing but the requests in flight
            plain = self._predict(target, waiter.load, can_fall_back=waiter.can_fall_back)
            prediction = self._corrected(target, waiter.load, plain)
            too_late = waiter.until is not None and self._clock() + prediction.first_byte_seconds > waiter.until
            if not prediction.can_enter and not too_late:
                return
            waiters.popleft()
            queue.waiting -= waiter.load.share
            if too_late and prediction.ready:  # it could not begin in time any more, and can fall back
                waiter.entered.set_exception(_full_error(target, prediction, 0.0))
            else:
                waiter.entered.set_result(self._admit(target, waiter.load, plain))

    def _predict(
        self, target: str, load: RequestLoad, *, can_fall_back: bool, is_residency_bound: bool | None = None
    ) -> Prediction:
        """`is_residency_bound`: whether only such requests wait before it; None: none does."""
        queue = self._queues.get(target)
        view, inflight = self._state.snapshot.engines.get(target), NO_LOAD
        if queue is not None:
            waiting: list[RequestLoad] = []
            if is_residency_bound is not None and queue.waiting:
                waiting = queue.waiters.before(load, is_residency_bound=is_residency_bound)
            inflight = queue.tally(view, self._clock(), waiting, with_batch=load.is_batch)
        prediction = predict_latency(
            view,
            inflight,
            prompt_tokens=load.prompt_tokens,
            output_tokens=load.output_tokens,
            now=self._clock(),
            not_before=self._suspect_since.get(target, 0.0),
            kv_tokens=load.kv_tokens,
            reserved=load.reserved_share if can_fall_back else 0.0,
        )
        if not load.is_batch or queue is None or view is None or view.load is None:
            return prediction
        is_free = not queue.waiters.has_interactive and queue.sequences < batch_sequences_beside(
            view.load, queue.interactive_sequences
        )
        return prediction if is_free else replace(prediction, can_enter=False)

    def _corrected(self, target: str, load: RequestLoad, plain: Prediction) -> Prediction:
        """Corrected by how much longer requests of this kind took here than predicted."""
        if not plain.ready:
            return plain
        key = (target, load.kind)
        first = plain.first_byte_seconds * self._estimators.first_byte_correction.ratio(key)
        rest = max(0.0, plain.finish_seconds - plain.first_byte_seconds)
        finish = max(first + rest, plain.finish_seconds * self._estimators.finish_correction.ratio(key))
        return Prediction(first, finish, plain.fits_kv, plain.ready, plain.reason, plain.can_enter)

    def _start_watcher(self) -> None:
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(
                GuardedTask("admission", self._admit_on_change, self._alerts).run(), name="admission"
            )

    def _stop_watcher(self) -> None:
        if self._watcher is not None and not any(queue.waiters for queue in self._queues.values()):
            self._watcher.cancel()
            self._watcher = None

    async def _admit_on_change(self) -> None:
        """A snapshot may bring an engine back. Ends when no request waits."""
        while any(queue.waiters for queue in self._queues.values()):
            await self._state.wait_for_change(_RECHECK_SECONDS)
            for target in list(self._queues):
                self._admit_waiting(target)


def _release_unclaimed(entered: "asyncio.Future[Slot]") -> None:
    """Free a slot that was granted at the moment its request was cancelled."""
    if entered.done() and not entered.cancelled() and entered.exception() is None:
        entered.result().release()


def _is_within_budget(prediction: Prediction, budget_seconds: float | None) -> bool:
    return budget_seconds is None or (prediction.ready and prediction.first_byte_seconds <= budget_seconds)


def _full_error(target: str, prediction: Prediction, budget_seconds: float | None) -> Busy | Unavailable:
    if not prediction.ready:
        return Unavailable(
            f"{target} cannot answer now: {prediction.reason}; try again shortly", retry_after_seconds=5.0
        )
    soon = max(1.0, round(prediction.first_byte_seconds, 1))
    needs = f"{target} would need {prediction.first_byte_seconds:.1f} s to the first token ({prediction.reason})"
    if budget_seconds is not None and prediction.first_byte_seconds > budget_seconds:
        return Busy(f"{needs}, budget {budget_seconds:.1f} s", retry_after_seconds=soon)
    return Busy(f"{needs}; try again in {soon:.0f} s", retry_after_seconds=soon)
