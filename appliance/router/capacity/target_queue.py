"""One target's slots and the requests that wait for one. Nothing here waits itself."""

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from appliance.core import EngineStatus, Target
from appliance.engines.rates import interpolate_decode_rate
from appliance.router.capacity.predictor import InFlight, Prediction
from appliance.router.capacity.request_load import RequestLoad

NO_LOAD: Final = InFlight()


class SlotOwner(Protocol):
    def note_first_token(self, slot: "Slot") -> None: ...

    def take_back(self, slot: "Slot") -> None: ...


class Slot:
    """A slot at a target. Its holder calls `release`, once or more often."""

    __slots__ = ("_computed", "_owner", "_released", "entered", "load", "predicted", "target", "written_tokens")

    def __init__(self, owner: SlotOwner, target: str, load: RequestLoad, predicted: Prediction, entered: float) -> None:
        self._owner = owner
        self._computed = False
        self._released = False
        self.target = target
        self.load = load
        self.predicted = predicted
        """Before any correction by the estimators."""
        self.entered = entered
        self.written_tokens = 0

    def mark_first_token(self) -> None:
        """Its prompt has been computed."""
        if not self._computed and not self._released:
            self._computed = True
            self._owner.note_first_token(self)

    def count_tokens(self, tokens: int) -> None:
        """Count tokens of its answer that have come."""
        self.written_tokens += tokens

    def release(self) -> None:
        if not self._released:
            self._released = True
            self._owner.take_back(self)

    def prompt_left(self, now: float) -> int:
        """Prompt tokens to compute. A whole answer does not show its first token, so the prediction is used."""
        if self._computed or now - self.entered >= self.predicted.first_byte_seconds > 0:
            return 0
        return self.load.prompt_tokens

    def output_left(self, now: float, tokens_per_second: float) -> int:
        """Tokens still to be written, by one of the sequences, by count or else by the time since its prompt."""
        written = self.written_tokens
        if not self._computed:
            written = int(max(0.0, now - self.entered - self.predicted.first_byte_seconds) * tokens_per_second)
        return max(1, self.load.output_tokens - written)


class TargetQueue:
    """One target's slots, and the requests that wait for one."""

    __slots__ = ("at_view", "interactive_sequences", "seen", "sequences", "slots", "waiters", "waiting")

    def __init__(self) -> None:
        self.slots: dict[Slot, None] = {}
        self.sequences = 0
        self.interactive_sequences = 0
        """Of those, without batch work."""
        self.waiting = 0
        """Sequences that the waiting requests ask for."""
        self.waiters = WaitQueues()
        self.seen = -math.inf
        """When the engine's gauges were read last."""
        self.at_view = NO_LOAD
        """What was in flight then."""

    def count(self, load: RequestLoad, sign: int) -> None:
        self.sequences += sign * load.share
        if not load.is_batch:
            self.interactive_sequences += sign * load.share

    def tally(
        self, view: EngineStatus | None, now: float, waiting: Sequence[RequestLoad], *, with_batch: bool = True
    ) -> InFlight:
        """What is in flight at `now`, without what has been written since it was sent, and `waiting` before it.

        `with_batch` False: as interactive requests see it, for which the engine preempts batch work.
        """
        is_new = view is not None and view.seen != self.seen
        whole = self._sum(view, now, list(self.slots), waiting, None if is_new else self.at_view)
        if view is not None and is_new:
            self.seen, self.at_view = view.seen, whole
        if with_batch or self.interactive_sequences == self.sequences:
            return whole
        interactive = [slot for slot in self.slots if not slot.load.is_batch]
        return self._sum(view, now, interactive, waiting, self.at_view)

    @staticmethod
    def _sum(
        view: EngineStatus | None,
        now: float,
        slots: Sequence[Slot],
        waiting: Sequence[RequestLoad],
        at_view: InFlight | None,
    ) -> InFlight:
        sequences = sum(slot.load.share for slot in slots)
        speed = _tokens_per_second(view, sequences)
        outputs = tuple(
            slot.output_left(now, speed) // slot.load.share for slot in slots for _ in range(slot.load.share)
        )
        return InFlight(
            sequences=sequences,
            waiting=sum(load.share for load in waiting),
            prompt_tokens=sum(slot.prompt_left(now) for slot in slots),
            waiting_prompt_tokens=sum(load.prompt_tokens for load in waiting),
            output_tokens=sum(outputs),
            waiting_output_tokens=sum(load.output_tokens for load in waiting),
            kv_tokens=sum(slot.load.cells for slot in slots),
            outputs=outputs,
            waiting_outputs=tuple(load.output_tokens for load in waiting),
            at_view=at_view,
        )


@dataclass(slots=True, eq=False)
class Waiter:
    target: Target
    load: RequestLoad
    entered: "asyncio.Future[Slot]"
    until: float | None
    """When its first token must have come, where it can still fall back."""
    can_fall_back: bool


class WaitQueues:
    """Requests that wait for one target: residency-bound ones first, then other interactive ones, then batch work; each
    kind in order of arrival."""

    def __init__(self) -> None:
        self.residency_bound: deque[Waiter] = deque()
        self.interactive: deque[Waiter] = deque()
        self.batch: deque[Waiter] = deque()

    def __len__(self) -> int:
        return len(self.residency_bound) + len(self.interactive) + len(self.batch)

    @property
    def has_interactive(self) -> bool:
        """Whether an interactive request waits."""
        return bool(self.residency_bound or self.interactive)

    def queue_for(self, load: RequestLoad, *, is_residency_bound: bool) -> deque[Waiter]:
        if load.is_batch:
            return self.batch
        return self.residency_bound if is_residency_bound else self.interactive

    def head(self) -> deque[Waiter]:
        return self.residency_bound or self.interactive or self.batch

    def before(self, load: RequestLoad | None, *, is_residency_bound: bool) -> list[RequestLoad]:
        """The loads that wait before a request that comes now; None: all that wait."""
        queues: tuple[deque[Waiter], ...] = (self.residency_bound, self.interactive, self.batch)
        if load is not None and not load.is_batch:
            queues = queues[:1] if is_residency_bound else queues[:2]
        return [waiter.load for queue in queues for waiter in queue]


def _tokens_per_second(view: EngineStatus | None, sequences: int) -> float:
    """Of each of so many sequences; 0 where nothing is known."""
    if view is None or view.load is None or sequences <= 0:
        return 0.0
    together = min(sequences, max(1, view.load.sequences_capacity))
    return interpolate_decode_rate(view.load.decode_tokens_per_second, together) / together
