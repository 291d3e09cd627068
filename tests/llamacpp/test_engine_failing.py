"""Steps that fail, an engine that fails, and its end: who is harmed, and what is told."""

import asyncio

import pytest

from appliance.errors import EngineBusy, EngineFailed
from appliance.llamacpp.context import NO_KV_ROOM
from appliance.llamacpp.engine import LlamaEngine
from appliance.llamacpp.engine_protocol import LabelItem
from appliance.llamacpp.model import LlamaModel
from tests.llamacpp.asking import endless, read, story, tokens, until_idle

pytestmark = pytest.mark.anyio


async def test_a_step_without_kv_room_is_repaired(engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = await tokens(engine.submit(endless(story(engine.model, 30), 8)))
    decode, codes = engine.model.decode, iter([NO_KV_ROOM])
    monkeypatch.setattr(engine.model, "decode", lambda: next(codes, None) or decode())
    assert await tokens(engine.submit(endless(story(engine.model, 30), 8))) == expected


async def test_a_failed_step_ends_what_was_in_it_and_the_engine_goes_on(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, codes = engine.model.decode, iter([0, 0, -3])
    monkeypatch.setattr(engine.model, "decode", lambda: next(codes, 0) or decode())
    hit = engine.submit(endless(story(engine.model, 30), 50))
    await read(hit)
    assert hit.finished is not None
    assert hit.finished.reason == "error"
    assert "llama_decode failed with -3" in (hit.finished.error or "")
    await until_idle(engine)
    assert engine.report_load().kv_cached_tokens == 0
    after = engine.submit(endless(story(engine.model, 30), 5))
    assert len(await tokens(after)) == 5
    assert engine.failed is None


def fails_on(model: LlamaModel, token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every decode fail whose batch holds `token`."""
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda: -3 if token in model.batch.tokens else decode())


async def test_of_a_failed_step_only_the_sequence_ends_that_made_it_fail(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_on(engine.model, 4321, monkeypatch)
    good = [engine.submit(endless(story(engine.model, 30 + n)[n:], 20)) for n in range(2)]
    await anext(good[0])
    bad = engine.submit(endless([*story(engine.model, 20), 4321], 5))
    assert await tokens(bad) == []
    assert bad.finished is not None
    assert (bad.finished.reason, "failed with -3" in (bad.finished.error or "")) == ("error", True)
    assert len(await tokens(good[0])) + len(await tokens(good[1])) in (38, 39)
    assert engine.failed is None


async def test_of_a_failed_step_only_the_label_item_gets_an_error_that_made_it_fail(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_on(engine.model, 4321, monkeypatch)
    items = [LabelItem([*story(engine.model, 30 + n), *more], [[5], [6]]) for n, more in enumerate([[], [4321], []])]
    stream = engine.submit(endless(story(engine.model, 20), 40))
    found = await engine.score_labels(items)
    assert [scores.error is None for scores in found] == [True, False, True]
    assert "failed with -3" in (found[1].error or "")
    assert len(await tokens(stream)) == 40
    monkeypatch.undo()
    assert [scores.error is None for scores in await engine.score_labels(items)] == [True, True, True]


async def test_a_step_that_fails_once_costs_nobody_anything(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, codes = engine.model.decode, iter([-3])
    monkeypatch.setattr(engine.model, "decode", lambda: next(codes, 0) or decode())
    items = [LabelItem(story(engine.model, 40 + n), [[5], [6]]) for n in range(3)]
    assert [scores.error for scores in await engine.score_labels(items)] == [None] * 3


async def test_an_engine_that_always_fails_says_so_and_ends_everything(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LlamaEngine(model, calibrate=False)
    monkeypatch.setattr(model, "decode", lambda: -3)
    engine.start()
    await engine.wait_until_ready()
    generations = [engine.submit(endless([5 + n], 10)) for n in range(9)]
    for generation in generations:
        assert await read(generation) == []
        assert generation.finished is not None
        assert generation.finished.reason == "error"
    async with asyncio.timeout(20):
        assert await engine.wait_until_failed() is engine.failed
    assert isinstance(engine.failed, EngineFailed)
    with pytest.raises(EngineBusy):
        engine.submit(endless([5], 1))
    await engine.close(0)


async def test_closing_lets_the_running_finish_and_refuses_new_ones(model: LlamaModel) -> None:
    engine = LlamaEngine(model, calibrate=False)
    engine.start()
    generation = engine.submit(endless(story(model, 20), 10))
    closing = asyncio.create_task(engine.close(20))
    await asyncio.sleep(0)
    with pytest.raises(EngineBusy, match="shutting down"):
        engine.submit(endless([5], 1))
    assert len(await tokens(generation)) == 10
    await closing


async def test_closing_at_once_cancels_what_runs(model: LlamaModel) -> None:
    engine = LlamaEngine(model, calibrate=False)
    engine.start()
    generation = engine.submit(endless(story(model, 450), 50))
    scoring = asyncio.create_task(engine.score_labels([LabelItem(story(model, 450), [[5]])]))
    await asyncio.sleep(0.05)
    await engine.close(0)
    await read(generation)
    assert generation.finished is not None
    assert generation.finished.reason == "cancelled"
    with pytest.raises(EngineBusy):
        await scoring
