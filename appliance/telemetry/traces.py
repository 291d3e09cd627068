"""Traces over OpenTelemetry's API alone: without an SDK in the process every call here does nothing.

Attributes say where a request went and why, never what it said.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from appliance import __version__
from appliance.core import Attempt, AttemptOutcome, Decision, Endpoint, Outcome

_PROPAGATOR = TraceContextTextMapPropagator()


def get_tracer() -> Tracer:
    return trace.get_tracer("appliance", __version__)


def _describe_decision(span: Span, decision: Decision) -> None:
    """Put what was decided before the first call on a request's span."""
    if not span.is_recording():
        return
    profile, route = decision.profile, decision.route
    span.set_attributes(
        {
            "appliance.request_id": decision.request_id,
            "appliance.decision_id": decision.id,
            "appliance.route": route.name,
            "appliance.policy": route.policy_version,
            "appliance.residency": str(route.residency),
            "appliance.residency_reason": route.residency_reason,
            "appliance.task": profile.task,
            "appliance.complexity": profile.complexity,
            "appliance.targets": [attempt.target.name for attempt in route.attempts],
            "appliance.excluded": [excluded.target for excluded in route.excluded],
        }
    )


def _describe_outcome(span: Span, outcome: Outcome) -> None:
    """Put the end of a request on its span."""
    if not span.is_recording():
        return
    span.set_attribute("http.response.status_code", outcome.status)
    if outcome.error_code is not None:
        span.set_attribute("error.type", outcome.error_code)
    if outcome.status >= 500:
        span.set_status(Status(StatusCode.ERROR, outcome.error_code))


def begin_request(endpoint: Endpoint, headers: Mapping[str, str]) -> Span:
    """The span of one request, a child of the caller's if `headers` hold a W3C traceparent; `end_request` ends it.

    For a request that outlives the function it began in, as a stream does.
    """
    parent = _PROPAGATOR.extract(headers) if "traceparent" in headers else None
    return get_tracer().start_span(endpoint, context=parent, kind=SpanKind.SERVER)


def use_request_span(span: Span) -> AbstractContextManager[Span]:
    """What is begun inside becomes a child of `span`, which does not end with it."""
    return trace.use_span(span, end_on_exit=False, record_exception=False, set_status_on_exception=False)


def end_request(span: Span, decision: Decision, outcome: Outcome) -> None:
    _describe_decision(span, decision)
    _describe_outcome(span, outcome)
    span.end()


def begin_attempt(attempt: Attempt, index: int) -> Span:
    """The span of one attempt, inside the current request's; `end_attempt` ends it."""
    span = get_tracer().start_span("attempt", kind=SpanKind.CLIENT)
    _describe_target(span, attempt, index)
    return span


def end_attempt(span: Span, outcome: AttemptOutcome) -> None:
    _describe_attempt(span, outcome)
    span.end()


def _describe_target(span: Span, attempt: Attempt, index: int) -> None:
    if not span.is_recording():
        return
    span.set_attributes(
        {
            "appliance.attempt": index,
            "appliance.target": attempt.target.name,
            "appliance.location": attempt.target.location,
            "appliance.reason": attempt.reason,
            "gen_ai.request.model": attempt.target.model,
        }
    )


def _describe_attempt(span: Span, outcome: AttemptOutcome) -> None:
    """Put how an attempt went on its span."""
    if not span.is_recording():
        return
    span.set_attribute("appliance.result", outcome.result)
    span.set_attribute("gen_ai.usage.input_tokens", outcome.usage.prompt_tokens)
    span.set_attribute("gen_ai.usage.output_tokens", outcome.usage.completion_tokens)
    if outcome.cost_usd is not None:
        span.set_attribute("appliance.cost_usd", outcome.cost_usd)
    if outcome.result in ("failed", "rejected", "refused"):
        span.set_status(Status(StatusCode.ERROR, outcome.result))
