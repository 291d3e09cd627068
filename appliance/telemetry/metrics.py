"""Metrics for Prometheus, in a registry of their own: one Metrics object per node, none at module level."""

import math
import platform
from typing import Protocol

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import generate_latest

from appliance import __version__
from appliance.core import AttemptCause, AttemptOutcome, EngineStatus, Outcome, Snapshot

# From a small model's first token on an idle machine (10 ms) to a long prompt on a busy CPU (minutes).
FIRST_BYTE_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 30.0, 60.0, 120.0, 300.0)
REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 600.0)
_MOST_VALUES = 200
_COUNTED_CAUSES: frozenset[AttemptCause] = frozenset(
    {"overflow", "fallback", "rejected", "retry", "escalation", "degraded"}
)
_ENGINE = "appliance_engine_"


class LedgerState(Protocol):
    """What is shown of the ledger."""

    @property
    def ok(self) -> bool: ...

    @property
    def pending(self) -> int: ...

    @property
    def dropped(self) -> int: ...


class BoundedLabels:
    """Label values as they come, up to a number of different ones; then `other`.

    Names of routes and targets come from the configuration, but a region comes from a request's header, and whoever
    sends requests must not be able to fill the memory with series.
    """

    def __init__(self, most: int = _MOST_VALUES) -> None:
        self._most = most
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        if value in self._seen:
            return value
        if len(self._seen) >= self._most:
            return "other"
        self._seen.add(value)
        return value


class Metrics:
    """All series of one node. Called on the event loop; nothing here waits."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._target, self._route, self._residency, self._code = (
            BoundedLabels(),
            BoundedLabels(),
            BoundedLabels(),
            BoundedLabels(),
        )
        self._dropped_before = 0
        ProcessCollector(namespace="appliance", registry=registry)
        Info("appliance_build", "Version of the appliance and of Python.", registry=registry).info(
            {"version": __version__, "python": platform.python_version()}
        )
        self._requests = Counter(
            "appliance_requests_total",
            "Requests that ended, by the target that answered them (none: nobody did).",
            ("endpoint", "route", "target", "location", "status"),
            registry=registry,
        )
        self._attempts = Counter(
            "appliance_attempts_total", "Attempts at targets, by result.", ("target", "result"), registry=registry
        )
        self._tokens = Counter(
            "appliance_tokens_total",
            "Tokens of all attempts: prompt (of which cached) and completion (of which reasoning).",
            ("target", "kind"),
            registry=registry,
        )
        self._cost = Counter(
            "appliance_cost_usd_total", "Known cost of all attempts in US dollars.", ("target",), registry=registry
        )
        self._energy = Counter(
            "appliance_energy_joules_total",
            "Energy of all attempts beyond idling: metered, or by the power that is configured or assumed.",
            ("target",),
            registry=registry,
        )
        self._first_byte = Histogram(
            "appliance_first_byte_seconds",
            "From a request's arrival to the first byte of its answer.",
            ("target",),
            buckets=FIRST_BYTE_BUCKETS,
            registry=registry,
        )
        self._seconds = Histogram(
            "appliance_request_seconds",
            "From a request's arrival to its end.",
            ("endpoint", "location"),
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self._turns = Counter(
            "appliance_turns_total",
            "Attempts that were not a route's plain choice: overflow, fallback, rejected, retry, escalation, degraded.",
            ("target", "why"),
            registry=registry,
        )
        self._unsure = Counter(
            "appliance_unsure_total",
            "Answers below their route's confidence: escalated, or kept (rate used up, or nobody better answered).",
            ("target", "what"),
            registry=registry,
        )
        self._overflow = Counter(
            "appliance_overflow_total",
            "Requests that a target could not have taken in time.",
            ("from",),
            registry=registry,
        )
        self._bound = Counter(
            "appliance_bound_requests_total",
            "Requests bound to the site or a region.",
            ("residency",),
            registry=registry,
        )
        self._engine = _engine_gauges(registry)
        self._warnings = Gauge(
            "appliance_warning", "1 for each condition on the health page.", ("code",), registry=registry
        )
        self._ledger_ok = Gauge("appliance_ledger_ok", "Whether the ledger can be written.", registry=registry)
        self._ledger_pending = Gauge(
            "appliance_ledger_pending", "Entries of the ledger not written yet.", registry=registry
        )
        self._ledger_dropped = Counter(
            "appliance_ledger_dropped_total", "Outcomes that the ledger lost.", registry=registry
        )

    def observe_outcome(self, outcome: Outcome) -> None:
        """Count one request that has ended, with all its attempts."""
        answered = next((attempt for attempt in outcome.attempts if attempt.result == "answered"), None)
        target = "none" if answered is None else self._target(answered.target)
        location = "none" if answered is None else answered.location
        self._requests.labels(outcome.endpoint, self._route(outcome.route), target, location, str(outcome.status)).inc()
        self._seconds.labels(outcome.endpoint, location).observe(outcome.total_seconds)
        if outcome.first_byte_seconds is not None:
            self._first_byte.labels(target).observe(outcome.first_byte_seconds)
        if outcome.residency != "any":
            self._bound.labels(self._residency(outcome.residency)).inc()
        for attempt in outcome.attempts:
            self._observe_attempt(attempt)

    def _observe_attempt(self, attempt: AttemptOutcome) -> None:
        target = self._target(attempt.target)
        self._attempts.labels(target, attempt.result).inc()
        if attempt.result == "overflowed":
            self._overflow.labels(target).inc()
        if attempt.cause in _COUNTED_CAUSES:
            self._turns.labels(target, attempt.cause).inc()
        if attempt.is_unsure:
            self._unsure.labels(target, "kept" if attempt.result == "answered" else "escalated").inc()
        usage = attempt.usage
        for kind, tokens in (
            ("prompt", usage.prompt_tokens),
            ("cached", usage.cached_tokens),
            ("completion", usage.completion_tokens),
            ("reasoning", usage.reasoning_tokens),
        ):
            # A counter refuses what is negative, and a hosted target may report anything.
            if tokens > 0:
                self._tokens.labels(target, kind).inc(tokens)
        if attempt.energy_joules is not None and math.isfinite(attempt.energy_joules) and attempt.energy_joules > 0:
            self._energy.labels(target).inc(attempt.energy_joules)
        if attempt.cost_usd is not None and math.isfinite(attempt.cost_usd) and attempt.cost_usd > 0:
            self._cost.labels(target).inc(attempt.cost_usd)

    def observe_snapshot(self, snapshot: Snapshot) -> None:
        """Show the engines and warnings of `snapshot`, and no longer those that it has not."""
        for gauge in (*self._engine.values(), self._warnings):
            gauge.clear()
        for view in snapshot.engines.values():
            target = self._target(view.target)
            for name, value in _engine_values(view).items():
                self._engine[name].labels(target).set(value)
        for warning in snapshot.warnings:
            self._warnings.labels(self._code(warning.code)).set(1)

    def observe_ledger(self, health: LedgerState) -> None:
        self._ledger_ok.set(health.ok)
        self._ledger_pending.set(health.pending)
        self._ledger_dropped.inc(max(0, health.dropped - self._dropped_before))
        self._dropped_before = health.dropped

    def render(self) -> tuple[bytes, str]:
        """The page for the scraper, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


