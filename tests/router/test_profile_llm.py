"""A model of this node asked what a request is: briefly, only here, and never in the way of the request itself."""

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from appliance.core import ONSITE, Request
from appliance.router.profile import LlmProfile, llm_profiler, profile_request
from appliance.router.profile.llm_profiler import LlmProfiler
from appliance.router.profile.llm_prompt import HEAD_CHARACTERS, TAIL_CHARACTERS, make_question, take_excerpt
from tests.router.scene import Scene, call_of, caller_of, engine_target, hosted_target, request_of
from tests.router.stage import Stage, settled
from tests.standin import StandIn

pytestmark = pytest.mark.anyio

POLICY = """
[defaults]
profiler = "llm"

[[routes]]
name = "code"
match = { task = ["code"] }
targets = ["hosted", "onsite"]

[[routes]]
name = "general"
targets = ["onsite"]
"""

LEVELS = ("trivial", "easy", "moderate", "hard", "expert")


def says(task: str, level: str, confidence: float = 0.9) -> Any:
    """What an engine replies that finds `task` and `level` likely; to other calls, a short answer."""

    def reply(path: str, body: Mapping[str, Any]) -> Any:
        if path != "/labels":
            choice = {"index": 0, "message": {"role": "assistant", "content": "fine"}, "finish_reason": "stop"}
            return {"id": "1", "object": path, "model": body["model"], "choices": [choice]}
        results = []
        for item, wanted in zip(body["items"], (task, level), strict=True):
            labels = body["label_sets"][item["labels"]]
            rest = (1 - confidence) / (len(labels) - 1)
            rows = [{"label": one, "logprob": _log(confidence if one == wanted else rest)} for one in labels]
            results.append({"labels": rows, "label_mass": 0.9})
        return {"results": results}

    return reply


def _log(share: float) -> float:
    return math.log(share)


@pytest.fixture
async def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    # on a busy machine a stand-in may take longer than a profile may; tests that are about time set it themselves
    monkeypatch.setattr(llm_profiler, "SECONDS", 20.0)
    async with StandIn(uds=str(tmp_path / "e.sock"), reply=says("code", "hard")) as engine, StandIn() as provider:
        stage = Stage(engine, provider, POLICY)
        yield stage
        await stage.aclose()
        stage.check_nothing_is_held()


def asking_of(stage: Scene) -> LlmProfiler:
    return stage.pipeline._profiler


async def test_the_models_opinion_decides_the_route(stage: Stage) -> None:
    answer = await stage.ask("Make it go faster, please")
    assert answer.metadata.target == "cloud/big"
    outcome = stage.ledger.outcomes[-1]
    assert outcome.route == "code"
    assert outcome.profile.task == "code"
    assert outcome.profile.complexity > 0.7
    assert outcome.profile.reasons[0].startswith("code: onsite/tiny, confidence 0.90")
    assert stage.engine.paths == {"/labels": 1}


async def test_the_same_text_of_the_same_caller_is_asked_about_once(stage: Stage) -> None:
    for _ in range(3):
        await stage.ask("Make it go faster, please")
    assert stage.engine.paths["/labels"] == 1
    await stage.ask("Make it go faster, please", caller=caller_of(key_id="key-2"))
    assert stage.engine.paths["/labels"] == 2


async def test_the_opinions_kept_are_bounded(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_profiler, "MOST_OPINIONS", 2)
    for text in ("one", "two", "one", "three", "one", "two"):
        await asking_of(stage).llm_profile(request_of(text))
    # "one" was used again before "three" came, so "two" had to go
    assert stage.engine.paths["/labels"] == 4


async def test_no_hosted_target_is_ever_asked_for_a_profile(stage: Stage) -> None:
    stage.publish(state="failed")
    llm_profile = await asking_of(stage).llm_profile(request_of("Make it go faster"))
    assert llm_profile == "no engine of this node that scores labels is ready"
    assert stage.provider.calls == 0 and stage.engine.calls == 0


async def test_a_server_of_the_site_that_is_not_ours_is_not_asked_either(tmp_path: Path) -> None:
    neighbour = engine_target("http://127.0.0.1:9/v1", name="lab/box", provider="lab")
    scene = Scene(neighbour, hosted_target(), policy=POLICY)
    assert "no engine" in str(await asking_of(scene).llm_profile(request_of("hello")))
    await scene.aclose()


async def test_a_bound_request_is_profiled_on_the_spot_and_never_leaves(stage: Stage) -> None:
    answer = await stage.ask("Make it go faster, please", residency=ONSITE)
    assert answer.metadata.location == "onsite"
    assert stage.engine.paths["/labels"] == 1
    assert stage.provider.calls == 0


async def test_a_model_that_hangs_costs_its_time_once_and_the_rules_speak(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm_profiler, "SECONDS", 0.05)
    stage.engine.mood = "hang"
    first = await asking_of(stage).llm_profile(request_of("Translate to French: good morning"))
    assert first == "onsite/tiny was not asked or did not answer: backend_timeout"
    second = await asking_of(stage).llm_profile(request_of("Write a poem"))
    assert "asked again in" in str(second)
    assert stage.engine.calls == 1
    await stage.engine.caller_left.wait()
    made = profile_request(
        request_of("Translate to French: hi"), prompt_tokens=5, output_tokens=5, profiler="llm", llm_profile=first
    )
    assert made.task == "translation"
    assert made.reasons[-1] == f"by rules: {first}"


