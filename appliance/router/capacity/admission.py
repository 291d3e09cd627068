"""Who may enter a target now: slots, and a fair queue for those who have nowhere else to go.

One event loop, so no locks: every method that does not wait is atomic.
"""

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from appliance.core import EngineStatus, HealthAlerts, NoAlerts, Target
from appliance.engines.rates import interpolate_decode_rate
from appliance.errors import Busy, Unavailable
from appliance.router.capacity.predictor import NOT_PREDICTED, InFlight, Prediction, predict, room_beside
from appliance.router.stats.estimators import Estimators
from appliance.state import State
from appliance.telemetry.background import GuardedTask

_RECHECK_SECONDS: Final = 1.0
"""Those who wait are looked at this often even when nobody leaves and no snapshot comes: views grow old."""

_EMPTY: Final = InFlight()


@dataclass(frozen=True, slots=True)
class RequestLoad:
    """What one call brings to a target."""

    prompt_tokens: int
    """To be computed: without what is going to be found in the cache."""
    output_tokens: int
    """Expected, where the caller's limit is seldom reached."""
    share: int = 1
    """How many sequences it occupies."""
    kv_tokens: int | None = None
    """Cells it may come to hold, where that is more than the two together."""
    kind: str = ""
    """What sort of work it is: predictions are corrected for each by itself."""
    stream: bool = False
    leaves_free: float = 0.0
    """Share of the engine that it must leave to those who are bound, while it may go elsewhere itself."""
    can_wait: bool = False
    """It goes in only where it harms nobody who cannot, and the engine puts it back for those."""

    @property
    def cells(self) -> int:
        return self.prompt_tokens + self.output_tokens if self.kv_tokens is None else self.kv_tokens


class Slot:
    """A place at a target. Whoever has it gives it back with `leave`, once or more often."""

    __slots__ = ("_admission", "_computed", "_left", "entered", "load", "predicted", "target", "written_tokens")

    def __init__(
        self, admission: "Admission", target: str, load: RequestLoad, predicted: Prediction, entered: float
    ) -> None:
        self._admission = admission
        self._computed = False
        self._left = False
        self.target = target
        self.load = load
        self.predicted = predicted
        """Before any correction by experience."""
        self.entered = entered
        self.written_tokens = 0

    def first_token(self) -> None:
        """Its prompt has been computed."""
        if not self._computed and not self._left:
            self._computed = True
            self._admission.mark_prompt_computed(self)

    def wrote(self, tokens: int) -> None:
        """So many more of its tokens have come."""
        self.written_tokens += tokens

    def leave(self) -> None:
        if not self._left:
            self._left = True
            self._admission.release_slot(self)

    def prompt_left(self, now: float) -> int:
        """Prompt tokens to compute. An answer that comes whole does not tell, so the prediction is believed."""
        if self._computed or now - self.entered >= self.predicted.first_byte_seconds > 0:
            return 0
        return self.load.prompt_tokens

    def output_left(self, now: float, tokens_per_second: float) -> int:
        """Tokens still to be written, by one of the sequences, by count or else by the time since its prompt."""
        written = self.written_tokens
        if not self._computed:
            written = int(max(0.0, now - self.entered - self.predicted.first_byte_seconds) * tokens_per_second)
        return max(1, self.load.output_tokens - written)


class _Place:
    """One target's slots and the line before it."""

    __slots__ = ("at_view", "hurried_sequences", "line", "seen", "sequences", "slots", "waiting")

    def __init__(self) -> None:
        self.slots: dict[Slot, None] = {}
        self.sequences = 0
        self.hurried_sequences = 0
        """Of those, without the ones that can wait."""
        self.waiting = 0
        self.line = _Queue()
        self.seen = -math.inf
        """When the engine's gauges were read last."""
        self.at_view = _EMPTY
        """What was in flight then."""

    def count(self, load: RequestLoad, sign: int) -> None:
        self.sequences += sign * load.share
        if not load.can_wait:
            self.hurried_sequences += sign * load.share


