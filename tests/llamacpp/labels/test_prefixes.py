"""What the items of label calls share: computed once, kept as long as items wait, and never mixed up."""

import numpy as np
import pytest

from appliance.llamacpp.engine_protocol import LabelItem
from appliance.llamacpp.labels.jobs import LabelJob
from appliance.llamacpp.model import LlamaModel
from appliance.llamacpp.scheduler.step import StepRunner
from tests.llamacpp.asking import story
from tests.llamacpp.label_calls import asked, score


@pytest.mark.slow
def test_a_prefix_longer_than_the_cache_may_be_is_computed_once_for_all_items_of_a_call(model: LlamaModel) -> None:
    prefix, labels = story(model, 300), [[5], [6]]
    found = score(model, [LabelItem([*prefix, *model.tokenize(f" {number} apples")], labels) for number in range(24)])
    assert len(prefix) > model.context_tokens // 2
    assert sorted(scores.cached_tokens >= len(prefix) for scores in found) == [False] + [True] * 23


def test_calls_that_take_turns_keep_each_a_prefix_of_its_own(model: LlamaModel) -> None:
    model.reset()
    runner = StepRunner(model)
    ends = [model.tokenize(f" {number} apples") for number in range(40)]
    calls = [
        LabelJob([LabelItem([*story(model, 150)[first:], *end], [[5], [6]], salt) for end in ends])
        for first, salt in ((0, "one"), (1, "other"))
    ]
    for call in calls:
        runner.submit_labels(call)
    while not runner.idle:
        runner.run_step()
    for call in calls:
        cached = [scores.cached_tokens for scores in call.results if scores is not None]
        assert sorted(tokens >= 149 for tokens in cached) == [False] + [True] * 39


def test_what_waiting_items_need_of_the_cache_gives_way_to_what_runs(model: LlamaModel) -> None:
    model.reset()
    runner = StepRunner(model)
    prefix = story(model, 300)
    asked(runner, [LabelItem([*prefix, token], [[5], [6]]) for token in (7, 8)])
    assert runner.report_load().kv_cached_tokens <= model.context_tokens // 2
    assert runner.report_load().kv_used_tokens == 0


@pytest.mark.slow
def test_one_text_behind_two_cached_instructions_of_equal_length_is_read_behind_each(f32_model: LlamaModel) -> None:
    one, other = f32_model.tokenize("The sea is blue. " * 8), f32_model.tokenize("The dog was old. " * 8)
    assert len(one) == len(other)
    text, labels = (
        f32_model.tokenize("What is it? It is the"),
        [[token] for token in f32_model.tokenize(" sea dog old")],
    )
    wanted = [LabelItem([*instructions, *text], labels) for instructions in (one, other)]
    f32_model.reset()
    runner = StepRunner(f32_model)
    for instructions in (one, other):  # a prefix is cached when a second prompt begins with it
        asked(runner, [LabelItem([*instructions, token], labels) for token in (7, 8)])
    together = asked(runner, wanted)
    assert [scores.cached_tokens for scores in together] == [len(one), len(other)]
    for found, fresh in zip(together, score(f32_model, wanted, together=False), strict=True):
        np.testing.assert_allclose(found.logprobs, fresh.logprobs, atol=1e-3)
