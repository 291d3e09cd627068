"""The pipeline as its callers, the HTTP API and jobs, see it: the router gives the real one, tests give stand-ins."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from appliance.core import Caller, Decision, Request, ResponseMetadata, Target, TaskCall, TaskResult


class PipelineAnswer(Protocol):
    """One answered request. Whoever has it closes it, however it ends; closing twice is allowed."""

    @property
    def status(self) -> int: ...

    @property
    def metadata(self) -> ResponseMetadata: ...

    @property
    def payload(self) -> Any:
        """The response's JSON; None for a stream."""

    @property
    def result(self) -> TaskResult | None:
        """What the call's `read` returned; None for a stream."""

    @property
    def stream(self) -> AsyncIterator[bytes] | None: ...

    @property
    def raw(self) -> bytes | None:
        """The whole reply as it came, where that is in the caller's own dialect."""

    @property
    def is_forwarded(self) -> bool:
        """Whether the stream is in the caller's own dialect. Errors in it are raised, not written into it."""

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
