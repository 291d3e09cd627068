"""Slots: sequences move in, out and together, and nobody can tell from what they write."""

import gc
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from appliance.llamacpp.decode.sequence import Sequence
from appliance.llamacpp.engine_protocol import Sampling, SequenceRequest
from appliance.llamacpp.kv.per_sequence import choose_slot_tokens
from appliance.llamacpp.model import LlamaModel
from appliance.llamacpp.scheduler.step import StepRunner

SLOT = 256


@pytest.fixture(scope="module")
def slotted(smollm2_path: Path) -> Iterator[LlamaModel]:
    loaded = LlamaModel.load(smollm2_path, threads=1, context_tokens=768 + 4 * SLOT, sequences=4, slot_tokens=SLOT)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def exact(f32_path: Path) -> Iterator[LlamaModel]:
    loaded = LlamaModel.load(
        f32_path,
        threads=1,
        context_tokens=768 + 4 * SLOT,
        sequences=4,
        slot_tokens=SLOT,
        attention="exact",
        batch_tokens=256,
    )
    yield loaded
    loaded.close()


def sequence(
    model: LlamaModel, number: int, prompt: list[int], max_tokens: int, *, priority: int = 0, streamed: bool = True
) -> Sequence:
    greedy = Sampling(temperature=0.0)
    request = SequenceRequest(prompt, max_tokens, greedy, ignore_eos=True, priority=priority, streamed=streamed)
    return Sequence.from_request(request, number, model.sequence_context_tokens, model.end_tokens)


def prompt(model: LlamaModel, number: int, length: int) -> list[int]:
    text = f"Letter {number} from the lighthouse keeper to his sister in the town, about storms and ships. "
    return model.tokenize(text * 20)[number : number + length]


def run(runner: StepRunner) -> int:
    """Until nothing is left to do; the most sequences that lay in slots at once."""
    most = 0
    while not runner.idle:
        runner.run_step()
        most = max(most, runner.report_load().lane_sequences)
    return most


def written(sequence: Sequence) -> list[int]:
    assert sequence.finished is not None
    assert sequence.finished.reason == "length"
    return [int(token) for token in sequence.tokens[sequence.prompt_length : sequence.length]]


def in_shared_memory(
    model: LlamaModel, wanted: list[tuple[list[int], int]], monkeypatch: pytest.MonkeyPatch
) -> list[list[int]]:
    """What each writes alone and without slots."""
    found: list[list[int]] = []
    with monkeypatch.context() as patch:
        patch.setattr(model, "slots", None)
        for tokens, length in wanted:
            model.reset()
            runner, one = StepRunner(model), sequence(model, 0, tokens, length)
            runner.submit(one)
            run(runner)
            found.append(written(one))
    model.reset()
    return found


@pytest.mark.parametrize(
    ("cells", "trained", "sequences", "each"),
    [
        (8_192, 8_192, 8, 0),
        (8_192 + 15 * 1_024, 8_192, 16, 512),
        (8_192 + 16 * 1_024, 8_192, 16, 768),
        (65_536, 8_192, 16, 2_048),
        (65_536, 8_192, 4, 2_048),
        (65_536, 131_072, 16, 0),
        (16_384, 2_048, 16, 512),
        (65_536, 8_192, 1, 0),
    ],
)
def test_slots_get_what_the_longest_sequence_leaves(cells: int, trained: int, sequences: int, each: int) -> None:
    assert choose_slot_tokens(cells, trained, sequences) == each


def test_a_sequence_in_a_slot_and_back_has_the_same_logits(slotted: LlamaModel) -> None:
    slotted.reset()
    slots, batch = slotted.slots, slotted.batch
    assert slots is not None
    text = slotted.tokenize("The capital of France is")
    batch.clear()
    batch.add(text, 0, 5, last_output=True)
    assert slotted.decode() == 0
    assert slots.copy_in(5, 2)
    slots.batch.clear()
    slots.batch.add_each([260], [len(text)], [2])
    assert slots.decode() == 0
    there = slots.rows[0].copy()
    assert slots.move_slot(2, 0)
    assert (slots.memory_length(0), slots.memory_length(2)) == (len(text) + 1, 0)
    assert slots.move_out(0, 7, start=2)
    slotted.memory_copy(5, 7, 0, 2)
    batch.clear()
    batch.add([260], len(text), 5, last_output=True)
    batch.add([300], len(text) + 1, 7, last_output=True)
    assert slotted.decode() == 0
    np.testing.assert_allclose(there, slotted.rows[0], atol=0.1)
    assert slotted.memory_length(7) == len(text) + 2
    assert slots.memory_length(0) == 0
    slotted.reset()


def test_those_that_generate_together_lie_in_slots_and_one_alone_does_not(slotted: LlamaModel) -> None:
    slotted.reset()
    runner = StepRunner(slotted)
    runner.submit(sequence(slotted, 0, prompt(slotted, 0, 30), 12))
    assert run(runner) == 0
    for number in (1, 2, 3):
        runner.submit(sequence(slotted, number, prompt(slotted, number, 30), 12))
    assert run(runner) == 3
    load = runner.report_load()
    assert (load.kv_used_tokens, load.lane_sequences) == (0, 0)
    assert load.kv_capacity_tokens == 768 + 4 * SLOT


