"""What the node says of itself: complete enough to run it, and never a secret or a prompt."""

import io
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, Status, StatusCode, TraceFlags
from prometheus_client.parser import text_string_to_metric_families

from appliance.core import (
    ONSITE,
    Attempt,
    AttemptOutcome,
    Caller,
    Decision,
    EngineLoad,
    EngineStatus,
    ExcludedTarget,
    HealthWarning,
    Outcome,
    Profile,
    Request,
    Route,
    Snapshot,
    Target,
    Usage,
)
from appliance.telemetry import traces
from appliance.telemetry.logs import LogLineHandler, setup_logging
from appliance.telemetry.metrics import Metrics
from appliance.telemetry.redaction import scrub_text

PROFILE = Profile("chat", 0.2, "text", "interactive", "en", 10, 20)
ANSWERED = AttemptOutcome(
    0, "onsite/small", "onsite", "first", "answered", "", 1.0, 0.3, 2.0, Usage(10, 20, 4, 2), cost_usd=0.5
)
OUTCOME = Outcome(
    decision_id="dec_1",
    request_id="req_1",
    received_at=1.0,
    endpoint="chat",
    model="auto",
    key_id="key_1",
    route="everyday",
    policy_version="sha256:abc",
    residency="any",
    residency_reason="",
    profile=PROFILE,
    attempts=(ANSWERED,),
    excluded=(),
    status=200,
    error_code=None,
    stream=False,
    first_byte_seconds=0.3,
    total_seconds=2.0,
)
LOCAL = Target("onsite/small", "onsite", "openai", "unix:/run/e.sock", "small", frozenset({"chat"}))


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    levels = {name: logging.getLogger(name).level for name in ("", "httpx", "uvicorn.access", "alembic")}
    yield io.StringIO()
    structlog.reset_defaults()
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, LogLineHandler)]:
        root.removeHandler(handler)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_databases_statements_are_not_logged_at_info() -> None:
    setup_logging("info", "json", stream=io.StringIO())
    assert not logging.getLogger("sqlalchemy.engine.Engine").isEnabledFor(logging.INFO)


def test_our_lines_and_those_of_libraries_look_the_same(stream: io.StringIO) -> None:
    setup_logging("info", "json", stream=stream)
    structlog.stdlib.get_logger("appliance.node").info("engine ready", engine="onsite/small", seconds=1.5)
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 7)
    logging.getLogger("sqlalchemy.engine").warning("slow", extra={"seconds": 3})

    ours, uvicorns, sqlalchemys = lines(stream)

    assert ours["event"] == "engine ready"
    assert (ours["engine"], ours["seconds"], ours["level"], ours["logger"]) == (
        "onsite/small",
        1.5,
        "info",
        "appliance.node",
    )
    assert uvicorns["event"] == "Started server process [7]"
    assert sqlalchemys["seconds"] == 3
    assert set(ours) >= {"timestamp", "level", "logger", "event"} <= set(uvicorns)


def test_the_console_form_is_plain_text_on_one_line(stream: io.StringIO) -> None:
    setup_logging("info", "console", stream=stream)
    structlog.stdlib.get_logger("appliance.node").warning("engine restarted", restarts=2)

    text = stream.getvalue()

    assert "engine restarted" in text
    assert "restarts=2" in text
    assert "\x1b" not in text
    assert text.count("\n") == 1


def test_auto_means_json_where_nobody_watches(stream: io.StringIO) -> None:
    setup_logging("info", "auto", stream=stream)
    logging.getLogger("x").warning("hello")

    assert lines(stream)[0]["event"] == "hello"


def test_auto_means_console_on_a_terminal(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "isatty", lambda: True)
    setup_logging("info", "auto", stream=stream)
    logging.getLogger("x").warning("hello")

    assert not stream.getvalue().startswith("{")


def test_a_second_set_up_replaces_the_first(stream: io.StringIO) -> None:
    setup_logging("info", "json", stream=io.StringIO())
    setup_logging("warning", "json", stream=stream)
    structlog.stdlib.get_logger("x").info("too quiet")
    structlog.stdlib.get_logger("x").warning("once")

    assert [line["event"] for line in lines(stream)] == ["once"]


