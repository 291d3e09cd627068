"""Who may enter a target now: slots, and a fair queue for those who have nowhere else to go.

One event loop, so no locks: every method that does not wait is atomic.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from appliance.core import Target
from appliance.errors import Busy, Unavailable
from appliance.pipeline.capacity import NOT_PREDICTED, InFlight, Prediction, predict
from appliance.state import State

_RECHECK_SECONDS: Final = 1.0
"""Those who wait are looked at this often even when nobody leaves and no snapshot comes: views grow old."""

_NOTHING: Final = InFlight()


@dataclass(frozen=True, slots=True)
class Load:
    """What one call brings to a target."""

    prompt_tokens: int
    output_tokens: int
    share: int = 1
    """How many sequences it occupies."""


class Slot:
    """A place at a target. Whoever has it gives it back with `leave`, once or more often."""

    __slots__ = ("_admission", "_computed", "_left", "load", "target")

    def __init__(self, admission: "Admission", target: str, load: Load) -> None:
        self._admission = admission
        self._computed = False
        self._left = False
        self.target = target
        self.load = load

    def first_token(self) -> None:
        """Its prompt has been computed."""
        if not self._computed and not self._left:
            self._computed = True
            self._admission._computed(self)

    def leave(self) -> None:
        if not self._left:
            self._left = True
            self._admission._leave(self, computed=self._computed)


@dataclass(slots=True, eq=False)
class _Waiter:
    load: Load
    entered: "asyncio.Future[Slot]"


class _Queue:
    """Those who wait for one target: bound requests first, each kind in order of arrival."""

    def __init__(self) -> None:
        self.bound: deque[_Waiter] = deque()
        self.unbound: deque[_Waiter] = deque()

    def __len__(self) -> int:
        return len(self.bound) + len(self.unbound)

    def line(self, *, first: bool) -> deque[_Waiter]:
        return self.bound if first else self.unbound

    def head(self) -> deque[_Waiter]:
        return self.bound or self.unbound


class Admission:
    """In-flight ledger and queues of all targets. Outlives reloads: requests must not notice one."""

    def __init__(self, state: State, clock: Callable[[], float]) -> None:
        self._state = state
        self._clock = clock
        self._inflight: dict[str, InFlight] = {}
        self._queues: dict[str, _Queue] = {}
        self._doubted: dict[str, float] = {}
        self._pump: asyncio.Task[None] | None = None

    def inflight(self, target: str) -> InFlight:
        return self._inflight.get(target, _NOTHING)

    @property
    def total(self) -> int:
        """Requests in flight or waiting, over all targets."""
        return sum(one.sequences + one.waiting for one in self._inflight.values())

    def doubt(self, target: str) -> None:
        """The engine did not answer: what was seen of it so far is not believed any more."""
        self._doubted[target] = self._clock()

    def predict(self, target: Target, load: Load) -> Prediction:
        """For a call that would come last; those who wait here are before it."""
        if target.provider is not None:
            return NOT_PREDICTED
        return self._predict(target.name, self.inflight(target.name), load)

    async def enter(
        self, target: Target, load: Load, *, first: bool, wait_seconds: float, budget_seconds: float | None = None
    ) -> Slot:
        """Take a slot, waiting up to `wait_seconds` where there is none. `first`: before those who are not bound.

        `budget_seconds`: where the call can go elsewhere, how long the first token may take; predicted to need longer,
        it is sent on at once. Raises Busy with a hint when to come back, or Unavailable where no engine is up.
        """
        if target.provider is not None:
            return self._admit(target.name, load)
        prediction = self.predict(target, load)
        if not prediction.ready:
            self._state.want(target.name)
        queue = self._queues.get(target.name)
        if prediction.can_enter and not queue and _inside(prediction, budget_seconds):
            return self._admit(target.name, load)
        if wait_seconds <= 0 or (budget_seconds is not None and not _inside(prediction, budget_seconds)):
            raise _full(target.name, prediction, budget_seconds)
        return await self._wait(target, load, first=first, seconds=wait_seconds)

    async def aclose(self) -> None:
        if self._pump is not None:
            self._pump.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._pump
            self._pump = None

    async def _wait(self, target: Target, load: Load, *, first: bool, seconds: float) -> Slot:
        queue = self._queues.setdefault(target.name, _Queue())
        waiter = _Waiter(load, asyncio.get_running_loop().create_future())
        line = queue.line(first=first)
        line.append(waiter)
        self._count_waiting(target.name, load, 1)
        self._start_pump()
        try:
            async with asyncio.timeout(seconds):
                return await waiter.entered
        except TimeoutError:
            if _was_given(waiter):
                return waiter.entered.result()
            raise _full(target.name, self.predict(target, load), None) from None
        except asyncio.CancelledError:
            if _was_given(waiter):
                waiter.entered.result().leave()
            raise
        finally:
            if waiter in line:
                line.remove(waiter)
                self._count_waiting(target.name, load, -1)
                self._let_in(target.name)
            self._end_pump()

    def _admit(self, target: str, load: Load) -> Slot:
        now = self.inflight(target)
        self._inflight[target] = replace(
            now,
            sequences=now.sequences + load.share,
            prompt_tokens=now.prompt_tokens + load.prompt_tokens,
            output_tokens=now.output_tokens + load.output_tokens,
            kv_tokens=now.kv_tokens + load.prompt_tokens + load.output_tokens,
        )
        return Slot(self, target, load)

    def _computed(self, slot: Slot) -> None:
        now = self.inflight(slot.target)
        self._inflight[slot.target] = replace(now, prompt_tokens=now.prompt_tokens - slot.load.prompt_tokens)
        self._let_in(slot.target)

    def _leave(self, slot: Slot, *, computed: bool) -> None:
        now, load = self.inflight(slot.target), slot.load
        self._inflight[slot.target] = replace(
            now,
            sequences=now.sequences - load.share,
            prompt_tokens=now.prompt_tokens - (0 if computed else load.prompt_tokens),
            output_tokens=now.output_tokens - load.output_tokens,
            kv_tokens=now.kv_tokens - load.prompt_tokens - load.output_tokens,
        )
        self._let_in(slot.target)

    def _count_waiting(self, target: str, load: Load, sign: int) -> None:
        now = self.inflight(target)
        self._inflight[target] = replace(
            now,
            waiting=now.waiting + sign * load.share,
            waiting_prompt_tokens=now.waiting_prompt_tokens + sign * load.prompt_tokens,
            waiting_output_tokens=now.waiting_output_tokens + sign * load.output_tokens,
        )

    def _let_in(self, target: str) -> None:
        """Give slots to those who wait, in order, as long as the engine can take them."""
        queue = self._queues.get(target)
        while queue:
            line = queue.head()
            waiter = line[0]
            if waiter.entered.done():  # cancelled, its own task takes it out of the line's count
                line.popleft()
                self._count_waiting(target, waiter.load, -1)
                continue
            # whoever is at the head waits for nobody but those inside
            inside = replace(self.inflight(target), waiting=0, waiting_prompt_tokens=0, waiting_output_tokens=0)
            if not self._predict(target, inside, waiter.load).can_enter:
                return
            line.popleft()
            self._count_waiting(target, waiter.load, -1)
            waiter.entered.set_result(self._admit(target, waiter.load))

    def _predict(self, target: str, inflight: InFlight, load: Load) -> Prediction:
        return predict(
            self._state.snapshot.engines.get(target),
            inflight,
            prompt_tokens=load.prompt_tokens,
            output_tokens=load.output_tokens,
            now=self._clock(),
            not_before=self._doubted.get(target, 0.0),
        )

    def _start_pump(self) -> None:
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._let_in_on_change(), name="admission")

    def _end_pump(self) -> None:
        if self._pump is not None and not any(self._queues.values()):
            self._pump.cancel()
            self._pump = None

    async def _let_in_on_change(self) -> None:
        """A snapshot may bring an engine back. Ends when nobody waits."""
        while any(self._queues.values()):
            await self._state.wait_for_change(_RECHECK_SECONDS)
            for target in list(self._queues):
                self._let_in(target)


def _was_given(waiter: _Waiter) -> bool:
    return waiter.entered.done() and not waiter.entered.cancelled()


def _inside(prediction: Prediction, budget_seconds: float | None) -> bool:
    return budget_seconds is None or (prediction.ready and prediction.first_byte_seconds <= budget_seconds)


def _full(target: str, prediction: Prediction, budget_seconds: float | None) -> Busy | Unavailable:
    if not prediction.ready:
        return Unavailable(
            f"{target} cannot answer now: {prediction.reason}; try again shortly", retry_after_seconds=5.0
        )
    soon = max(1.0, round(prediction.first_byte_seconds, 1))
    needs = f"{target} would need {prediction.first_byte_seconds:.1f} s to the first token ({prediction.reason})"
    if budget_seconds is not None and prediction.first_byte_seconds > budget_seconds:
        return Busy(f"{needs}, budget {budget_seconds:.1f} s", retry_after_seconds=soon)
    return Busy(f"{needs}; try again in {soon:.0f} s", retry_after_seconds=soon)
