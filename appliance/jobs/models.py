"""What jobs are about: files, batches, lines and their answers. Frozen values, no I/O."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from appliance.core import Location, Usage
from appliance.core.json_types import JsonObject

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
ENDED: frozenset[Status] = frozenset({"failed", "completed", "expired", "cancelled"})
Ending = Literal["completed", "expired", "cancelled", "failed"]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as its owner sees it. Times are epoch seconds."""

    id: str
    owner: str
    filename: str
    purpose: str
    size_bytes: int
    created_at: float
    expires_at: float | None


@dataclass(frozen=True, slots=True)
class BatchProblem:
    """What is wrong with a line, or (without one) with a whole file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def to_json(self) -> JsonObject:
        return {"code": self.code, "line": self.line, "message": self.message, "param": self.param}


@dataclass(frozen=True, slots=True)
class LineCounts:
    """Lines of a batch. `failed` includes those that were not valid."""

    total: int = 0
    completed: int = 0
    failed: int = 0
    copied: int = 0
    """Of the completed and failed: answered by the answer of an identical line."""
    onsite: int = 0
    hosted: int = 0

    @property
    def left(self) -> int:
        return self.total - self.completed - self.failed


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch, replaced whole as it goes on. Times are epoch seconds."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: float
    expires_at: float
    status: Status = "validating"
    metadata: Mapping[str, str] = field(default_factory=dict)
    residency: str = "any"
    """What key, header and metadata bound it to when it was made; the key may bind it further later."""
    tag: str | None = None
    output_seconds: float | None = None
    """How long its results are kept, where its maker said so."""
    times: Mapping[str, float] = field(default_factory=dict)
    """Status -> when it began."""
    counts: LineCounts = LineCounts()
    usage: Usage = field(default_factory=Usage)
    cost_usd: float = 0.0
    """Of what is priced."""
    problems: tuple[BatchProblem, ...] = ()
    """The first ones."""
    model: str | None = None
    ending: Ending | None = None
    """How it will have ended, once it is finalizing."""
    output_bytes: int = 0
    error_bytes: int = 0
    """What of the result files is committed."""
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def is_over(self) -> bool:
        return self.status in ENDED


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A line that may be asked. `digest` is the same for the same url and body, whatever the order of its fields."""

    number: int
    """From 1, as editors count."""
    offset: int
    length: int
    custom_id: str
    url: str
    body: JsonObject
    digest: bytes


@dataclass(frozen=True, slots=True)
class BadLine:
    number: int
    offset: int
    length: int
    custom_id: str | None
    problem: BatchProblem


@dataclass(frozen=True, slots=True)
class BatchTerms:
    """On whose behalf, and how patiently, lines are asked."""

    batch_id: str
    owner: str
    residency: str
    tag: str | None
    patience_seconds: float
    """0: on-site is too late for it."""


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """What came of one line."""

    status: int
    body: JsonObject
    request_id: str
    location: Location | None = None
    usage: Usage = field(default_factory=Usage)
    cost_usd: float | None = None
    retry_after_seconds: float | None = None
    """Set where the line should be asked again, and not before so long."""
    decision_id: str | None = None

    @property
    def is_good(self) -> bool:
        return self.status < 400


@dataclass(frozen=True, slots=True)
class ProviderBatch:
    """The part of a batch that is sent as one of a provider's own batches.

    `name` is ours, and stands in the provider's metadata; it is on disk before anything is sent.
    """

    name: str
    batch_id: str
    target: str
    made_at: float
    uploaded: str | None = None
    """The provider's id of the file that was sent, once it is known."""
    remote_id: str | None = None
    """The provider's id of its batch, once it is known."""


class LineHandler(Protocol):
    """How lines are answered: the normal pipeline, on behalf of a key."""

    @property
    def endpoints(self) -> Sequence[str]:
        """The urls that lines may name."""

    def group_key(self, line: BatchLine) -> Hashable | None:
        """Lines with the same key may be asked in one call; None: alone. Pure."""

    async def execute(self, lines: Sequence[BatchLine], terms: BatchTerms) -> Sequence[LineAnswer]:
        """One answer for each line, in order. Raises Unauthorized where the key is no more."""
