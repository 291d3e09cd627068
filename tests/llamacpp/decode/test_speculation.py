"""Drafts change nothing of what is written: the same tokens come, in fewer steps."""

import gc
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from appliance.llamacpp.context import ABORTED
from appliance.llamacpp.decode.constraints import GrammarCompiler
from appliance.llamacpp.decode.sequence import Sequence
from appliance.llamacpp.decode.speculation import SpeculationPlanner
from appliance.llamacpp.engine import LlamaEngine
from appliance.llamacpp.engine_protocol import Sampling, SequenceRequest
from appliance.llamacpp.model import LlamaModel
from appliance.llamacpp.scheduler.step import StepRunner
from appliance.llamacpp.server.generation import GenerationRequest, RunningGeneration
from tests.llamacpp.asking import until_idle

GREEDY = Sampling(temperature=0.0)
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "number": {"type": "integer", "maximum": 99_999},
        "kind": {"enum": ["letter", "parcel", "pallet"]},
    },
    "required": ["name", "number", "kind"],
    "additionalProperties": False,
}
TEXTS = (
    "The parcel AB-1234 of Mrs Smith. The parcel AB-1234 of Mrs Smith. The parcel AB-1234 of",
    "One, two, three, one, two, three, one, two,",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n",
)

Guess = Callable[[Sequence, int], list[int]]


@pytest.fixture(scope="module")
def grammars(f32_model: LlamaModel) -> GrammarCompiler:
    return GrammarCompiler(f32_model.vocab_pointer, f32_model.end_tokens, vocabulary_size=f32_model.vocabulary_size)


@contextmanager
def drafts(guess: Guess | None) -> Iterator[None]:
    """Draft what `guess` says of a sequence and the most tokens; None: nothing."""

    def planned(self: SpeculationPlanner, sequences: list[Sequence], room: int, *, has_readers: bool) -> None:
        for sequence in sequences:
            most = min(room, 6, sequence.remaining - 1)
            sequence.set_draft(guess(sequence, most)[: max(0, most)] if guess is not None else [])
            room -= len(sequence.draft)
            self.drafted_total += len(sequence.draft)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpeculationPlanner, "plan_drafts", planned)
        yield


def play(
    model: LlamaModel,
    requests: list[SequenceRequest],
    on_step: Callable[[StepRunner, list[Sequence]], None] | None = None,
) -> tuple[list[Sequence], StepRunner]:
    """All requests at once, to their end; events stay in the sequences."""
    model.reset()
    runner = StepRunner(model)
    sequences = [
        Sequence.from_request(request, number, model.sequence_context_tokens, model.end_tokens)
        for number, request in enumerate(requests)
    ]
    for sequence in sequences:
        runner.submit(sequence)
    while not runner.idle:
        runner.run_step()
        if on_step is not None:
            on_step(runner, sequences)
    assert runner.report_load().kv_used_tokens == 0
    return sequences, runner


def written(sequence: Sequence) -> list[int]:
    return [event.token for event in sequence.events]


def knowing(answers: list[list[int]], wrong_every: int) -> Guess:
    """Guess what the slow path wrote, and after its end anything, with one token in `wrong_every` wrong."""

    def guess(sequence: Sequence, most: int) -> list[int]:
        answer = answers[sequence.number]
        start = sequence.generated
        tokens = [*answer[start:], 2, 260, 261, 262, 263, 264][: max(0, most)]
        return [
            token if (start + place + 1) % wrong_every else (token + 1) % 1_000 for place, token in enumerate(tokens)
        ]

    return guess


def constrained(grammars: GrammarCompiler) -> Any:
    return grammars.compile(SCHEMA)


