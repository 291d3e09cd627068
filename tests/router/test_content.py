"""Requests that hold personal data: bound by it on every path, and bound too where nobody could look."""

import asyncio
import importlib.util
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from appliance.core import ONSITE, Decision, ParsedRequest, PersonalKind, Request, Residency, TaskCall
from appliance.errors import ConfigError, ResidencyRefused, UnknownModel
from appliance.router.pii.scanner import SEARCHES_AT_ONCE, make_detector
from appliance.router.request_builder import make_request
from appliance.tasks import chat, completions
from appliance.tasks.decisions import openai_shape, systemone
from appliance.tasks.extract import extraction
from tests.router.scene import Scene, call_of, caller_of, engine_target, hosted_target, policy_of, request_of
from tests.router.stage import Stage, settled
from tests.standin import StandIn

pytestmark = pytest.mark.anyio

SEARCHING = """
[defaults]
latency_budget_seconds = 2.0
max_wait_seconds = 5.0
total_seconds = 20.0

[residency]
content = "personal_data"
timeout_seconds = 5.0

[[routes]]
name = "careless"
match = { tag = ["careless"] }
content = "off"
targets = ["hosted", "onsite"]

[[routes]]
name = "outside"
targets = ["hosted", "onsite"]
"""
SECRET = "jane.doe@example.com"
CARD = "4111 1111 1111 1111"


@pytest.fixture
async def searching(tmp_path: Path) -> AsyncIterator[Stage]:
    """Hosted first, were it not for what requests hold."""
    async with StandIn(uds=str(tmp_path / "engine.sock")) as engine, StandIn() as provider:
        made = Stage(engine, provider, policy=SEARCHING)
        yield made
        await made.aclose()
        made.check_nothing_is_held()


async def decided(scene: Scene, request: Request) -> Decision:
    return scene.pipeline.decide(await scene.pipeline.with_pii_scan(request), prompt_tokens=10, output_tokens=10)


async def test_personal_data_keeps_a_request_here_and_the_reason_names_kinds_alone(searching: Stage) -> None:
    answer = await searching.ask(f"Write to {SECRET} about card {CARD}")
    outcome = searching.ledger.outcomes[-1]
    assert answer.metadata.location == "onsite"
    assert searching.provider.calls == 0
    assert outcome.residency == "onsite"
    assert outcome.residency_reason == "onsite by its content (e-mail address, card number)"
    assert outcome.profile.risk == "personal_data"
    told = f"{answer.metadata.headers()}{outcome}"
    assert SECRET not in told
    assert "4111" not in told
    assert (await searching.ask("Write to nobody")).metadata.location == "hosted"


async def test_a_route_that_does_not_care_lets_it_go(searching: Stage) -> None:
    assert (await searching.ask(f"Write to {SECRET}", tag="careless")).metadata.location == "hosted"


async def test_nothing_is_searched_where_no_route_asks_for_it(stage: Stage) -> None:
    assert make_detector(policy_of()) is None
    request = request_of(SECRET)
    assert await stage.pipeline.with_pii_scan(request) is request


async def test_a_header_that_says_any_does_not_loosen_what_the_content_binds(searching: Stage) -> None:
    answer = await searching.ask(SECRET, residency=Residency("any"))
    assert answer.metadata.location == "onsite"
    assert "the stricter wins over: the request's header says any" in searching.ledger.outcomes[-1].residency_reason


async def test_a_pinned_hosted_model_is_refused_and_told_why(searching: Stage) -> None:
    with pytest.raises(ResidencyRefused, match=r"'cloud/big'.*its content \(e-mail address\)") as caught:
        await searching.ask(SECRET, model="cloud/big")
    assert caught.value.status == 403
    assert SECRET not in caught.value.message
    assert searching.provider.calls == 0
    with pytest.raises(ResidencyRefused, match="onsite by key 'tester'"):
        await searching.ask("hello", model="cloud/big", caller=caller_of(residency=ONSITE))


