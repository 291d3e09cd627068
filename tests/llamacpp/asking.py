"""Asking the engine without a socket, for the tests of it."""

import asyncio
from collections.abc import Callable, Sequence

from appliance.llamacpp.engine import LlamaEngine
from appliance.llamacpp.engine_protocol import Sampling, SequenceRequest, TokenEvent
from appliance.llamacpp.engine_stream import EngineGeneration
from appliance.llamacpp.model import LlamaModel

GREEDY = Sampling(temperature=0.0)
STORY = "Once upon a time there was a small dog who lived near the sea. "


async def read(generation: EngineGeneration) -> list[TokenEvent]:
    return [event async for events in generation for event in events]


async def tokens(generation: EngineGeneration) -> list[int]:
    return [event.token for event in await read(generation)]


def story(model: LlamaModel, length: int) -> list[int]:
    return model.tokenize(STORY * 80)[:length]


def endless(prompt: Sequence[int], max_tokens: int, **more: object) -> SequenceRequest:
    return SequenceRequest(prompt, max_tokens, GREEDY, ignore_eos=True, **more)  # type: ignore[arg-type]


async def until(reached: Callable[[], object]) -> None:
    """Wait for something that the engine's thread does."""
    async with asyncio.timeout(20):
        while not reached():  # noqa: ASYNC110 - what a thread does between two steps has no event
            await asyncio.sleep(0.002)


async def until_idle(engine: LlamaEngine) -> None:
    def idle() -> bool:
        load = engine.report_load()
        return not (load.running_sequences or load.queued_requests or load.queued_prompt_tokens or load.kv_used_tokens)

    await until(idle)