async def test_after_its_rest_a_model_is_asked_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_profiler, "REST_SECONDS", 0.0)
    stage.engine.moods = ["garbage"]
    assert "backend_garbage" in str(await asking_of(stage).llm_profile(request_of("Make it go faster")))
    assert isinstance(await asking_of(stage).llm_profile(request_of("Make it go faster")), LlmProfile)


@pytest.mark.parametrize("mood", ["server_error", "not_an_object", "error_in_200", "half_body", "bad_request"])
async def test_whatever_goes_wrong_with_the_question_the_request_is_answered(stage: Stage, mood: Any) -> None:
    stage.engine.moods = [mood]
    answer = await stage.ask("Who painted the Mona Lisa?")
    assert answer.metadata.target == "onsite/tiny"
    assert "by rules: onsite/tiny" in stage.ledger.outcomes[-1].profile.reasons[-1]


async def test_where_the_engine_is_full_nobody_waits_to_ask_it(stage: Stage) -> None:
    slots = await stage.fill_engine()
    llm_profile = await asking_of(stage).llm_profile(request_of("Make it go faster"))
    assert "capacity_exceeded" in str(llm_profile)
    assert stage.engine.calls == 0
    for slot in slots:
        slot.release()


async def test_the_question_is_counted_while_it_runs_and_over_before_the_request_is_admitted(stage: Stage) -> None:
    stage.engine.moods = ["hang", "well"]
    task = asyncio.create_task(stage.ask("Make it go faster"))
    await stage.engine.called.wait()
    assert stage.admission.total == 2  # a sequence for each of the two questions
    stage.engine.hold.set()
    await task
    await settled()
    assert stage.admission.total == 0


async def test_a_caller_who_leaves_while_the_model_is_asked_leaves_nothing_behind(stage: Stage) -> None:
    stage.engine.mood = "hang"
    task = asyncio.create_task(stage.ask("Make it go faster"))
    await stage.engine.called.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await stage.engine.caller_left.wait()
    assert stage.admission.total == 0


@pytest.mark.parametrize("fields", [{"endpoint": "decisions"}, {"endpoint": "extract"}, {"format": "tools"}])
async def test_where_endpoint_or_format_say_the_task_nobody_is_asked(stage: Stage, fields: dict[str, Any]) -> None:
    assert "say the task" in str(await asking_of(stage).llm_profile(request_of("x", **fields)))
    assert stage.engine.calls == 0


async def test_explain_asks_nobody_but_knows_what_was_asked_before(stage: Stage) -> None:
    asked = request_of("Make it go faster")
    before = stage.pipeline.decide(asked, prompt_tokens=4, output_tokens=None)
    assert before.profile.reasons[-1] == "by rules: no model was asked about this text yet"
    assert stage.engine.calls == 0
    await stage.ask("Make it go faster")
    assert stage.pipeline.decide(asked, prompt_tokens=4, output_tokens=None).profile.task == "code"


@pytest.mark.parametrize("profiler", ["rules", "learned"])
async def test_other_profilers_ask_no_model(stage: Stage, profiler: str) -> None:
    stage.reload(POLICY.replace('"llm"', f'"{profiler}"'))
    await stage.ask("Who painted the Mona Lisa?")
    assert stage.engine.paths["/labels"] == 0
    assert not stage.ledger.outcomes[-1].profile.reasons[-1].startswith("by rules")


async def test_many_texts_in_a_call_are_asked_about_once(stage: Stage) -> None:
    asked = request_of("Make it go faster")
    many = await stage.pipeline.answer_many(asked, [call_of(asked), call_of(asked)], concurrency=2)
    assert len(many.results) == 2
    assert stage.engine.paths["/labels"] == 1


async def test_an_unsure_model_is_not_believed(stage: Stage) -> None:
    stage.engine.reply = says("code", "hard", confidence=0.3)
    await stage.ask("Who painted the Mona Lisa?")
    made = stage.ledger.outcomes[-1].profile
    assert made.task == "chat"
    assert "is too little" in made.reasons[-1]


def test_a_hard_text_is_more_complex_than_an_easy_one_and_labels_never_are() -> None:
    def complexity(task: Any, difficulty: float) -> float:
        llm_profile = LlmProfile("onsite/tiny", task, 0.9, difficulty)
        asked: Request = request_of("x")
        return profile_request(
            asked, prompt_tokens=1, output_tokens=1, profiler="llm", llm_profile=llm_profile
        ).complexity

    assert complexity("chat", 0.0) < complexity("chat", 0.5) < complexity("chat", 1.0)
    assert complexity("code", 0.0) < 0.7 <= complexity("code", 0.5)
    assert complexity("classification", 1.0) < 0.3
    assert complexity("classification", 0.0) >= 0


def test_a_model_sees_a_bounded_part_of_two_megabytes_and_both_ends_of_it() -> None:
    seen = take_excerpt("Translate this. " + "word " * 400_000 + "Into Greek, please.")
    assert len(seen) < HEAD_CHARACTERS + TAIL_CHARACTERS + 10
    assert seen.startswith("Translate this.") and seen.endswith("Into Greek, please.")
    items = make_question(seen).body["items"]
    assert len(items) == 2


async def test_the_real_question_names_every_task_that_a_text_can_be() -> None:
    body = make_question("hello").body
    sets = list(body["label_sets"].values())
    assert len(sets[0]) == 8 and "tool_use" not in sets[0]
    assert sets[1] == list(LEVELS)
