"""Label tries and forests as tables; whole-label likelihoods on the real model against slower ways to get them."""

import math
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from appliance.llamacpp.decode.sequence import Sequence
from appliance.llamacpp.engine_protocol import LabelItem, Sampling, SequenceRequest
from appliance.llamacpp.kv.prefix_cache import to_token_array
from appliance.llamacpp.labels.jobs import LabelJob, build_forest, prepare_item, split_into_pieces
from appliance.llamacpp.labels.trie import LabelTrie
from appliance.llamacpp.model import LlamaModel
from appliance.llamacpp.scheduler.step import StepRunner
from tests.llamacpp.label_calls import score

INSTRUCTIONS = (
    "Decide what the customer wants. Possible answers are: refund, refund status, delivery, card lost, "
    "card stolen, other.\n"
)
TEXTS = ["My card was taken in the bus.", "When will I get my money back?", "Where is my parcel?", "My card is gone."]
LABELS = [" refund", " refund status", " delivery", " card lost", " card stolen", " other", " completely different"]


def items(model: LlamaModel, texts: list[str] = TEXTS, labels: list[str] = LABELS) -> list[LabelItem]:
    tokens = [model.tokenize(label) for label in labels]
    return [LabelItem(model.tokenize(f"{INSTRUCTIONS}Text: {text}\nAnswer:"), tokens) for text in texts]


def test_a_trie_computes_only_nodes_with_children() -> None:
    trie = LabelTrie([(1,), (2, 3), (2, 4, 5), (2, 4, 6), (7,)])
    assert trie.chains == [(2, 4)]
    assert [tokens.tolist() for tokens in trie.read_tokens] == [[1, 2, 2, 2, 7], [3, 4, 4], [5, 6]]
    assert LabelTrie([(1,), (2,)]).chains == [()]
    assert LabelTrie([(1, 2), (1, 2, 3, 4), (5, 6)]).chains == [(1, 2, 3), (5,)]


@pytest.mark.parametrize(
    ("labels", "probabilities", "mass"),
    [
        ([(1,), (2,)], [0.5, 0.2], 0.7),
        ([(1,), (1, 2)], [0.5, 0.2], 0.5),
        ([(1, 2), (1, 3), (1, 2, 4)], [0.5, 0.2, 0.1], 0.7),
        ([(1,), (1,)], [0.5, 0.5], 0.5),
        ([(1,), (2,)], [0.7, 0.4], 1.0),
    ],
)
def test_the_mass_is_that_of_the_union(labels: list[tuple[int, ...]], probabilities: list[float], mass: float) -> None:
    assert LabelTrie(labels).compute_mass([math.log(value) for value in probabilities]) == pytest.approx(mass)


def test_a_forest_computes_shared_tokens_once_for_all_the_paths_under_them() -> None:
    paths = [to_token_array(path) for path in ([1, 2, 3], [1, 2, 4], [1, 5], [6])]
    forest = build_forest(paths, [10, 10, 10, 0], [0, 2, 1, 0])
    assert forest.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert forest.positions.tolist() == [10, 11, 12, 12, 11, 0]
    assert forest.starts.tolist() == [0, 0, 0, 1, 2, 3]
    assert forest.sizes.tolist() == [3, 2, 1, 1, 1, 1]
    assert [forest.find_entry(2, 0), forest.find_entry(1, 1), forest.find_entry(1, 2), forest.find_entry(3, 0)] == [
        0,
        1,
        3,
        5,
    ]


def test_an_item_with_many_chains_is_cut_and_every_node_is_read_once() -> None:
    labels = [(1, token, 9) for token in range(10)] + [(2, 9)]
    job = LabelJob([LabelItem([5, 6], labels)])
    judged = prepare_item(job, 0, 100, 100)
    assert not isinstance(judged, str)
    pieces = split_into_pieces(judged, judged.trie.chains, 4)
    assert [len(piece.chains) for piece in pieces] == [4, 4, 3]
    read = [
        node
        for piece in pieces
        for chain, known in zip(piece.chains, piece.fresh, strict=True)
        for node in judged.trie.list_nodes(chain)[known:]
    ]
    assert sorted(read) == list(range(13))


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (LabelItem([], [[1]]), "prompt is empty"),
        (LabelItem([1], []), "at least one label"),
        (LabelItem([1], [[1], []]), "at least one token"),
        (LabelItem([1] * 9, [[1, 2, 3]]), "11 tokens and the context holds 10"),
        (LabelItem([1], [[100]]), "outside of the vocabulary of 100"),
        (LabelItem([-1], [[1]]), "outside of the vocabulary of 100"),
    ],
)
def test_an_impossible_item_is_told_why(item: LabelItem, words: str) -> None:
    judged = prepare_item(LabelJob([item]), 0, 10, 100)
    assert isinstance(judged, str)
    assert words in judged


def test_one_impossible_item_harms_no_other(model: LlamaModel) -> None:
    good = items(model)
    found = score(model, [good[0], LabelItem([1] * 5000, [[5]]), good[1]])
    assert [bool(scores.error) for scores in found] == [False, True, False]
    assert found[1].prompt_tokens == 5000
    assert "5000" in (found[1].error or "")
    assert "512" in (found[1].error or "")