@dataclass(slots=True, eq=False)
class _Waiter:
    target: Target
    load: RequestLoad
    entered: "asyncio.Future[Slot]"
    until: float | None
    """When its first token must have come, where it can still go elsewhere."""
    may_leave: bool


class _Queue:
    """Those who wait for one target: bound requests first, then the others, at last those who can wait; each kind in
    order of arrival."""

    def __init__(self) -> None:
        self.bound: deque[_Waiter] = deque()
        self.unbound: deque[_Waiter] = deque()
        self.patient: deque[_Waiter] = deque()

    def __len__(self) -> int:
        return len(self.bound) + len(self.unbound) + len(self.patient)

    @property
    def hurried(self) -> bool:
        """Whether anybody waits who cannot."""
        return bool(self.bound or self.unbound)

    def line(self, load: RequestLoad, *, first: bool) -> deque[_Waiter]:
        if load.can_wait:
            return self.patient
        return self.bound if first else self.unbound

    def head(self) -> deque[_Waiter]:
        return self.bound or self.unbound or self.patient

    def before(self, load: RequestLoad | None, *, first: bool) -> list[RequestLoad]:
        """What waits before one who comes now; None: before the last of all."""
        lines: tuple[deque[_Waiter], ...] = (self.bound, self.unbound, self.patient)
        if load is not None and not load.can_wait:
            lines = lines[:1] if first else lines[:2]
        return [waiter.load for line in lines for waiter in line]


