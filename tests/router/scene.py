"""A router over stand-ins: everything real but the models and the ledger."""

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from appliance.config import Policy, parse_policy
from appliance.core import (
    Caller,
    EngineLoad,
    EngineStatus,
    Outcome,
    Price,
    Request,
    Residency,
    Snapshot,
    Target,
    TimeLimits,
    UpstreamCall,
    UpstreamReply,
)
from appliance.errors import BudgetExceeded, LedgerUnavailable, RejectedReply
from appliance.router.capacity.admission import Admission
from appliance.router.capacity.breaker import Breakers
from appliance.router.deps import FeedbackSink, NoFeedback, RouterDeps, RuntimeStats
from appliance.router.pii.scanner import PiiDetector, make_detector
from appliance.router.pipeline import Answer, Pipeline
from appliance.router.residency import EgressPermitIssuer
from appliance.state import State
from appliance.tasks.reply_result import ReplyResult
from appliance.upstream.base import Transports
from appliance.upstream.egress import EgressTransport
from appliance.upstream.local import LocalTransport

ABILITIES = frozenset({"chat", "completions", "labels", "json_schema", "logprobs"})
PRICE = Price(2.0, 8.0)

LOCAL_FIRST = """
[defaults]
latency_budget_seconds = 2.0
max_wait_seconds = 5.0
total_seconds = 20.0

[[routes]]
name = "complex"
match = { complexity_at_least = 0.7 }
targets = ["hosted", "onsite"]

[[routes]]
name = "general"
targets = ["onsite", "hosted"]
"""

_ids = itertools.count(1)


def policy_of(text: str = LOCAL_FIRST) -> Policy:
    return parse_policy(text, "policy.toml")


def engine_target(address: str = "unix:/nowhere.sock", name: str = "onsite/tiny", **fields: Any) -> Target:
    given: dict[str, Any] = {
        "location": "onsite",
        "dialect": "openai",
        "model": name.partition("/")[2],
        "abilities": ABILITIES,
        "context_tokens": 4096,
        "limits": TimeLimits(connect_seconds=2.0),
    }
    return Target(name=name, address=address, **{**given, **fields})


def hosted_target(address: str = "http://127.0.0.1:9/v1", name: str = "cloud/big", **fields: Any) -> Target:
    given: dict[str, Any] = {
        "location": "hosted",
        "dialect": "openai",
        "model": name.partition("/")[2],
        "abilities": ABILITIES | {"tools", "decisions"},
        "context_tokens": 100_000,
        "provider": name.partition("/")[0],
        "price": PRICE,
        "limits": TimeLimits(connect_seconds=2.0),
    }
    return Target(name=name, address=address, **{**given, **fields})


def make_request_load(**fields: Any) -> EngineLoad:
    given: dict[str, Any] = {
        "queued_requests": 0,
        "running_sequences": 0,
        "sequences_capacity": 4,
        "queued_prompt_tokens": 0,
        "remaining_output_tokens": 0,
        "kv_used_tokens": 0,
        "kv_cached_tokens": 0,
        "kv_capacity_tokens": 8192,
        "steps": 1,
        "prefill_tokens_total": 1,
        "decode_tokens_total": 1,
        "prefill_tokens_per_second": 1000.0,
        "decode_tokens_per_second": {1: 100.0, 4: 200.0},
    }
    return EngineLoad(**{**given, **fields})


def view_of(target: str = "onsite/tiny", *, seen: float, **fields: Any) -> EngineStatus:
    given: dict[str, Any] = {"state": "ready", "load": make_request_load()}
    return EngineStatus(target=target, seen=seen, **{**given, **fields})


def caller_of(**fields: Any) -> Caller:
    return Caller(**{"key_id": "key-1", "name": "tester", **fields})


def request_of(text: str = "hello there", **fields: Any) -> Request:
    number = next(_ids)
    given: dict[str, Any] = {
        "endpoint": "chat",
        "model": "auto",
        "body": {"messages": [{"role": "user", "content": text}]},
        "text": text,
        "stream": False,
        "caller": caller_of(),
        "received": time.monotonic(),
        "received_at": time.time(),
        "needs": frozenset({"chat"}),
    }
    return Request(id=f"req-{number}", decision_id=f"dec-{number}", **{**given, **fields})


@dataclass(frozen=True)
class ChatCall:
    """The simplest call: one chat completion, the payload as it came."""

    body: Mapping[str, Any]
    stream: bool = False
    prompt_tokens: int = 10
    output_tokens: int = 16
    rejects: tuple[str, ...] = ()
    """Targets whose answers do not pass."""
    calls: int = 1
    path: str = "/chat/completions"

    def streams(self, target: Target) -> bool:
        return self.stream

    def verified_late(self) -> None:
        return None

    def outgoing(self, target: Target) -> Sequence[UpstreamCall]:
        return [UpstreamCall(self.path, self.body)] * self.calls

    def read(self, target: Target, replies: Sequence[UpstreamReply]) -> ReplyResult:
        if target.name in self.rejects:
            raise RejectedReply(f"{target.name} answered nonsense")
        payloads = [reply.payload for reply in replies]
        return ReplyResult(payloads[0] if self.calls == 1 else payloads)