def test_what_was_written_in_a_slot_is_cached_like_any_other(slotted: LlamaModel) -> None:
    slotted.reset()
    runner = StepRunner(slotted)
    pair = [sequence(slotted, number, prompt(slotted, number, 30), 20) for number in (1, 2)]
    for one in pair:
        runner.submit(one)
    run(runner)
    followed = sequence(slotted, 3, [*pair[0].tokens[: pair[0].length].tolist(), 100], 2)
    runner.submit(followed)
    run(runner)
    assert followed.finished is not None
    assert followed.finished.cached_tokens == 30 + 20 - 1


@pytest.mark.slow
def test_a_cancelled_sequence_leaves_its_slot_to_the_next(slotted: LlamaModel) -> None:
    slotted.reset()
    runner = StepRunner(slotted)
    crowd = [sequence(slotted, number, prompt(slotted, number, 20), 40) for number in range(6)]
    for one in crowd:
        runner.submit(one)
    while not crowd[1].generated > 3:
        runner.run_step()
    for gone in (crowd[0], crowd[2]):
        runner.cancel(gone)
    run(runner)
    assert [one.generated for one in crowd if one.finished and one.finished.reason == "length"] == [40] * 4
    assert runner.report_load().kv_used_tokens == 0


@pytest.mark.slow
def test_an_urgent_sequence_takes_the_place_of_one_that_is_not_and_that_loses_nothing(slotted: LlamaModel) -> None:
    slotted.reset()
    runner = StepRunner(slotted)
    slow = [sequence(slotted, number, prompt(slotted, number, 30), 60, priority=5) for number in range(4)]
    for one in slow:
        runner.submit(one)
    while not slow[3].generated:
        runner.run_step()
    computed = runner.report_load().prefill_tokens_total
    urgent = sequence(slotted, 9, prompt(slotted, 9, 30), 10)
    runner.submit(urgent)
    while urgent.finished is None:
        runner.run_step()
    assert all(one.finished is None for one in slow)
    run(runner)
    assert [len(written(one)) for one in slow] == [60] * 4
    # The one that gave way found its own tokens cached when it came back.
    assert runner.report_load().prefill_tokens_total - computed < 30 + 20


@pytest.mark.slow
def test_generating_makes_no_garbage(slotted: LlamaModel) -> None:
    slotted.reset()
    runner = StepRunner(slotted)
    crowd = [sequence(slotted, number, prompt(slotted, number, 20), 180) for number in range(4)]
    for one in crowd:
        runner.submit(one)
    for _ in range(30):
        runner.run_step()

    def steps(count: int) -> None:
        for _ in range(count):
            for one in runner.run_step().sequences:
                one.events.clear()

    steps(20)
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        steps(10)
        before, _ = tracemalloc.get_traced_memory()
        steps(60)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert gc.collect() == 0, "a step leaves cycles behind"
    assert after - before < 4_000, "a step keeps what it allocated"
    assert peak - before < 200_000, "a step allocates more than a few rows' bookkeeping"
    assert all(one.finished is None for one in crowd)


@pytest.mark.slow
def test_slots_change_no_text(exact: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of different lengths, so that slots close up, and one of them outgrows its slot."""
    wanted = [
        (prompt(exact, number, 30 + 9 * number), length) for number, length in enumerate((40, 15, 60, 30, 20, 25))
    ]
    wanted.append((prompt(exact, 7, 200), 80))
    alone = in_shared_memory(exact, wanted, monkeypatch)
    runner = StepRunner(exact)
    together = [sequence(exact, number, tokens, length) for number, (tokens, length) in enumerate(wanted)]
    for one in together:
        runner.submit(one)
    assert run(runner) == 4
    assert [written(one) for one in together] == alone


@pytest.mark.slow
def test_one_that_outgrows_its_slot_goes_on_in_the_shared_memory(slotted: LlamaModel) -> None:
    slotted.reset()
    runner = StepRunner(slotted)
    pair = [sequence(slotted, number, prompt(slotted, number, 150), 160) for number in range(2)]
    for one in pair:
        runner.submit(one)
    left: set[int] = set()
    while not runner.idle:
        runner.run_step()
        left.update(one.number for one in pair if one.id >= 0 and one.length > SLOT)
    assert left == {0, 1}
    assert [len(written(one)) for one in pair] == [160, 160]


@pytest.mark.slow
@pytest.mark.parametrize(("streamed", "steps"), [(True, 5), (False, 1)])
def test_a_prompt_comes_in_one_piece_where_nobody_reads_a_stream(
    slotted: LlamaModel, streamed: bool, steps: int
) -> None:
    slotted.reset()
    runner = StepRunner(slotted, step_seconds=0.001)
    writing = [sequence(slotted, n, prompt(slotted, n, 20), 100, streamed=streamed) for n in range(2)]
    for one in writing:
        runner.submit(one)
    while any(one.slot < 0 for one in writing):
        runner.run_step()
    late = sequence(slotted, 5, prompt(slotted, 7, 300), 4)
    runner.submit(late)
    taken = 0
    while late.pending > 1:
        runner.run_step()
        taken += 1
    assert taken == steps
    for one in (*writing, late):
        runner.cancel(one)
    runner.run_step()