_ENGINE_HELP = {
    "ready": "Whether the engine takes requests.",
    "restarts": "Restarts since the node started.",
    "queued_requests": "Requests in the engine's own queue.",
    "running_sequences": "Sequences being decoded.",
    "kv_used_tokens": "Tokens held in the KV cache for running sequences.",
    "kv_cached_tokens": "Tokens kept in the KV cache for prompts to come.",
    "kv_capacity_tokens": "Tokens the KV cache can hold.",
    "prefill_tokens_per_second": "Measured prompt speed.",
    "decode_tokens_per_second": "Measured decoding speed over all sequences, at the best number of them.",
    "watts": "Extra power while busy, measured or assumed by the operator.",
}


def _engine_gauges(registry: CollectorRegistry) -> dict[str, Gauge]:
    return {name: Gauge(_ENGINE + name, text, ("target",), registry=registry) for name, text in _ENGINE_HELP.items()}


def _engine_values(view: EngineStatus) -> dict[str, float]:
    """What is known of an engine; what is not known has no series rather than a zero."""
    values: dict[str, float] = {"ready": view.state == "ready", "restarts": view.restarts}
    if view.watts is not None:
        values["watts"] = view.watts
    load = view.load
    if load is not None:
        values |= {
            "queued_requests": load.queued_requests,
            "running_sequences": load.running_sequences,
            "kv_used_tokens": load.kv_used_tokens,
            "kv_cached_tokens": load.kv_cached_tokens,
            "kv_capacity_tokens": load.kv_capacity_tokens,
            "prefill_tokens_per_second": load.prefill_tokens_per_second,
        }
        if load.decode_tokens_per_second:
            values["decode_tokens_per_second"] = max(load.decode_tokens_per_second.values())
    return values
