"""Label tries computed in waves by the real engine: the same answers, whatever comes between two waves."""

import asyncio
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from appliance.llamacpp.engine import LlamaEngine
from appliance.llamacpp.engine_protocol import LabelItem, LabelScores
from appliance.llamacpp.labels.jobs import LabelJob
from appliance.llamacpp.labels.search import SearchBudget
from appliance.llamacpp.model import LlamaModel
from appliance.llamacpp.scheduler.step import StepRunner
from appliance.llamacpp.server import labels_api
from tests.llamacpp.asking import endless, story, tokens, until, until_idle
from tests.llamacpp.label_calls import score

pytestmark = pytest.mark.anyio

TOLERANCE = 1e-3
WORDS = ["lamp", "parcel", "invoice", "password", "card", "chair"]
LABELS = [f" {does} my {what}{end}" for does in ("lost", "broke", "found") for what in WORDS for end in ("", " today")]
TEXTS = ["I cannot find my card.", "Where is my parcel?", "The lamp fell off the table.", "I lost the new invoice."]


@pytest.fixture(autouse=True)
def always_in_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SearchBudget, "is_worth_searching", lambda self, trie, items, tolerance: tolerance > 0)


def items(model: LlamaModel, tolerance: float, texts: list[str] = TEXTS) -> list[LabelItem]:
    labels = [model.tokenize(label) for label in LABELS]
    prompts = [model.tokenize(f"What happened?\nText: {text}\nAnswer: I") for text in texts]
    return [LabelItem(prompt, labels, tolerance=tolerance) for prompt in prompts]


def shares(scores: LabelScores) -> npt.NDArray[np.float64]:
    return np.array(labels_api.compute_shares(scores.logprobs))


@pytest.mark.slow
def test_waves_give_the_shares_of_the_whole_trie_and_compute_less(f32_model: LlamaModel) -> None:
    counted = []
    found = []
    for tolerance in (0.0, TOLERANCE, 0.1):
        f32_model.reset()
        runner, job = StepRunner(f32_model), LabelJob(items(f32_model, tolerance))
        runner.submit_labels(job)
        while not runner.idle:
            runner.run_step()
        assert runner.report_load().kv_used_tokens == 0
        counted.append(runner.report_load().prefill_tokens_total)
        found.append([scores for scores in job.results if scores is not None])
    for whole, walked, roughly in zip(*found, strict=True):
        assert np.abs(shares(walked) - shares(whole)).sum() / 2 <= TOLERANCE + 1e-4
        assert np.abs(shares(roughly) - shares(whole)).sum() / 2 <= 0.1 + 1e-4
        assert walked.label_mass == pytest.approx(whole.label_mass, rel=2 * TOLERANCE)
        assert np.argmax(walked.logprobs) == np.argmax(whole.logprobs)
        assert (walked.prompt_tokens, walked.error) == (whole.prompt_tokens, None)
    assert counted[2] < counted[0]


@pytest.mark.slow
def test_alone_in_one_call_or_in_pieces_waves_give_the_same(
    f32_model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = items(f32_model, TOLERANCE, TEXTS[:2])
    together = score(f32_model, wanted)
    for one, alone in zip(together, score(f32_model, wanted, together=False), strict=True):
        np.testing.assert_allclose(shares(one), shares(alone), atol=1e-4)
    monkeypatch.setattr("appliance.llamacpp.labels.scorer._CHAINS_AT_ONCE", 2)
    for one, pieces in zip(together, score(f32_model, wanted), strict=True):
        np.testing.assert_allclose(shares(one), shares(pieces), atol=1e-4)


@pytest.mark.slow
def test_a_step_that_fails_between_two_waves_costs_nothing_but_time(
    f32_model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = items(f32_model, TOLERANCE, TEXTS[:2])
    expected = score(f32_model, wanted)
    for failing in (1, 2):
        decode, codes = f32_model.decode, iter([0] * failing + [-3])
        with monkeypatch.context() as patched:
            patched.setattr(f32_model, "decode", lambda decode=decode, codes=codes: next(codes, 0) or decode())
            for one, other in zip(expected, score(f32_model, wanted), strict=True):
                assert other.error is None
                np.testing.assert_allclose(shares(one), shares(other), atol=1e-4)


@pytest.mark.slow
def test_what_takes_the_cells_between_two_waves_costs_nothing_but_time(f32_model: LlamaModel) -> None:
    wanted = items(f32_model, TOLERANCE, TEXTS[:2])
    expected = score(f32_model, wanted)
    f32_model.reset()
    runner, job = StepRunner(f32_model), LabelJob(wanted)
    runner.submit_labels(job)
    while not runner.idle:
        runner.run_step()
        runner._manager.prefix_cache.evict(f32_model.context_tokens)
    for one, other in zip(expected, job.results, strict=True):
        assert other is not None
        np.testing.assert_allclose(shares(one), shares(other), atol=1e-4)


async def test_of_waves_that_fail_only_the_item_gets_an_error_that_made_them_fail(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = items(engine.model, TOLERANCE)
    odd = replace(wanted[0], labels=[[4321, 5, 6], [4321, 7, 8], [9]], tolerance=1e-9)
    decode = engine.model.decode
    monkeypatch.setattr(engine.model, "decode", lambda: -3 if 4321 in engine.model.batch.tokens else decode())
    found = await engine.score_labels([*wanted[:2], odd, *wanted[2:]])
    assert [scores.error is None for scores in found] == [True, True, False, True, True]
    await until_idle(engine)


async def test_a_cancelled_search_holds_nothing(engine: LlamaEngine) -> None:
    task = asyncio.create_task(engine.score_labels(items(engine.model, TOLERANCE, [f"Text {n}." for n in range(200)])))
    await until(lambda: engine.report_load().steps > 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_idle(engine)


@pytest.mark.slow
async def test_searches_and_urgent_streams_that_need_all_cells_both_come_to_an_end(engine: LlamaEngine) -> None:
    texts = [f"Text {n}." for n in range(16)]
    bulk = [replace(item, priority=5) for item in items(engine.model, TOLERANCE, texts)]
    task = asyncio.create_task(engine.score_labels(bulk))
    await until(lambda: engine.report_load().steps > 1)
    streams = [engine.submit(endless(story(engine.model, 200 + n), 50)) for n in range(3)]
    assert [len(one) for one in await asyncio.gather(*map(tokens, streams))] == [50] * 3
    assert [scores.error for scores in await task] == [None] * 16
    await until_idle(engine)