def test_lines_per_request_of_libraries_are_left_out(stream: io.StringIO) -> None:
    setup_logging("info", "json", stream=stream)
    for name in ("httpx", "uvicorn.access", "alembic.runtime.migration"):
        logging.getLogger(name).info("chatter")

    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer s3cr3t-value",
        "{'authorization': 'Bearer s3cr3t-value', 'accept': '*/*'}",
        "(b'authorization', b'Bearer s3cr3t-value')",
        '{"api_key": "s3cr3t-value"}',
        "x-api-key: s3cr3t-value",
        "Incorrect API key provided: sk-s3cr3t-value. You can find yours at",
        "caller used apl_s3cr3t-value_more",
        "GET https://anna:s3cr3t-value@host.example/v1",
        "password=s3cr3t-value",
        "1 validation error\n  input_value={'content': 's3cr3t-value'}, input_type=dict]",
    ],
)
def test_secrets_are_scrubbed_from_any_text(stream: io.StringIO, text: str) -> None:
    setup_logging("info", "json", stream=stream)
    structlog.stdlib.get_logger("x").info(text)
    structlog.stdlib.get_logger("x").info("in a field", detail=text, nested={"deep": [text]})
    try:
        raise RuntimeError(text)
    except RuntimeError:
        logging.getLogger("x").exception("in an exception")

    assert len(lines(stream)) == 3
    assert "s3cr3t" not in stream.getvalue()
    assert "[hidden]" in stream.getvalue()