async def test_a_request_that_was_not_searched_is_bound(searching: Stage) -> None:
    decision = searching.pipeline.decide(request_of("harmless"), prompt_tokens=1, output_tokens=1)
    assert decision.route.residency == ONSITE
    assert decision.route.residency_reason == "onsite by its content (not searched)"


async def test_while_the_engine_is_full_or_down_personal_data_waits_and_never_leaves(searching: Stage) -> None:
    slots = await searching.fill_engine()
    waiting = asyncio.ensure_future(searching.ask(SECRET))
    await settled()
    assert not waiting.done()
    assert searching.provider.calls == 0
    for slot in slots:
        slot.release()
    assert (await waiting).metadata.location == "onsite"
    searching.engine.mood = "server_error"
    with pytest.raises(Exception, match="onsite/tiny"):
        await searching.ask(SECRET)
    assert searching.provider.calls == 0


QUESTIONS: list[dict[str, Any]] = [
    {"type": "choice", "instructions": "which", "choices": [{"value": "a"}, {"value": "b"}]}
]
NOUL = {"q": {"type": "noul", "instructions": "is it"}}
Reader = Callable[[Mapping[str, Any]], tuple[ParsedRequest, Sequence[TaskCall]]]
PLACES: Mapping[str, tuple[Reader, Callable[[str], dict[str, Any]]]] = {
    "a message": (chat.read_chat_request, lambda s: {"messages": [{"role": "user", "content": s}]}),
    "a system message": (
        chat.read_chat_request,
        lambda s: {"messages": [{"role": "system", "content": s}, {"role": "user", "content": "x"}]},
    ),
    "a tool call's arguments": (
        chat.read_chat_request,
        lambda s: {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": f'{{"to": "{s}"}}'}}]},
            ]
        },
    ),
    "a tool's description": (
        chat.read_chat_request,
        lambda s: {
            "messages": [{"role": "user", "content": "x"}],
            "tools": [{"type": "function", "function": {"name": "f", "description": s}}],
        },
    ),
    "a schema's description": (
        chat.read_chat_request,
        lambda s: {
            "messages": [{"role": "user", "content": "x"}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "object", "description": s}},
            },
        },
    ),
    "a field that nobody knows": (
        chat.read_chat_request,
        lambda s: {"messages": [{"role": "user", "content": "x"}], "metadata": {"about": [s]}},
    ),
    "the user field": (chat.read_chat_request, lambda s: {"messages": [{"role": "user", "content": "x"}], "user": s}),
    "a prompt": (completions.read_completion_request, lambda s: {"prompt": ["x", s]}),
    "a decision's input": (openai_shape.read_decision_request, lambda s: {"input": s, "questions": QUESTIONS}),
    "a decision's instructions": (
        openai_shape.read_decision_request,
        lambda s: {"input": "x", "questions": [{"type": "predicate", "instructions": f"Is it {s}?"}]},
    ),
    "a choice": (
        openai_shape.read_decision_request,
        lambda s: {"input": "x", "questions": [{**QUESTIONS[0], "choices": [{"value": s}, {"value": "b"}]}]},
    ),
    "a choice's description": (
        openai_shape.read_decision_request,
        lambda s: {
            "input": "x",
            "questions": [{**QUESTIONS[0], "choices": [{"value": "a", "description": s}, {"value": "b"}]}],
        },
    ),
    "a question's name": (
        openai_shape.read_decision_request,
        lambda s: {"input": "x", "questions": [{**QUESTIONS[0], "name": s}]},
    ),
    "one of many inputs": (
        openai_shape.read_decision_batch,
        lambda s: {"inputs": [*["x"] * 50, s, *["y"] * 50], "questions": QUESTIONS},
    ),
    "System One's state": (systemone.read_systemone_request, lambda s: {"state": {"mail": s}, "questions": NOUL}),
    "System One's instructions": (
        systemone.read_systemone_request,
        lambda s: {"state": "x", "questions": {"q": {"type": "noul", "instructions": s}}},
    ),
    "System One's option": (
        systemone.read_systemone_request,
        lambda s: {
            "state": "x",
            "questions": {"q": {"type": "choice", "instructions": "which", "criteria": {s: None, "b": None}}},
        },
    ),
    "System One's question id": (
        systemone.read_systemone_request,
        lambda s: {"state": "x", "questions": {s: NOUL["q"]}},
    ),
    "a text to extract from": (
        extraction.read_extract_request,
        lambda s: {"texts": ["x", s], "schema": {"type": "object"}},
    ),
    "an extraction's instructions": (
        extraction.read_extract_request,
        lambda s: {"text": "x", "instructions": s, "schema": {"type": "object"}},
    ),
    "an extraction schema's description": (
        extraction.read_extract_request,
        lambda s: {
            "text": "x",
            "schema": {"type": "object", "properties": {"a": {"type": "string", "description": s}}},
        },
    ),
}