class Admission:
    """In-flight ledger and queues of all targets. Outlives reloads: requests must not notice one."""

    def __init__(
        self,
        state: State,
        clock: Callable[[], float],
        experience: Estimators | None = None,
        alerts: HealthAlerts | None = None,
    ) -> None:
        self._state = state
        self._alerts = alerts or NoAlerts()
        self._clock = clock
        self._experience = experience or Estimators()
        self._places: dict[str, _Place] = {}
        self._doubted: dict[str, float] = {}
        self._pump: asyncio.Task[None] | None = None

    def inflight(self, target: str) -> InFlight:
        """What is in flight and waiting at one target now."""
        place = self._places.get(target)
        return _EMPTY if place is None else self._tally(target, place, place.line.before(None, first=False))

    @property
    def total(self) -> int:
        """Requests in flight or waiting, over all targets."""
        return sum(place.sequences + place.waiting for place in self._places.values())

    def doubt(self, target: str) -> None:
        """The engine did not answer: what was seen of it so far is not believed any more."""
        self._doubted[target] = self._clock()

    def predict(self, target: Target, load: RequestLoad, *, may_leave: bool = False, first: bool = False) -> Prediction:
        """For a call that would come last of its kind. `may_leave`: it could go elsewhere; `first`: it is bound."""
        if target.provider is not None:
            seen = self._experience.first_byte_seconds(target.name, True) if load.stream else None
            return (
                NOT_PREDICTED if seen is None else replace(NOT_PREDICTED, first_byte_seconds=seen, reason="as of late")
            )
        return self._corrected(target.name, load, self._predict(target.name, load, may_leave=may_leave, first=first))

    async def enter(
        self,
        target: Target,
        load: RequestLoad,
        *,
        first: bool,
        wait_seconds: float,
        budget_seconds: float | None = None,
    ) -> Slot:
        """Take a slot, waiting up to `wait_seconds` where there is none. `first`: before those who are not bound.

        `budget_seconds`: where the call can go elsewhere, how long the first token may take; predicted to need longer,
        it is sent on at once. Raises Busy with a hint when to come back, or Unavailable where no engine is up.
        """
        if target.provider is not None:
            return self._admit(target.name, load, NOT_PREDICTED)
        may_leave = budget_seconds is not None and not first
        plain = self._predict(target.name, load, may_leave=may_leave, first=first)
        prediction = self._corrected(target.name, load, plain)
        if not prediction.ready:
            self._state.want(target.name)
        place = self._place(target.name)
        is_next = not place.line if load.can_wait else not place.line.hurried
        if prediction.can_enter and is_next and _inside(prediction, budget_seconds):
            return self._admit(target.name, load, plain)
        if wait_seconds <= 0 or (budget_seconds is not None and not _inside(prediction, budget_seconds)):
            raise _full(target.name, prediction, budget_seconds)
        until = None if budget_seconds is None else self._clock() + budget_seconds
        waiter = _Waiter(target, load, asyncio.get_running_loop().create_future(), until, may_leave)
        return await self._wait(waiter, place.line.line(load, first=first), wait_seconds)

    async def aclose(self) -> None:
        if self._pump is not None:
            self._pump.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._pump
            self._pump = None

    async def _wait(self, waiter: _Waiter, line: deque[_Waiter], seconds: float) -> Slot:
        target, load = waiter.target, waiter.load
        place = self._place(target.name)
        line.append(waiter)
        place.waiting += load.share
        self._start_pump()
        try:
            async with asyncio.timeout(seconds):
                return await waiter.entered
        except TimeoutError:
            if waiter.entered.done() and not waiter.entered.cancelled():
                return waiter.entered.result()
            raise _full(target.name, self.predict(target, load), None) from None
        except asyncio.CancelledError:
            _give_back(waiter.entered)
            raise
        finally:
            if waiter in line:
                line.remove(waiter)
                place.waiting -= load.share
                self._let_in(target.name)
            self._end_pump()

    def _place(self, target: str) -> _Place:
        place = self._places.get(target)
        if place is None:
            place = self._places[target] = _Place()
        return place

    def _admit(self, target: str, load: RequestLoad, predicted: Prediction) -> Slot:
        place = self._place(target)
        slot = Slot(self, target, load, predicted, self._clock())
        self._state.use(target)
        place.slots[slot] = None
        place.count(load, 1)
        return slot

    def mark_prompt_computed(self, slot: Slot) -> None:
        self._let_in(slot.target)

    def release_slot(self, slot: Slot) -> None:
        place = self._places[slot.target]
        del place.slots[slot]
        place.count(slot.load, -1)
        self._let_in(slot.target)

    def _let_in(self, target: str) -> None:
        """Give slots to those who wait, in order, as long as the engine can take them."""
        place = self._places.get(target)
        while place is not None and place.line:
            line = place.line.head()
            waiter = line[0]
            if waiter.entered.done():  # cancelled: its own task has nothing left to take out
                line.popleft()
                place.waiting -= waiter.load.share
                continue
            # whoever is at the head waits for nobody but those inside
            plain = self._predict(target, waiter.load, may_leave=waiter.may_leave)
            prediction = self._corrected(target, waiter.load, plain)
            too_late = waiter.until is not None and self._clock() + prediction.first_byte_seconds > waiter.until
            if not prediction.can_enter and not too_late:
                return
            line.popleft()
            place.waiting -= waiter.load.share
            if too_late and prediction.ready:  # it could not begin in time any more, and may go elsewhere
                waiter.entered.set_exception(_full(target, prediction, 0.0))
            else:
                waiter.entered.set_result(self._admit(target, waiter.load, plain))

    def _predict(self, target: str, load: RequestLoad, *, may_leave: bool, first: bool | None = None) -> Prediction:
        """`first`: of those who wait only the bound ones are before it; None: nobody is."""
        place = self._places.get(target)
        view, inflight = self._state.snapshot.engines.get(target), _EMPTY
        if place is not None:
            line = place.line.before(load, first=first) if first is not None and place.waiting else []
            inflight = self._tally(target, place, line, with_patient=load.can_wait)
        prediction = predict(
            view,
            inflight,
            prompt_tokens=load.prompt_tokens,
            output_tokens=load.output_tokens,
            now=self._clock(),
            not_before=self._doubted.get(target, 0.0),
            kv_tokens=load.kv_tokens,
            reserved=load.leaves_free if may_leave else 0.0,
        )
        if not load.can_wait or place is None or view is None or view.load is None:
            return prediction
        is_free = not place.line.hurried and place.sequences < room_beside(view.load, place.hurried_sequences)
        return prediction if is_free else replace(prediction, can_enter=False)

    def _corrected(self, target: str, load: RequestLoad, plain: Prediction) -> Prediction:
        """By how much longer things of this kind took here than predicted."""
        if not plain.ready:
            return plain
        key = (target, load.kind)
        first = plain.first_byte_seconds * self._experience.first_byte_pace.ratio(key)
        rest = max(0.0, plain.finish_seconds - plain.first_byte_seconds)
        finish = max(first + rest, plain.finish_seconds * self._experience.finish_pace.ratio(key))
        return Prediction(first, finish, plain.fits_kv, plain.ready, plain.reason, plain.can_enter)

    def _tally(self, target: str, place: _Place, line: Sequence[RequestLoad], *, with_patient: bool = True) -> InFlight:
        """The ledger of one target as it stands now: what has been written since counts no more.

        `with_patient` False: as those see it for whom the engine puts back what can wait.
        """
        view = self._state.snapshot.engines.get(target)
        is_new = view is not None and view.seen != place.seen
        whole = self._sum(view, list(place.slots), line, None if is_new else place.at_view)
        if view is not None and is_new:
            place.seen, place.at_view = view.seen, whole
        if with_patient or place.hurried_sequences == place.sequences:
            return whole
        hurried = [slot for slot in place.slots if not slot.load.can_wait]
        return self._sum(view, hurried, line, place.at_view)

    def _sum(
        self, view: EngineStatus | None, slots: Sequence[Slot], line: Sequence[RequestLoad], at_view: InFlight | None
    ) -> InFlight:
        now, sequences = self._clock(), sum(slot.load.share for slot in slots)
        speed = _tokens_per_second(view, sequences)
        outputs = tuple(
            slot.output_left(now, speed) // slot.load.share for slot in slots for _ in range(slot.load.share)
        )
        return InFlight(
            sequences=sequences,
            waiting=sum(load.share for load in line),
            prompt_tokens=sum(slot.prompt_left(now) for slot in slots),
            waiting_prompt_tokens=sum(load.prompt_tokens for load in line),
            output_tokens=sum(outputs),
            waiting_output_tokens=sum(load.output_tokens for load in line),
            kv_tokens=sum(slot.load.cells for slot in slots),
            outputs=outputs,
            waiting_outputs=tuple(load.output_tokens for load in line),
            at_view=at_view,
        )

    def _start_pump(self) -> None:
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(
                GuardedTask("admission", self._let_in_on_change, self._alerts).run(), name="admission"
            )

    def _end_pump(self) -> None:
        if self._pump is not None and not any(place.line for place in self._places.values()):
            self._pump.cancel()
            self._pump = None

    async def _let_in_on_change(self) -> None:
        """A snapshot may bring an engine back. Ends when nobody waits."""
        while any(place.line for place in self._places.values()):
            await self._state.wait_for_change(_RECHECK_SECONDS)
            for target in list(self._places):
                self._let_in(target)


def _tokens_per_second(view: EngineStatus | None, sequences: int) -> float:
    """Of each of so many sequences; 0 where nothing is known."""
    if view is None or view.load is None or sequences <= 0:
        return 0.0
    together = min(sequences, max(1, view.load.sequences_capacity))
    return interpolate_decode_rate(view.load.decode_tokens_per_second, together) / together


def _give_back(entered: "asyncio.Future[Slot]") -> None:
    """A slot that came in the moment in which nobody waits for it any more."""
    if entered.done() and not entered.cancelled() and entered.exception() is None:
        entered.result().leave()


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