def nothing(_: GrammarCompiler) -> None:
    return None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("constraint", "wrong_every", "more"),
    [
        (nothing, 1, {}),
        (nothing, 10_000, {}),
        (nothing, 3, {"max_tokens": 7}),
        (nothing, 3, {"logprobs": 2}),
        (nothing, 3, {"sampling": Sampling(temperature=0.0, logit_bias={28: -100.0, 198: 2.0})}),
        (constrained, 3, {}),
        (constrained, 10_000, {"logprobs": 2}),
    ],
    ids=["wrong", "right", "cut", "logprobs", "biased", "schema", "schema-logprobs"],
)
def test_every_token_is_the_one_that_the_slow_path_writes(
    f32_model: LlamaModel,
    grammars: GrammarCompiler,
    constraint: Callable[[GrammarCompiler], Any],
    wrong_every: int,
    more: dict[str, Any],
) -> None:
    def asked() -> list[SequenceRequest]:
        fields: dict[str, Any] = {"max_tokens": 20, "sampling": GREEDY} | more
        return [SequenceRequest(f32_model.tokenize(text), constraint=constraint(grammars), **fields) for text in TEXTS]

    with drafts(None):
        slow, slowly = play(f32_model, asked())
    with drafts(knowing([written(one) for one in slow], wrong_every)):
        fast, quickly = play(f32_model, asked())
    for one, other in zip(slow, fast, strict=True):
        assert written(one) == written(other)
        assert one.finished == other.finished
        for event, same in zip(one.events, other.events, strict=True):
            assert same.logprob == pytest.approx(event.logprob, abs=2e-3)
            assert [token for token, _ in same.top] == [token for token, _ in event.top]
    load = quickly.report_load()
    if wrong_every == 1:
        assert load.accepted_tokens_total < 0.2 * load.drafted_tokens_total
    else:
        assert load.steps < slowly.report_load().steps
        assert load.accepted_tokens_total > 0


def test_its_own_guesses_change_nothing_and_save_steps(f32_model: LlamaModel, grammars: GrammarCompiler) -> None:
    def asked() -> list[SequenceRequest]:
        plain = [SequenceRequest(f32_model.tokenize(text), 40, GREEDY, ignore_eos=True) for text in TEXTS[:2]]
        return [*plain, SequenceRequest(f32_model.tokenize(TEXTS[0]), 40, GREEDY, constraint=grammars.compile(SCHEMA))]

    with drafts(None):
        slow, slowly = play(f32_model, asked())
    fast, quickly = play(f32_model, asked())
    assert [written(one) for one in slow] == [written(one) for one in fast]
    json.loads(b"".join(f32_model.piece(token) for token in written(fast[2])))
    assert quickly.report_load().steps < 0.8 * slowly.report_load().steps


@pytest.mark.slow
def test_a_sequence_that_is_put_back_writes_the_same_and_drafts_on(f32_model: LlamaModel) -> None:
    """Four that together need more than the 512 cells."""

    def asked() -> list[SequenceRequest]:
        prompts = [f32_model.tokenize(f"{n}. {TEXTS[1]}" * 8)[:60] for n in range(4)]
        return [SequenceRequest(prompt, 80, GREEDY, ignore_eos=True) for prompt in prompts]

    with drafts(None):
        slow, _ = play(f32_model, asked())
    answers = [written(one) for one in slow]
    preempted: set[int] = set()

    def watch(runner: StepRunner, sequences: list[Sequence]) -> None:
        preempted.update(one.number for one in sequences if one.generated and not one.running and not one.finished)

    with drafts(knowing(answers, 4)):
        fast, _ = play(f32_model, asked(), watch)
    assert preempted
    assert [written(one) for one in fast] == answers


@pytest.mark.slow
def test_one_that_is_cancelled_leaves_nothing_behind_and_the_others_as_they_were(f32_model: LlamaModel) -> None:
    def asked() -> list[SequenceRequest]:
        return [SequenceRequest(f32_model.tokenize(text), 40, GREEDY, ignore_eos=True) for text in TEXTS]

    with drafts(None):
        slow, _ = play(f32_model, asked())

    def cancel(runner: StepRunner, sequences: list[Sequence]) -> None:
        if sequences[1].generated > 9:
            runner.cancel(sequences[1])

    answers = [written(one) for one in slow]
    with drafts(knowing(answers, 5)):
        fast, _ = play(f32_model, asked(), cancel)
    assert fast[1].finished is not None and fast[1].finished.reason == "cancelled"
    assert [written(fast[number]) for number in (0, 2, 3)] == [answers[number] for number in (0, 2, 3)]
    assert written(fast[1]) == answers[1][: fast[1].generated]