@pytest.mark.parametrize("place", PLACES)
async def test_pitfall_17_every_place_that_a_model_would_read_is_searched(searching: Stage, place: str) -> None:
    reader, body = PLACES[place]
    for text, expected in ((SECRET, "onsite by its content (e-mail address)"), ("harmless", "nothing binds it")):
        asked, _ = reader({"model": "auto", **body(text)})
        request = make_request(
            asked, headers={}, caller=caller_of(), request_id="r", now=time.monotonic(), wall=time.time()
        )
        assert (await decided(searching, request)).route.residency_reason == expected


async def test_an_image_is_bound_because_nobody_looked_into_it(searching: Stage) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "what is it"}, part]}]}
    decision = await decided(searching, request_of("what is it", body=body))
    assert decision.route.residency_reason == "onsite by its content (not searched: an image, sound or file)"


async def test_of_many_texts_one_that_holds_personal_data_binds_all(searching: Stage) -> None:
    request = request_of("x", body={"texts": ["harmless", SECRET]})
    many = await searching.pipeline.answer_many(
        request,
        [call_of(request, body={"messages": [{"content": text}]}) for text in ("harmless", SECRET)],
        concurrency=2,
    )
    assert len(many.results) == 2
    assert searching.provider.calls == 0
    assert searching.engine.calls == 2


async def test_a_body_of_odd_shapes_is_read_all_the_same(searching: Stage) -> None:
    odd: dict[str, Any] = {"type": ["string", "null"], "a": [[], {}, None, True, 1.5, [[["x"]]]], "": {"": SECRET}}
    assert "e-mail" in (await decided(searching, request_of("x", body=odd))).route.residency_reason
    deep: dict[str, Any] = {"text": SECRET}
    for _ in range(5000):
        deep = {"a": [deep]}
    assert "e-mail" in (await decided(searching, request_of("x", body=deep))).route.residency_reason


class Hanging:
    """A detector that does not come back until it is let go."""

    def __init__(self, *, is_quick: bool = False) -> None:
        self.is_quick = is_quick
        self.go_on = threading.Event()
        self.begun = 0

    def kinds_in(self, text: str) -> tuple[PersonalKind, ...]:
        self.begun += 1
        self.go_on.wait(30)
        return ()


class Crashing:
    is_quick = True

    def kinds_in(self, text: str) -> tuple[PersonalKind, ...]:
        raise ValueError(f"cannot read {text!r}")


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    made = Hanging()
    yield made
    made.go_on.set()


async def test_pitfall_7_a_detector_that_hangs_binds_and_hanging_ones_do_not_pile_up(
    searching: Stage, hanging: Hanging
) -> None:
    searching.detector = hanging
    searching.reload(SEARCHING.replace("timeout_seconds = 5.0", "timeout_seconds = 0.2"))
    answers = await asyncio.gather(*(searching.ask("harmless") for _ in range(10)))
    assert {answer.metadata.location for answer in answers} == {"onsite"}
    assert searching.provider.calls == 0
    reason = searching.ledger.outcomes[-1].residency_reason
    assert reason == "onsite by its content (not searched: the search took longer than 0.2 s)"
    assert hanging.begun == SEARCHES_AT_ONCE
    assert "took longer than 0.2 s" in searching.alerts["content_not_searched", ""]
    hanging.go_on.set()
    assert (await searching.ask("harmless")).metadata.location == "hosted", "and when it is back, it is used again"
    assert not searching.alerts


