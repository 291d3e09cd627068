"""What the API needs of the rooms below, and no more: serve gives the real ones, tests give stand-ins."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from appliance.core import Caller, Decision, Request, ResponseMetadata, Snapshot, Target, TaskCall


class PipelineAnswer(Protocol):
    """One answered request. Whoever has it closes it, however it ends; closing twice is allowed."""

    @property
    def status(self) -> int: ...

    @property
    def metadata(self) -> ResponseMetadata: ...

    @property
    def payload(self) -> Any:
        """What the call's `read` returned; None for a stream."""

    @property
    def stream(self) -> AsyncIterator[bytes] | None: ...

    async def aclose(self) -> None: ...


class PipelineBatchAnswer(Protocol):
    @property
    def metadata(self) -> ResponseMetadata: ...

    @property
    def results(self) -> Sequence[Any]:
        """In the calls' order: what `read` returned, or the ApplianceError that call ended with."""


class PipelineTokenCount(Protocol):
    @property
    def tokens(self) -> int: ...

    def headers(self) -> Mapping[str, str]:
        """Who counted, and how."""


class RequestPipeline(Protocol):
    async def with_pii_scan(self, request: Request) -> Request: ...

    def decide(self, request: Request, *, prompt_tokens: int, output_tokens: int) -> Decision: ...

    async def answer(self, request: Request, call: TaskCall) -> PipelineAnswer: ...

    async def answer_many(
        self, request: Request, calls: Sequence[TaskCall], *, concurrency: int
    ) -> PipelineBatchAnswer: ...

    async def count_tokens(self, request: Request, call: TaskCall) -> PipelineTokenCount: ...

    def list_models(self, caller: Caller) -> Sequence[Target]: ...

    def resolve_alias(self, model: str) -> str:
        """The name that `model` stands for, which is mostly itself."""


class SnapshotSource(Protocol):
    @property
    def snapshot(self) -> Snapshot: ...


class LedgerStatus(Protocol):
    @property
    def ok(self) -> bool: ...

    @property
    def reason(self) -> str: ...

    @property
    def pending(self) -> int: ...

    @property
    def dropped(self) -> int: ...


class LedgerReader(Protocol):
    def health(self) -> LedgerStatus: ...

    async def read_decision(self, decision_id: str) -> Mapping[str, Any] | None: ...


class MetricsPage(Protocol):
    def observe_snapshot(self, snapshot: Snapshot) -> None: ...

    def observe_ledger(self, health: LedgerStatus) -> None: ...

    def render(self) -> tuple[bytes, str]: ...
