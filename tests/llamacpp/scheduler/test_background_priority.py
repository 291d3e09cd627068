"""Work that can wait: it holds still while anything urgent runs, and its steps are short."""

import asyncio

import pytest

from appliance.llamacpp.engine import LlamaEngine
from appliance.llamacpp.engine_protocol import Sampling, SequenceRequest
from appliance.llamacpp.engine_stream import EngineGeneration
from appliance.llamacpp.model import LlamaModel
from appliance.llamacpp.scheduler.scheduler import (
    BACKGROUND_STEP_SECONDS,
    IDLE_PRIORITY,
    TILE_TOKENS,
    find_urgent_priority,
    plan_step_tokens,
)


@pytest.mark.parametrize(
    ("running", "labels", "expected"),
    [([], None, IDLE_PRIORITY), ([1, 0], None, 0), ([1], 0, 0), ([], 1, 1), ([1], None, 1)],
)
def test_the_least_priority_of_what_runs_is_the_most_urgent(
    running: list[int], labels: int | None, expected: int
) -> None:
    assert find_urgent_priority(running, labels) == expected


def test_a_step_without_anything_urgent_is_short() -> None:
    rate = 2000.0
    alone = plan_step_tokens(512, 0, 0, rate, 0.1)
    patient = plan_step_tokens(512, 0, 0, rate, 0.1, can_wait=True)
    assert alone == 512
    assert TILE_TOKENS <= patient <= max(TILE_TOKENS, rate * BACKGROUND_STEP_SECONDS)
    assert plan_step_tokens(512, 80, 0, rate, 0.1, can_wait=True) > 80  # those that generate are in it all the same


def test_an_unmeasured_engine_still_computes_something() -> None:
    assert plan_step_tokens(512, 0, 0, 0.0, 0.1, can_wait=True) > 0


@pytest.mark.anyio
async def test_work_that_can_wait_says_nothing_while_something_urgent_runs(model: LlamaModel) -> None:
    """Each token is put down when the engine's thread hands it over."""
    engine = LlamaEngine(model, calibrate=False)
    engine.start()
    order: list[str] = []
    begun = asyncio.Event()

    async def read(name: str, generation: EngineGeneration) -> None:
        async for events in generation:
            order.extend(name for _ in events)
            if name == "patient" and len(order) >= 3:
                begun.set()

    prompt = model.tokenize("Once upon a time there was a small dog who lived near the sea. " * 2)
    ask = SequenceRequest(prompt, 120, Sampling(temperature=0.0), ignore_eos=True, priority=1)
    patient = asyncio.create_task(read("patient", engine.submit(ask)))
    await asyncio.wait_for(begun.wait(), 30)
    urgent_ask = SequenceRequest(prompt[:20], 40, Sampling(temperature=0.0), ignore_eos=True)
    await asyncio.wait_for(read("urgent", engine.submit(urgent_ask)), 60)
    await asyncio.wait_for(patient, 60)
    await engine.close(0)
    first, last = order.index("urgent"), len(order) - order[::-1].index("urgent") - 1
    assert order[first : last + 1] == ["urgent"] * 40
    assert order.count("patient") == 120
    assert order[-1] == "patient", "it went on afterwards"