def test_a_step_that_is_given_up_loses_only_its_drafts(f32_model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> list[SequenceRequest]:
        return [SequenceRequest(f32_model.tokenize(text), 30, GREEDY, ignore_eos=True) for text in TEXTS[:2]]

    with drafts(None):
        slow, _ = play(f32_model, asked())
    answers, decode, calls = [written(one) for one in slow], f32_model.decode, iter(range(1_000))
    monkeypatch.setattr(f32_model, "decode", lambda: ABORTED if next(calls) in (3, 4) else decode())
    with drafts(knowing(answers, 5)):
        fast, _ = play(f32_model, asked())
    assert [written(one) for one in fast] == answers


@pytest.mark.slow
def test_what_was_written_with_drafts_is_cached_without_them(f32_model: LlamaModel) -> None:
    prompt = f32_model.tokenize(TEXTS[0])
    with drafts(None):
        (slow,), _ = play(f32_model, [SequenceRequest(prompt, 20, GREEDY, ignore_eos=True)])
    with drafts(knowing([written(slow)], 4)):
        (first,), runner = play(f32_model, [SequenceRequest(prompt, 20, GREEDY, ignore_eos=True)])
    again = first.tokens[: first.length].tolist()
    second = Sequence.from_request(
        SequenceRequest([*again, 100], 4, GREEDY, ignore_eos=True), 1, 512, f32_model.end_tokens
    )
    with drafts(None):
        runner.submit(second)
        while not runner.idle:
            runner.run_step()
        (fresh,), _ = play(f32_model, [SequenceRequest([*again, 100], 4, GREEDY, ignore_eos=True)])
    assert second.finished is not None
    assert second.finished.cached_tokens == len(again) - 1
    assert written(second) == written(fresh)


def test_rows_for_drafts_are_only_those_that_nobody_else_needs(
    f32_model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f32_model.batch, "outputs_max", 5)
    most = 0
    decode = f32_model.decode

    def watched() -> int:
        nonlocal most
        most = max(most, f32_model.batch.outputs)
        return decode()

    monkeypatch.setattr(f32_model, "decode", watched)
    with drafts(lambda sequence, wanted: [260] * max(0, wanted)):
        play(f32_model, [SequenceRequest(f32_model.tokenize(text), 20, GREEDY, ignore_eos=True) for text in TEXTS])
    assert most == 5


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize("stop", ["Smith. The", "of", "never written"])
async def test_a_stop_string_inside_a_draft_ends_the_text_and_the_count_where_it_stands(
    exact: LlamaEngine, stop: str
) -> None:
    prompt = exact.model.tokenize(TEXTS[0])

    async def told() -> tuple[str, str, int]:
        ask = GenerationRequest([prompt], 1, [40], GREEDY, stops=[stop])
        async with await RunningGeneration.start(exact, exact.model, None, ask) as running:
            (whole,) = await running.collect()
            usage = running.usage
        await until_idle(exact)
        return whole.text, whole.end, usage.completion_tokens

    with drafts(None):
        slow = await told()
        every = [event async for events in exact.submit(SequenceRequest(prompt, 40, GREEDY)) for event in events]
        await until_idle(exact)
    answer = [event.token for event in every]
    with drafts(lambda sequence, most: answer[sequence.generated :][: max(0, most)]):
        assert await told() == slow


@pytest.mark.slow
def test_drafting_leaves_no_garbage_behind(f32_model: LlamaModel) -> None:
    f32_model.reset()
    runner = StepRunner(f32_model)
    request = SequenceRequest(f32_model.tokenize(TEXTS[0]), 90, GREEDY, ignore_eos=True)
    one = Sequence.from_request(request, 0, f32_model.sequence_context_tokens, f32_model.end_tokens)
    runner.submit(one)
    while one.generated < 20:
        runner.run_step()
    gc.collect()
    gc.disable()
    try:
        while one.generated < 70:
            runner.run_step()
        assert gc.collect() == 0, "a step leaves cycles behind"
    finally:
        gc.enable()
    assert runner.report_load().accepted_tokens_total > 0
    runner.cancel(one)
    runner.run_step()