@pytest.mark.parametrize(
    "text", ["the risk-free rate", "prompt_tokens=12", "http://host:8080/v1", "api keys are optional on loopback"]
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert scrub_text(text) == text


def test_fields_that_hold_secrets_or_prompts_are_hidden_whatever_their_value(stream: io.StringIO) -> None:
    marker = "xylophone-4711"
    request = Request(
        id="req_1",
        decision_id="dec_1",
        endpoint="chat",
        model="auto",
        body={"messages": [{"role": "user", "content": marker}]},
        text=marker,
        stream=False,
        caller=Caller(key_id="key_1", name="anna"),
        received=1.0,
        received_at=1.0,
    )
    setup_logging("info", "json", stream=stream)
    log = structlog.stdlib.get_logger("x")
    log.info("a request", request=request, body=dict(request.body), prompt=request.text, key_id="key_1")
    log.info("a provider", provider={"name": "acme", "api_key": marker, "headers": {"Authorization": marker}})
    logging.getLogger("lib").warning("extra", extra={"messages": [marker], "prompt_tokens": 12})

    assert marker not in stream.getvalue()
    first, second, third = lines(stream)
    assert first["request"] == "<Request req_1>"
    assert first["key_id"] == "key_1"
    assert second["provider"]["name"] == "acme"
    assert third["prompt_tokens"] == 12


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    page, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((name, frozenset(labels.items())))


def test_an_outcome_is_counted_with_all_its_attempts() -> None:
    metrics = Metrics()
    overflowed = replace(ANSWERED, result="overflowed", usage=Usage(), cost_usd=None)
    hosted = replace(ANSWERED, index=1, target="acme/large", location="hosted", cost_usd=0.25)
    metrics.observe_outcome(replace(OUTCOME, attempts=(overflowed, hosted), residency="region:EU"))
    metrics.observe_outcome(replace(OUTCOME, attempts=(), status=403, first_byte_seconds=None))

    labels = {"endpoint": "chat", "route": "everyday"}
    assert (
        value(metrics, "appliance_requests_total", **labels, target="acme/large", location="hosted", status="200") == 1
    )
    assert value(metrics, "appliance_requests_total", **labels, target="none", location="none", status="403") == 1
    assert value(metrics, "appliance_attempts_total", target="onsite/small", result="overflowed") == 1
    assert value(metrics, "appliance_attempts_total", target="acme/large", result="answered") == 1
    assert value(metrics, "appliance_overflow_total", **{"from": "onsite/small"}) == 1
    assert value(metrics, "appliance_tokens_total", target="acme/large", kind="completion") == 20
    assert value(metrics, "appliance_tokens_total", target="acme/large", kind="cached") == 4
    assert value(metrics, "appliance_cost_usd_total", target="acme/large") == 0.25
    assert value(metrics, "appliance_bound_requests_total", residency="region:EU") == 1
    assert value(metrics, "appliance_first_byte_seconds_bucket", target="acme/large", le="0.4") == 1
    assert value(metrics, "appliance_first_byte_seconds_bucket", target="acme/large", le="0.2") == 0
    assert value(metrics, "appliance_request_seconds_count", endpoint="chat", location="hosted") == 1


def test_every_series_carries_our_name_and_two_nodes_share_none() -> None:
    first, second = Metrics(), Metrics()
    first.observe_outcome(OUTCOME)

    assert {name.split("_")[0] for name, _ in samples(first)} == {"appliance"}
    assert value(second, "appliance_tokens_total", target="onsite/small", kind="prompt") is None


def test_a_hosted_target_that_reports_nonsense_breaks_no_counter() -> None:
    metrics = Metrics()
    nonsense = replace(ANSWERED, usage=Usage(-5, 20, -1, 0), cost_usd=float("nan"))
    metrics.observe_outcome(replace(OUTCOME, attempts=(nonsense,)))

    assert value(metrics, "appliance_tokens_total", target="onsite/small", kind="prompt") is None
    assert value(metrics, "appliance_tokens_total", target="onsite/small", kind="completion") == 20
    assert value(metrics, "appliance_cost_usd_total", target="onsite/small") is None


def test_callers_cannot_fill_the_memory_with_series() -> None:
    metrics = Metrics()
    for number in range(1000):
        metrics.observe_outcome(replace(OUTCOME, residency=f"region:EU-{number}"))

    by_region = {
        dict(labels)["residency"]: count
        for (name, labels), count in samples(metrics).items()
        if name == "appliance_bound_requests_total"
    }
    assert len(by_region) == 201
    assert by_region["other"] == 800


LOAD = EngineLoad(
    queued_requests=3,
    running_sequences=8,
    sequences_capacity=16,
    queued_prompt_tokens=100,
    remaining_output_tokens=50,
    kv_used_tokens=900,
    kv_cached_tokens=100,
    kv_capacity_tokens=4096,
    steps=1,
    prefill_tokens_total=1,
    decode_tokens_total=1,
    prefill_tokens_per_second=941.0,
    decode_tokens_per_second={1: 243.0, 8: 381.0},
)


def test_engines_show_what_is_known_and_vanish_when_they_are_gone() -> None:
    metrics = Metrics()
    ready = EngineStatus("onsite/small", "ready", seen=1.0, load=LOAD, restarts=2)
    starting = EngineStatus("onsite/large", "starting", seen=1.0)
    metrics.observe_snapshot(
        Snapshot(
            1.0,
            engines={"onsite/small": ready, "onsite/large": starting},
            warnings=(HealthWarning("disk_full", "free space"),),
        )
    )

    assert value(metrics, "appliance_engine_ready", target="onsite/small") == 1
    assert value(metrics, "appliance_engine_ready", target="onsite/large") == 0
    assert value(metrics, "appliance_engine_restarts", target="onsite/small") == 2
    assert value(metrics, "appliance_engine_queued_requests", target="onsite/small") == 3
    assert value(metrics, "appliance_engine_kv_used_tokens", target="onsite/small") == 900
    assert value(metrics, "appliance_engine_kv_capacity_tokens", target="onsite/small") == 4096
    assert value(metrics, "appliance_engine_prefill_tokens_per_second", target="onsite/small") == 941
    assert value(metrics, "appliance_engine_decode_tokens_per_second", target="onsite/small") == 381
    assert value(metrics, "appliance_engine_queued_requests", target="onsite/large") is None
    assert value(metrics, "appliance_warning", code="disk_full") == 1

    metrics.observe_snapshot(Snapshot(2.0, engines={"onsite/large": starting}))

    assert value(metrics, "appliance_engine_ready", target="onsite/small") is None
    assert value(metrics, "appliance_warning", code="disk_full") is None


@dataclass(frozen=True)
class Health:
    ok: bool
    pending: int
    dropped: int


def test_the_ledger_shows_what_waits_and_what_was_lost() -> None:
    metrics = Metrics()
    metrics.observe_ledger(Health(ok=True, pending=0, dropped=0))
    metrics.observe_ledger(Health(ok=False, pending=7, dropped=3))
    metrics.observe_ledger(Health(ok=False, pending=7, dropped=5))

    assert value(metrics, "appliance_ledger_ok") == 0
    assert value(metrics, "appliance_ledger_pending") == 7
    assert value(metrics, "appliance_ledger_dropped_total") == 5


def test_counting_an_outcome_costs_a_request_less_than_200_microseconds() -> None:
    metrics = Metrics()
    took = []
    for _ in range(500):
        start = time.perf_counter()
        metrics.observe_outcome(OUTCOME)
        took.append(time.perf_counter() - start)

    assert sorted(took)[len(took) // 2] < 200e-6


@dataclass
class RecordedSpan(NonRecordingSpan):
    """A span that keeps what it is told, as an SDK's would."""

    name: str
    parent: SpanContext
    attributes: dict[str, Any] = field(default_factory=dict)
    status: Status | None = None

    def __post_init__(self) -> None:
        super().__init__(SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=TraceFlags(1)))

    def is_recording(self) -> bool:
        return True

    def set_attribute(self, key: str, value: Any) -> None:
        self.attributes[key] = value

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        self.attributes.update(attributes)

    def set_status(self, status: Any, description: str | None = None) -> None:
        self.status = status


class RecordingTracer(trace.NoOpTracer):
    def __init__(self) -> None:
        self.spans: list[RecordedSpan] = []

    def start_span(self, name: str, context: Context | None = None, **_: Any) -> Span:  # type: ignore[override]
        span = RecordedSpan(name, trace.get_current_span(context).get_span_context())
        self.spans.append(span)
        return span


@pytest.fixture
def tracer(monkeypatch: pytest.MonkeyPatch) -> RecordingTracer:
    made = RecordingTracer()
    monkeypatch.setattr(traces, "get_tracer", lambda: made)
    return made


def decision() -> Decision:
    route = Route(
        name="everyday",
        policy_version="sha256:abc",
        residency=ONSITE,
        residency_reason="the key is bound",
        attempts=(Attempt(LOCAL, "first"),),
        excluded=(ExcludedTarget("acme/large", "outside the bound"),),
        latency_budget_seconds=1.0,
        max_wait_seconds=1.0,
        total_seconds=1.0,
        max_attempts=1,
    )
    return Decision("dec_1", "req_1", PROFILE, route)


def test_a_request_and_its_attempts_become_spans_of_the_callers_trace(tracer: RecordingTracer) -> None:
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    span = traces.begin_request("chat", headers)
    with traces.use_request_span(span):
        traces.end_attempt(traces.begin_attempt(Attempt(LOCAL, "first"), 0), replace(ANSWERED, result="failed"))
    traces.end_request(span, decision(), replace(OUTCOME, status=502, error_code="backend_garbage"))

    request, tried = tracer.spans
    assert request.parent.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    assert request.parent.span_id == 0xB7AD6B7169203331
    assert tried.parent.span_id == 0xDEF
    assert request.attributes["appliance.decision_id"] == "dec_1"
    assert request.attributes["appliance.residency"] == "onsite"
    assert request.attributes["appliance.excluded"] == ["acme/large"]
    assert request.attributes["http.response.status_code"] == 502
    assert request.attributes["error.type"] == "backend_garbage"
    assert tried.attributes["appliance.target"] == "onsite/small"
    assert tried.attributes["gen_ai.usage.output_tokens"] == 20
    assert tried.attributes["appliance.cost_usd"] == 0.5
    assert tried.status is not None
    assert tried.status.status_code is StatusCode.ERROR


def test_an_error_in_a_span_leaves_none_of_its_words_there(tracer: RecordingTracer) -> None:
    with pytest.raises(ValueError, match="xylophone"), traces.use_request_span(traces.begin_request("chat", {})):
        raise ValueError("xylophone-4711")

    (span,) = tracer.spans
    assert "xylophone" not in repr(span)


@pytest.mark.parametrize("header", ["", "garbage", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 10_000])
def test_a_broken_traceparent_starts_a_trace_of_its_own(tracer: RecordingTracer, header: str) -> None:
    traces.begin_request("chat", {"traceparent": header})

    assert not tracer.spans[0].parent.is_valid


def test_without_an_sdk_nothing_is_recorded_and_nothing_breaks() -> None:
    span = traces.begin_request("chat", {})
    with traces.use_request_span(span):
        traces.end_attempt(traces.begin_attempt(Attempt(LOCAL, "first"), 0), ANSWERED)
    traces.end_request(span, decision(), OUTCOME)

    assert not span.is_recording()


def test_turns_and_unsure_answers_are_counted_by_cause_whatever_the_sentences_say() -> None:
    metrics = Metrics()
    unsure = replace(ANSWERED, result="rejected", detail="confidence 0.40 is below 0.70", is_unsure=True)
    kept = replace(ANSWERED, detail="confidence 0.40 is below 0.70; the rate is used up", is_unsure=True)
    better = replace(ANSWERED, target="acme/large", reason="a better model was asked", cause="escalation")
    less = replace(ANSWERED, reason="a shorter request was sent", cause="degraded")
    for attempts in ((unsure, better), (kept,), (less,)):
        metrics.observe_outcome(replace(OUTCOME, attempts=attempts))

    page = metrics.render()[0].decode()
    assert 'appliance_turns_total{target="acme/large",why="escalation"} 1.0' in page
    assert 'appliance_turns_total{target="onsite/small",why="degraded"} 1.0' in page
    assert 'appliance_unsure_total{target="onsite/small",what="escalated"} 1.0' in page
    assert 'appliance_unsure_total{target="onsite/small",what="kept"} 1.0' in page
