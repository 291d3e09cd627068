"""What jobs know of providers' own batches. A parcel is that part of a batch of ours which is one of a provider's."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from appliance.core import Target
from appliance.jobs.models import BatchLine, BatchTerms, LineAnswer
from appliance.upstream.provider_batches import BatchResult, BatchStatus


@dataclass(frozen=True, slots=True)
class ProviderBatch:
    """`name` is ours, and stands in the provider's metadata; it is on disk before anything is sent."""

    name: str
    batch_id: str
    target: str
    made_at: float
    uploaded: str | None = None
    """The provider's id of the file that was sent, once it is known."""
    remote_id: str | None = None
    """The provider's id of its batch, once it is known."""


class SealedLine(Protocol):
    """A line that is decided, permitted and written for its target."""

    @property
    def target(self) -> Target: ...

    @property
    def endpoint(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...


class ProviderBatchLines(Protocol):
    """How lines are sent in providers' batches, and read when they come back. Raises ApplianceError."""

    def takes(self, target: Target) -> bool:
        """Whether lines may be sent to it so: it takes batches, is known to be cheaper, and is well."""

    async def made_ready(self, lines: Sequence[BatchLine], terms: BatchTerms) -> Sequence[SealedLine | None]:
        """Each line ready to leave; None where it is to be asked the usual way. Raises Unauthorized."""

    async def reserve(self, sealed: SealedLine) -> str:
        """Money for it is put aside when this returns its ticket. Raises BudgetExceeded, LedgerUnavailable."""

    def release(self, ticket: str) -> None:
        """It was not asked, and is not billed."""

    async def send(
        self, provider_batch: ProviderBatch, sealed: Sequence[SealedLine], note: Callable[[str], Awaitable[None]]
    ) -> str:
        """The provider's id of the batch; `note` is told of its file before."""

    async def find(self, provider_batch: ProviderBatch) -> str | None:
        """The provider's id of what was sent under the parcel's name; None where there is none, or none can be told."""

    def finds(self, provider_batch: ProviderBatch) -> bool:
        """Whether `find` can tell that there is none."""

    async def look(self, provider_batch: ProviderBatch) -> BatchStatus: ...

    def rows(self, provider_batch: ProviderBatch, status: BatchStatus) -> AsyncIterator[BatchResult]: ...

    async def read(
        self, rows: Sequence[tuple[BatchLine, str, BatchResult]], terms: BatchTerms, provider_batch: ProviderBatch
    ) -> Sequence[LineAnswer | None]:
        """For a line, its ticket and its row: the answer, settled and written down; None: to be asked anew."""

    async def cancel(self, provider_batch: ProviderBatch) -> None: ...

    async def forget(self, provider_batch: ProviderBatch, status: BatchStatus | None) -> None:
        """Have the provider delete what it keeps of it."""


def line_number(request_id: str) -> int | None:
    """Of the line that a request was made from."""
    number = request_id.rpartition("-")[2]
    return int(number) if number.isdecimal() and len(number) < 10 else None
