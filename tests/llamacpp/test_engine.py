"""The engine on the real model: what comes back, what is shared, what is freed, and who is harmed by whom (nobody)."""

import asyncio
import gc
import threading

import llama_cpp
import pytest

from appliance.errors import ContextTooLong, EngineBusy, RequestError
from appliance.llamacpp.context import ABORTED
from appliance.llamacpp.engine import LlamaEngine
from appliance.llamacpp.engine_protocol import LabelItem, Logits, Sampling, SequenceRequest
from appliance.llamacpp.model import LlamaModel
from tests.llamacpp.asking import GREEDY, endless, read, story, tokens, until, until_idle

pytestmark = pytest.mark.anyio


async def test_an_answer_ends_at_the_end_token_which_is_not_delivered(engine: LlamaEngine) -> None:
    model = engine.model
    prompt = model.tokenize("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    generation = engine.submit(SequenceRequest(prompt, 50, GREEDY))
    found = await tokens(generation)
    assert b"".join(model.piece(token) for token in found) == b"The capital of France is Paris."
    finished = generation.finished
    assert finished is not None
    assert (finished.reason, finished.completion_tokens, finished.prompt_tokens) == ("stop", len(found), len(prompt))


@pytest.mark.slow
async def test_max_tokens_and_the_context_end_an_answer_with_length(engine: LlamaEngine) -> None:
    short = engine.submit(endless(story(engine.model, 20), 7))
    assert len(await tokens(short)) == 7
    clamped = engine.submit(endless(story(engine.model, 508), 500))
    assert len(await tokens(clamped)) == 4
    assert short.finished is not None and clamped.finished is not None
    assert (short.finished.reason, clamped.finished.reason) == ("length", "length")


async def test_a_prompt_as_long_as_the_context_is_refused_with_both_numbers_and_harms_nobody(
    engine: LlamaEngine,
) -> None:
    running = engine.submit(endless(story(engine.model, 20), 20))
    with pytest.raises(ContextTooLong, match=r"512 tokens and the context holds 512"):
        engine.submit(endless(story(engine.model, 512), 5))
    assert len(await tokens(running)) == 20


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (SequenceRequest([], 5), "no tokens"),
        (SequenceRequest([1], 0), "max_tokens is 0"),
        (SequenceRequest([49152], 5), "outside of the vocabulary"),
        (SequenceRequest([-1], 5), "outside of the vocabulary"),
    ],
)
async def test_an_impossible_request_is_refused(engine: LlamaEngine, request_: SequenceRequest, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        engine.submit(request_)


async def test_more_streams_than_sequences_are_all_answered(engine: LlamaEngine) -> None:
    prompt = story(engine.model, 30)
    found = await asyncio.gather(*(tokens(engine.submit(endless(prompt, 5 + n))) for n in range(10)))
    assert [len(one) for one in found] == [5 + n for n in range(10)]


async def test_choices_of_one_prompt_compute_it_once(engine: LlamaEngine) -> None:
    prompt = story(engine.model, 60)
    together = [engine.submit(endless(prompt, 3)) for _ in range(4)]
    for generation in together:
        await tokens(generation)
    cached = [generation.finished.cached_tokens for generation in together if generation.finished]
    assert cached == [0, 59, 59, 59]
    assert engine.report_load().prefill_tokens_total + engine.report_load().decode_tokens_total < 60 + 4 * 3 + 4


async def test_a_conversation_goes_on_from_what_was_generated(engine: LlamaEngine) -> None:
    prompt = story(engine.model, 40)
    answer = await tokens(engine.submit(endless(prompt, 10)))
    followed = engine.submit(endless([*prompt, *answer, 100, 101], 2))
    await tokens(followed)
    assert followed.finished is not None
    assert followed.finished.cached_tokens == 49


async def test_tenants_share_no_prefix(engine: LlamaEngine) -> None:
    prompt = story(engine.model, 40)
    await tokens(engine.submit(endless(prompt, 2, cache_salt="a")))
    other = engine.submit(endless(prompt, 2, cache_salt="b"))
    await tokens(other)
    assert other.finished is not None
    assert other.finished.cached_tokens == 0


async def test_cancelling_frees_the_cells_and_is_told_once(engine: LlamaEngine) -> None:
    generation = engine.submit(endless(story(engine.model, 50), 900))
    await anext(generation)
    assert engine.report_load().kv_used_tokens >= 50
    generation.cancel()
    generation.cancel()
    await read(generation)
    assert generation.finished is not None
    assert generation.finished.reason == "cancelled"
    await until_idle(engine)
    assert engine.report_load().kv_used_tokens == 0


async def test_one_still_waiting_can_be_cancelled(engine: LlamaEngine) -> None:
    running = [engine.submit(endless([5 + n], 300)) for n in range(4)]
    waiting = engine.submit(endless([50], 300))
    waiting.cancel()
    assert await read(waiting) == []
    assert waiting.finished is not None
    assert (waiting.finished.reason, waiting.finished.completion_tokens) == ("cancelled", 0)
    for generation in running:
        generation.cancel()
    await until_idle(engine)


async def test_leaving_or_forgetting_a_generation_cancels_it(engine: LlamaEngine) -> None:
    async with engine.submit(endless(story(engine.model, 20), 900)) as left:
        await anext(left)
    forgotten = engine.submit(endless(story(engine.model, 30), 900))
    await anext(forgotten)
    del forgotten
    gc.collect()
    await until_idle(engine)


async def test_the_same_seed_gives_the_same_text(engine: LlamaEngine) -> None:
    request = SequenceRequest(story(engine.model, 20), 12, Sampling(temperature=1.0, seed=3), ignore_eos=True)
    first = await tokens(engine.submit(request))
    again = await tokens(engine.submit(request))
    other = SequenceRequest(story(engine.model, 20), 12, Sampling(temperature=1.0, seed=4), ignore_eos=True)
    assert first == again != await tokens(engine.submit(other))


async def test_logprobs_come_with_every_token(engine: LlamaEngine) -> None:
    request = SequenceRequest(story(engine.model, 20), 4, GREEDY, logprobs=3, ignore_eos=True)
    for event in await read(engine.submit(request)):
        assert event.logprob is not None
        assert len(event.top) == 3
        assert event.top[0][0] == event.token
        assert event.top[0][1] == pytest.approx(event.logprob)
        assert event.top[0][1] >= event.top[1][1] >= event.top[2][1]


class Breaks:
    """A constraint that fails after some tokens."""

    def __init__(self, after: int) -> None:
        self.left = after

    def apply(self, logits: Logits) -> None:
        if not self.left:
            raise RuntimeError("the grammar broke")

    def accept(self, token: int) -> None:
        self.left -= 1

    def finished(self) -> bool:
        return False


async def test_a_constraint_that_fails_ends_its_own_sequence_only(engine: LlamaEngine) -> None:
    good = engine.submit(endless(story(engine.model, 20), 15))
    bad = engine.submit(SequenceRequest(story(engine.model, 25), 15, GREEDY, constraint=Breaks(3)))
    assert len(await tokens(bad)) == 3
    assert bad.finished is not None
    assert bad.finished.reason == "error"
    assert "the grammar broke" in (bad.finished.error or "")
    assert len(await tokens(good)) == 15


async def test_a_full_queue_refuses_with_a_hint(model: LlamaModel) -> None:
    engine = LlamaEngine(model, max_queued_requests=2, calibrate=False)
    engine.start()
    accepted = [engine.submit(endless([9 + n], 400)) for n in range(6)]
    with pytest.raises(EngineBusy, match="wait already") as refused:
        engine.submit(endless([99], 5))
    assert (refused.value.retry_after_seconds or 0) >= 1
    with pytest.raises(EngineBusy):
        await engine.score_labels([LabelItem([5], [[6]])])
    for generation in accepted:
        generation.cancel()
    await until_idle(engine)
    assert len(await tokens(engine.submit(endless([99], 5)))) == 5
    await engine.close(0)


async def test_queued_tokens_are_bounded_too(model: LlamaModel) -> None:
    engine = LlamaEngine(model, max_queued_tokens=100, calibrate=False)
    engine.start()
    alone = engine.submit(endless(story(model, 150), 2))  # nothing waits yet: one is always taken
    with pytest.raises(EngineBusy):
        engine.submit(endless(story(model, 150), 2))
    assert len(await tokens(alone)) == 2
    await engine.close(0)


async def test_load_counts_what_was_submitted_at_once(engine: LlamaEngine) -> None:
    generation = engine.submit(endless(story(engine.model, 50), 30))
    load = engine.report_load()
    assert load.queued_requests + load.running_sequences == 1
    assert load.remaining_output_tokens == 30
    assert (load.sequences_capacity, load.kv_capacity_tokens) == (4, 512)
    await tokens(generation)
    await until_idle(engine)
    load = engine.report_load()
    assert (load.queued_prompt_tokens, load.remaining_output_tokens, load.kv_used_tokens) == (0, 0, 0)
    assert load.kv_cached_tokens == 79
    assert load.decode_tokens_per_second[1] > 0


async def test_cancelling_a_score_drops_the_rest(engine: LlamaEngine) -> None:
    items = [LabelItem(story(engine.model, 100 + n % 7), [[5], [6, 7]]) for n in range(200)]
    task = asyncio.create_task(engine.score_labels(items))
    await until(lambda: engine.report_load().steps)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_idle(engine)
    assert engine.report_load().queued_prompt_tokens == 0
    assert engine.report_load().prefill_tokens_total < 100 * 200


async def test_a_prompt_that_nobody_waits_for_is_given_up_in_the_middle_of_its_step(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decode tells when it begins, and does not go on before the cancellation is in."""
    begun, cancelled, decode, codes = threading.Event(), threading.Event(), engine.model.decode, list[int]()

    def slow() -> int:
        begun.set()
        cancelled.wait(10)
        codes.append(decode())
        return codes[-1]

    monkeypatch.setattr(engine.model, "decode", slow)
    generation = engine.submit(endless(story(engine.model, 250), 5))
    await asyncio.to_thread(begun.wait, 10)
    generation.cancel()
    cancelled.set()
    await read(generation)
    assert codes == [ABORTED]
    after = engine.submit(endless(story(engine.model, 30), 5))
    assert len(await tokens(after)) == 5
    assert engine.report_load().prefill_tokens_total < 250


async def test_a_step_is_not_given_up_while_somebody_waits_for_a_part_of_it(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, cancelled, decode, codes = threading.Event(), threading.Event(), engine.model.decode, list[int]()

    def slow() -> int:
        begun.set()
        cancelled.wait(10)
        codes.append(decode())
        return codes[-1]

    kept = engine.submit(endless(story(engine.model, 20), 3))
    gone = engine.submit(endless([7, *story(engine.model, 20)], 3))
    monkeypatch.setattr(engine.model, "decode", slow)
    await asyncio.to_thread(begun.wait, 10)
    gone.cancel()
    cancelled.set()
    assert len(await tokens(kept)) == 3
    assert ABORTED not in codes[1:]


async def test_an_urgent_label_call_does_not_wait_for_a_long_one(engine: LlamaEngine) -> None:
    long = [LabelItem(story(engine.model, 100)[n % 50 :], [[5], [6, 7]], priority=5) for n in range(200)]
    bulk = asyncio.create_task(engine.score_labels(long))
    await until(lambda: engine.report_load().steps)
    assert engine.report_load().label_items > 100
    urgent = await engine.score_labels([LabelItem(story(engine.model, 40), [[5], [6]])])
    assert urgent[0].error is None
    assert engine.report_load().label_items > 100
    bulk.cancel()
    with pytest.raises(asyncio.CancelledError):
        await bulk
    await until_idle(engine)


@pytest.mark.slow
async def test_a_long_label_call_of_one_tenant_does_not_hold_up_another(engine: LlamaEngine) -> None:
    long = [LabelItem(story(engine.model, 100)[n % 50 :], [[5], [6, 7]], "bulk") for n in range(200)]
    bulk = asyncio.create_task(engine.score_labels(long))
    await until(lambda: engine.report_load().steps)
    await engine.score_labels([LabelItem(story(engine.model, 40), [[5], [6]], "other")])
    assert engine.report_load().label_items > 100
    bulk.cancel()
    with pytest.raises(asyncio.CancelledError):
        await bulk
    await until_idle(engine)


async def test_the_load_tells_how_much_of_the_time_is_the_engines_own(engine: LlamaEngine) -> None:
    await tokens(engine.submit(endless(story(engine.model, 50), 30)))
    await until_idle(engine)
    load = engine.report_load()
    assert 0 < load.host_seconds_total < 0.5 * load.compute_seconds_total


async def test_scoring_nothing_gives_nothing(engine: LlamaEngine) -> None:
    assert await engine.score_labels([]) == []


async def test_a_long_prompt_does_not_stall_a_stream(engine: LlamaEngine) -> None:
    stream = engine.submit(endless(story(engine.model, 20), 120))
    await anext(stream)
    long = engine.submit(endless(story(engine.model, 300), 1))
    during = 0
    while long.finished is None:
        during += len(await anext(stream))
    assert during >= 4
    stream.cancel()


async def test_calibration_fills_the_rates(model: LlamaModel) -> None:
    engine = LlamaEngine(model)
    engine.start()
    await engine.wait_until_ready()
    load = engine.report_load()
    assert load.prefill_tokens_per_second > 0
    assert {1} <= set(load.decode_tokens_per_second) <= {1, 4}  # what takes too long is left to the first requests
    assert load.kv_used_tokens == 0
    await engine.close(0)


@pytest.mark.slow
async def test_a_sequence_put_back_loses_nothing_and_repeats_nothing(engine: LlamaEngine) -> None:
    """Four sequences of 20 + 130 tokens do not fit into 512 cells: some must give way and come back."""
    generations = [engine.submit(endless([300 + n] * 20, 130)) for n in range(4)]
    found = await asyncio.gather(*(tokens(generation) for generation in generations))
    assert [len(one) for one in found] == [130] * 4
    assert engine.report_load().prefill_tokens_total > 4 * 20
    await until_idle(engine)


@pytest.mark.slow
async def test_a_crowded_run_writes_what_an_uncontended_one_does(exact: LlamaEngine) -> None:
    prompts = [story(exact.model, 60 + n)[7 * n :] for n in range(4)]
    alone = [await tokens(exact.submit(endless(prompt, 100))) for prompt in prompts[:2]]
    before = exact.report_load().prefill_tokens_total
    crowded = await asyncio.gather(*(tokens(exact.submit(endless(prompt, 100, cache_salt="x"))) for prompt in prompts))
    assert exact.report_load().prefill_tokens_total - before > sum(len(prompt) for prompt in prompts)
    assert crowded[:2] == alone


@pytest.mark.slow
async def test_greedy_text_is_that_of_the_high_level_class_token_by_token(exact: LlamaEngine) -> None:
    model = exact.model
    prompts = [model.tokenize(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n") for text in QUESTIONS]
    ours = await asyncio.gather(*(tokens(exact.submit(endless(prompt, 32))) for prompt in prompts))
    slow = llama_cpp.Llama(str(model.path), n_ctx=256, n_threads=1, type_k=0, type_v=0, verbose=False)
    for prompt, one in zip(prompts, ours, strict=True):
        bias = llama_cpp.LogitsProcessorList([_without(model.end_tokens)])
        theirs: list[int] = []
        for token in slow.generate(prompt, temp=0.0, repeat_penalty=1.0, logits_processor=bias):
            theirs.append(token)
            if len(theirs) == 32:
                break
        assert one == theirs
    slow.close()


QUESTIONS = ["What is the capital of France?", "Write a line about the sea.", "Why is the sky blue?", "Count to ten."]


def _without(forbidden: frozenset[int]):  # type: ignore[no-untyped-def]
    def process(_tokens: object, scores: Logits) -> Logits:
        scores[list(forbidden)] = -float("inf")
        return scores

    return process
