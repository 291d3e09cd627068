"""One sequence's events on their way from the engine's thread to the request that reads them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from appliance.llamacpp.engine_protocol import SequenceFinished, TokenEvent


@dataclass(eq=False, slots=True)
class Mailbox:
    """Where a generation's events wait for their reader. The event loop's thread only."""

    events: list[TokenEvent] = field(default_factory=list)
    finished: SequenceFinished | None = None
    waiter: asyncio.Future[None] | None = None

    def put(self, events: list[TokenEvent], finished: SequenceFinished | None) -> None:
        self.events.extend(events)
        self.finished = finished
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class EngineGeneration:
    """The answer to one request as it comes: an async iterator over lists of events, everything since the last read.

    When the iterator ends, `finished` says why. Leaving it early (`async with`, `aclose`, `cancel`, or forgetting it)
    frees its sequence before the next step.
    """

    def __init__(self, mailbox: Mailbox, cancel: Callable[[], None]) -> None:
        self._mailbox, self._cancel = mailbox, cancel

    @property
    def finished(self) -> SequenceFinished | None:
        """Set once the generation has ended; events may still wait to be read."""
        return self._mailbox.finished

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        mailbox = self._mailbox
        while not mailbox.events:
            if mailbox.finished is not None:
                raise StopAsyncIteration
            mailbox.waiter = asyncio.get_running_loop().create_future()
            try:
                await mailbox.waiter
            finally:
                mailbox.waiter = None
        events, mailbox.events = mailbox.events, []
        return events

    def cancel(self) -> None:
        """Stop generating. What was generated before may still be read; `finished` follows. Safe to repeat."""
        if self._mailbox.finished is None:
            self._cancel()

    async def aclose(self) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        self.cancel()