def test_the_shared_part_of_a_call_is_computed_once_and_reported_as_cached(model: LlamaModel) -> None:
    wanted = items(model)
    shared = len(model.tokenize(f"{INSTRUCTIONS}Text:"))
    found = score(model, wanted)
    assert sorted(scores.cached_tokens >= shared for scores in found) == [False, True, True, True]
    assert min(scores.cached_tokens for scores in found) == 0
    assert all(scores.cached_tokens < scores.prompt_tokens for scores in found)


def test_single_calls_with_the_same_instructions_find_them_cached_from_the_third_on(model: LlamaModel) -> None:
    found = score(model, items(model), together=False)
    assert [scores.cached_tokens > 20 for scores in found] == [False, False, True, True]


def test_another_tenant_finds_nothing_cached(model: LlamaModel) -> None:
    one = items(model)[0]
    other = LabelItem(one.prompt, one.labels, cache_salt="other")
    assert [scores.cached_tokens for scores in score(model, [one, one, other])] == [0, len(one.prompt) - 1, 0] or [
        scores.cached_tokens for scores in score(model, [one, other])
    ] == [0, 0]


def test_the_best_label_is_the_sensible_one(model: LlamaModel) -> None:
    found = score(model, items(model))
    best = [LABELS[int(np.argmax(scores.logprobs))] for scores in found]
    assert best[1].startswith(" refund")
    assert all(0 < scores.label_mass <= 1 for scores in found)


@pytest.mark.slow
def test_more_items_than_a_window_holds_are_all_answered_in_order(model: LlamaModel) -> None:
    few = items(model)
    many = score(model, few * 10)
    once = score(model, few)
    for index, scores in enumerate(many):
        assert np.argmax(scores.logprobs) == np.argmax(once[index % 4].logprobs)
        assert scores.prompt_tokens == len(few[index % 4].prompt)


@pytest.mark.slow
def test_labels_and_streams_run_side_by_side(model: LlamaModel) -> None:
    model.reset()
    runner = StepRunner(model)
    prompt = model.tokenize("Once upon a time")
    stream = Sequence.from_request(
        SequenceRequest(prompt, 30, Sampling(temperature=0), ignore_eos=True), 0, 512, model.end_tokens
    )
    runner.submit(stream)
    job = LabelJob(items(model) * 12)
    runner.submit_labels(job)
    together = 0
    while not runner.idle:
        before = stream.generated
        runner.run_step()
        together += bool(stream.generated > before and job.open)
    assert stream.generated == 30
    assert together
    assert not job.open


def plain(logits: llama_cpp.Llama, prompt: list[int], label: list[int]) -> float:
    """The likelihood of a label the slow way: the whole text through the high-level class."""
    logits.reset()
    logits.eval(prompt + label)
    total = 0.0
    for place, token in enumerate(label, start=len(prompt) - 1):
        row = logits.scores[place].astype(np.float64)
        total += row[token] - row.max() - math.log(np.exp(row - row.max()).sum())
    return total


@pytest.mark.slow
def test_every_way_to_score_gives_the_same_to_a_thousandth(f32_model: LlamaModel, f32_path: Path) -> None:
    wanted = items(f32_model)
    batch = score(f32_model, wanted)
    for one, fresh in zip(batch, score(f32_model, wanted, together=False), strict=True):
        np.testing.assert_allclose(one.logprobs, fresh.logprobs, atol=1e-3)
    for index, item in enumerate(wanted[:2]):
        alone = [score(f32_model, [LabelItem(item.prompt, [label])])[0].logprobs[0] for label in item.labels]
        np.testing.assert_allclose(batch[index].logprobs, alone, atol=1e-3)
    slow = llama_cpp.Llama(str(f32_path), n_ctx=256, n_threads=1, logits_all=True, type_k=0, type_v=0, verbose=False)
    reference = [plain(slow, list(wanted[0].prompt), list(label)) for label in wanted[0].labels[1:5:3]]
    slow.close()
    np.testing.assert_allclose(batch[0].logprobs[1:5:3], reference, atol=1e-3)


@pytest.mark.slow
def test_a_model_that_cannot_fork_scores_the_same(f32_model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = items(f32_model, TEXTS[:2])
    forked = score(f32_model, wanted)
    monkeypatch.setattr(f32_model, "forkable", False)
    for one, other in zip(forked, score(f32_model, wanted), strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-3)
        assert other.cached_tokens == 0


@pytest.mark.slow
def test_an_item_cut_into_pieces_scores_the_same(f32_model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = items(f32_model, TEXTS[:1])
    whole = score(f32_model, wanted)
    monkeypatch.setattr("appliance.llamacpp.labels.scorer._CHAINS_AT_ONCE", 1)
    np.testing.assert_allclose(score(f32_model, wanted)[0].logprobs, whole[0].logprobs, atol=1e-3)
