"""What the API needs of the rooms below, and no more: serve gives the real ones, tests give stand-ins."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from appliance.core import Call, Caller, Decision, Facts, Request, Snapshot, Target


class Answer(Protocol):
    """One answered request. Whoever has it closes it, however it ends; closing twice is allowed."""

    @property
    def status(self) -> int: ...

    @property
    def facts(self) -> Facts: ...

    @property
    def payload(self) -> Any:
        """What the call's `read` returned; None for a stream."""

    @property
    def stream(self) -> AsyncIterator[bytes] | None: ...

    async def aclose(self) -> None: ...


class Many(Protocol):
    @property
    def facts(self) -> Facts: ...

    @property
    def results(self) -> Sequence[Any]:
        """In the calls' order: what `read` returned, or the ApplianceError that call ended with."""


class Counted(Protocol):
    @property
    def tokens(self) -> int: ...

    def headers(self) -> Mapping[str, str]:
        """Who counted, and how."""


class Pipeline(Protocol):
    async def searched(self, request: Request) -> Request: ...

    def decide(self, request: Request, *, prompt_tokens: int, output_tokens: int) -> Decision: ...

    async def answer(self, request: Request, call: Call) -> Answer: ...

    async def answer_many(self, request: Request, calls: Sequence[Call], *, concurrency: int) -> Many: ...

    async def count(self, request: Request, call: Call) -> Counted: ...

    def models(self, caller: Caller) -> Sequence[Target]: ...

    def meant(self, model: str) -> str:
        """The name that `model` stands for, which is mostly itself."""


class Snapshots(Protocol):
    @property
    def snapshot(self) -> Snapshot: ...


class Health(Protocol):
    @property
    def ok(self) -> bool: ...

    @property
    def reason(self) -> str: ...

    @property
    def pending(self) -> int: ...

    @property
    def dropped(self) -> int: ...


class Ledger(Protocol):
    def health(self) -> Health: ...

    async def decision(self, decision_id: str) -> Mapping[str, Any] | None: ...


class Metrics(Protocol):
    def observe_snapshot(self, snapshot: Snapshot) -> None: ...

    def observe_ledger(self, health: Health) -> None: ...

    def render(self) -> tuple[bytes, str]: ...
