"""What requests tell of themselves: spans, details and reasons, without secrets."""

from collections.abc import Iterator, Mapping

import pytest
from opentelemetry import trace
from opentelemetry.trace import SpanContext, TraceFlags
from opentelemetry.util.types import AttributeValue

from appliance.core import AttemptOutcome, Decision, Profile
from appliance.router.attempts.outcome import make_response_metadata
from appliance.router.attempts.runner import AttemptContext, AttemptRunner
from appliance.router.limits import RequestBudget
from appliance.router.routing.rank import make_empty_route
from tests.router.scene import policy_of, read_stream, request_of
from tests.router.stage import Stage

pytestmark = pytest.mark.anyio

KEY = "sk-abcdefghijklmnop1234"


class Span(trace.NonRecordingSpan):
    """Keeps what it is told."""

    def __init__(self, name: str, parent: str | None, number: int) -> None:
        super().__init__(SpanContext(1, number, is_remote=False, trace_flags=TraceFlags(1)))
        self.name, self.parent = name, parent
        self.told: dict[str, AttributeValue] = {}
        self.is_ended = False

    def is_recording(self) -> bool:
        return not self.is_ended

    def set_attribute(self, key: str, value: AttributeValue) -> None:
        self.told[key] = value

    def set_attributes(self, attributes: Mapping[str, AttributeValue]) -> None:
        self.told.update(attributes)

    def end(self, end_time: int | None = None) -> None:
        assert not self.is_ended, "a span ends once"
        self.is_ended = True


class Tracer(trace.NoOpTracer):
    def __init__(self) -> None:
        self.spans: list[Span] = []

    def start_span(self, name: str, context: object = None, **_: object) -> Span:  # type: ignore[override]
        parent = trace.get_current_span()
        span = Span(name, parent.name if isinstance(parent, Span) else None, len(self.spans) + 1)
        self.spans.append(span)
        return span


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Span]]:
    tracer = Tracer()
    monkeypatch.setattr("appliance.telemetry.traces.get_tracer", lambda: tracer)
    yield tracer.spans
    assert all(span.is_ended for span in tracer.spans), "a span was left open"


async def test_a_request_is_a_span_and_each_attempt_one_inside_it(stage: Stage, spans: list[Span]) -> None:
    stage.provider.mood = "server_error"
    await stage.ask("Prove that 2 is prime")
    request, first, second = spans
    assert (request.name, request.parent) == ("chat", None)
    assert [(span.name, span.parent) for span in (first, second)] == [("attempt", "chat")] * 2
    assert request.told["appliance.route"] == "complex" and request.told["http.response.status_code"] == 200
    assert first.told["appliance.target"] == "cloud/big" and first.told["appliance.result"] == "failed"
    assert second.told["appliance.reason"] == "fallback: cloud/big backend_error"
    assert second.told["gen_ai.usage.output_tokens"] == 5


async def test_the_spans_of_a_stream_end_with_it(stage: Stage, spans: list[Span]) -> None:
    answer = await stage.ask(stream=True)
    assert not any(span.is_ended for span in spans)
    await read_stream(answer)
    assert [span.is_ended for span in spans] == [True, True]
    assert spans[1].told["gen_ai.usage.output_tokens"] == 5


async def test_a_refused_request_is_a_span_too(stage: Stage, spans: list[Span]) -> None:
    with pytest.raises(Exception, match="does not exist"):
        await stage.ask(model="gpt-99")
    (request,) = spans
    assert request.told["error.type"] == "model_not_found"


async def test_no_span_holds_what_was_asked_or_answered(stage: Stage, spans: list[Span]) -> None:
    await stage.ask("my secret word is xylophone")
    for span in spans:
        assert "xylophone" not in str(span.told) and "forty two" not in str(span.told)


async def test_details_and_reasons_carry_no_secrets(stage: Stage) -> None:
    request, policy = request_of(), policy_of()
    decision = Decision(
        "d", "r", Profile("chat", 0.1, "text", "interactive", None, 1, 1), make_empty_route(request, policy)
    )
    target = stage.targets[0]
    attempt = stage.pipeline.decide(request, prompt_tokens=1, output_tokens=1).route.attempts[0]
    assert attempt.target == target
    trial = AttemptRunner(stage.pipeline._deps, AttemptContext(request, decision, RequestBudget(None), 0), 0, attempt)
    outcome: AttemptOutcome = trial.end("failed", f"it said: Authorization: Bearer {KEY}")
    assert KEY not in outcome.detail and outcome.detail
    metadata = make_response_metadata(request, decision, (), reason=f"fallback: key {KEY} was refused")
    assert KEY not in metadata.headers()["x-appliance-reason"]