async def test_pitfall_7_a_detector_that_crashes_binds_and_its_words_stay_with_it(searching: Stage) -> None:
    searching.detector = Crashing()
    searching.reload(SEARCHING)
    with capture_logs() as logs:
        short = await searching.ask(f"short {SECRET}")
        long = await searching.ask(f"long {SECRET} " + "word " * 20_000)
    assert {short.metadata.location, long.metadata.location} == {"onsite"}
    for outcome in searching.ledger.outcomes:
        assert outcome.residency_reason == "onsite by its content (not searched: the detector failed (ValueError))"
    assert [log["error"] for log in logs if "detector" in log["event"]] == ["ValueError"] * 2
    assert SECRET not in str(logs)


async def test_two_megabytes_are_searched_whole_while_the_loop_goes_on(searching: Stage) -> None:
    text = "The quick brown fox jumps over the lazy dog, 17 times in 1998. " * 32_000 + SECRET
    assert len(text) > 2_000_000
    request = request_of(text)
    longest = 0.0
    with_pii_scan = asyncio.ensure_future(searching.pipeline.with_pii_scan(request))
    while not with_pii_scan.done():
        started = time.perf_counter()
        await asyncio.sleep(0.001)
        longest = max(longest, time.perf_counter() - started)
    content = with_pii_scan.result().content
    assert content is not None
    assert content.kinds == ("email",)
    assert longest < 0.5, "others had to wait"
    assert not searching.alerts


async def test_pitfall_7_what_was_not_searched_in_time_is_bound(searching: Stage) -> None:
    searching.reload(SEARCHING.replace("timeout_seconds = 5.0", "timeout_seconds = 0.001"))
    decision = await decided(searching, request_of("12-34 567 harmless " * 100_000))
    assert "not searched: the search took longer than 0.001 s" in decision.route.residency_reason
    assert decision.route.residency == ONSITE


async def test_content_may_bind_to_a_region_with_providers_in_several() -> None:
    targets = (
        engine_target(),
        hosted_target("http://127.0.0.1:9/v1", "us/big", region="US"),
        hosted_target("http://127.0.0.1:10/v1", "eu/big", region="EU"),
        hosted_target("http://127.0.0.1:11/v1", "nowhere/big"),
    )
    scene = Scene(*targets, policy=SEARCHING.replace("timeout_seconds", 'bound = "region:EU"\ntimeout_seconds'))
    route = (await decided(scene, request_of(SECRET))).route
    assert [attempt.target.name for attempt in route.attempts] == ["eu/big", "onsite/tiny"]
    assert {excluded.target for excluded in route.excluded} == {"us/big", "nowhere/big"}
    route = (await decided(scene, request_of(SECRET, residency=Residency("region", "US")))).route
    assert [attempt.target.name for attempt in route.attempts] == ["onsite/tiny"], "two regions leave the site alone"
    route = (await decided(scene, request_of("x", caller=caller_of(residency=Residency("region", "US"))))).route
    assert [attempt.target.name for attempt in route.attempts] == ["us/big", "onsite/tiny"]
    await scene.aclose()


async def test_a_bound_key_is_not_told_the_names_of_hosted_models(searching: Stage) -> None:
    with pytest.raises(UnknownModel) as caught:
        await searching.ask("hello", model="gpt-99", caller=caller_of(residency=ONSITE))
    assert "onsite/tiny" in caught.value.message
    assert "big" not in caught.value.message


@pytest.mark.skipif(importlib.util.find_spec("presidio_analyzer") is not None, reason="presidio-analyzer is installed")
def test_a_detector_that_is_not_installed_is_named_with_its_extra() -> None:
    policy = policy_of(SEARCHING.replace("timeout_seconds", 'detector = "presidio"\ntimeout_seconds'))
    with pytest.raises(ConfigError, match=r"appliance\[presidio\]") as caught:
        make_detector(policy)
    assert "residency.detector" in str(caught.value)
