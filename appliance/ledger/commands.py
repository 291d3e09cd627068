"""What a ledger hands to its writer's thread, and what both sides see of it."""

import asyncio
import queue
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from appliance.core import Outcome
from appliance.ledger import rows
from appliance.ledger.budgets import SpendCap


@dataclass(frozen=True, slots=True)
class WriteResult:
    """Where a coroutine waits for the writer."""

    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[None]"

    def set_result(self, error: BaseException | None = None) -> None:
        try:
            self.loop.call_soon_threadsafe(self._set, error)
        except RuntimeError:
            # The loop has been closed: nothing waits any more.
            return

    def _set(self, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(error)


@dataclass(slots=True)
class Reservation:
    row: rows.Row
    caps: Sequence[SpendCap]
    answer: WriteResult
    spent: Mapping[str, int] = field(default_factory=dict)
    """Nano-dollars by scope, this reservation included, once it is written. Writer."""


@dataclass(frozen=True, slots=True)
class Settlement:
    reservation_id: str
    nano_usd: int
    at: float


@dataclass(frozen=True, slots=True)
class FlushCommand:
    """Answered when the first `accepted` entries have been written. `is_last`: then the writer ends, written or not."""

    accepted: int
    answer: WriteResult
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class WakeCommand:
    """There is something to gather."""


@dataclass(slots=True)
class WriterState:
    """What both threads see. Each field has one writer; deque and SimpleQueue take either side's calls."""

    urgent: "queue.SimpleQueue[Reservation | FlushCommand | WakeCommand]" = field(default_factory=queue.SimpleQueue)
    entries: "deque[Outcome | Settlement]" = field(default_factory=deque)
    is_asleep: bool = False
    """Whether the next entry has to wake the writer."""
    held: int = 0
    """Entries the writer has taken and not written yet. Writer."""
    spoiled: int = 0
    """Entries that no database takes. Writer."""
    reason: str = ""
    """Why the last write failed; empty when it did not. Writer."""