def call_of(request: Request, **fields: Any) -> ChatCall:
    return ChatCall(**{"body": request.body, "stream": request.stream, **fields})


@dataclass
class RecordingLedger:
    """What the pipeline tells the ledger, in order."""

    reserved: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Reservation id -> target and amount."""
    settled: dict[str, float] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    is_full: bool = False
    is_spent: bool = False
    log: list[str] = field(default_factory=list)

    async def reserve(self, *, decision_id: str, target: Target, usd: float, route: str, key_id: str) -> str:
        await asyncio.sleep(0)
        if self.is_full:
            raise LedgerUnavailable("the disk is full")
        if self.is_spent:
            raise BudgetExceeded("today's budget is spent")
        reservation = f"res-{len(self.reserved) + 1}"
        self.reserved[reservation] = (target.name, usd)
        self.log.append(f"reserve {target.name}")
        return reservation

    def settle(self, reservation_id: str, *, usd: float) -> None:
        assert reservation_id in self.reserved
        assert reservation_id not in self.settled
        self.settled[reservation_id] = usd
        self.log.append(f"settle {self.reserved[reservation_id][0]}")

    def record(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    @property
    def usd(self) -> float:
        return sum(self.settled.values())


class Scene:
    """State, doors and pipeline over given targets. `engine_is` says what the control plane would publish."""

    def __init__(self, *targets: Target, policy: str = LOCAL_FIRST, feedback: FeedbackSink | None = None) -> None:
        self.feedback = feedback or NoFeedback()
        self.now = time.monotonic
        self.state = State(self.now)
        self.ledger = RecordingLedger()
        self.stats = RuntimeStats()
        self.admission = Admission(self.state, self.now, self.stats.estimators)
        self.breakers = Breakers()
        self.pauses: list[float] = []
        """What was waited before retries; no test waits for it."""
        self.alerts: dict[tuple[str, str], str] = {}
        self.permits = EgressPermitIssuer()
        self.detector: PiiDetector | None = None
        """Set before `reload` to search with another one than the policy names."""
        hosted = {target.provider: target.address for target in targets if target.location == "hosted"}
        addresses = {name: address for name, address in hosted.items() if name is not None}
        egress = (
            EgressTransport(addresses, dict.fromkeys(addresses, "sk-secret"), self.permits.key) if addresses else None
        )
        self.transports = Transports(LocalTransport(), egress)
        self.targets = targets
        self.pipeline = self.reload(policy)
        self.publish()

    def reload(self, policy: str) -> Pipeline:
        written = policy_of(policy)
        deps = RouterDeps(
            state=self.state,
            ledger=self.ledger,
            admission=self.admission,
            breakers=self.breakers,
            stats=self.stats,
            transports=self.transports,
            permits=self.permits,
            alerts=self,
            feedback=self.feedback,
            sleep=self.pause,
            draw=lambda: 0.5,
            wall=self.wall,
        )
        self.pipeline = Pipeline(written, deps, self.detector or make_detector(written))
        return self.pipeline

    def wall(self) -> float:
        return time.time()

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(0)

    def warn(self, code: str, text: str, about: str = "") -> None:
        self.alerts[code, about] = text

    def clear(self, code: str, about: str = "") -> None:
        self.alerts.pop((code, about), None)

    def publish(self, **fields: Any) -> None:
        """A fresh snapshot: every engine of this node ready, unless `fields` says otherwise."""
        engines = [target.name for target in self.targets if target.provider is None]
        views = {name: view_of(name, **{"seen": self.now(), **fields}) for name in engines}
        self.state.publish(Snapshot(at=self.now(), targets=self.targets, engines=views))

    async def ask(self, text: str = "hello there", call: Mapping[str, Any] | None = None, **fields: Any) -> Answer:
        request = request_of(text, **fields)
        return await self.pipeline.answer(request, call_of(request, **(call or {})))

    async def aclose(self) -> None:
        await self.admission.aclose()
        await self.transports.aclose()

    def check_nothing_is_held(self) -> None:
        assert self.admission.total == 0
        assert set(self.ledger.settled) == set(self.ledger.reserved)
        for target in self.targets:
            assert self.admission.inflight(target.name).kv_tokens == 0
            assert self.admission.inflight(target.name).prompt_tokens == 0


async def read_stream(answer: Answer) -> bytes:
    assert answer.stream is not None
    blocks = [block async for block in answer.stream]
    await answer.aclose()
    return b"".join(blocks)


EU = Residency("region", "EU")
