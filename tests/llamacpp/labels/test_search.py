"""Leaving out what cannot matter of a label trie: the bound that is promised, over made-up distributions."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.llamacpp.labels.search import LabelSearch, SearchBudget
from appliance.llamacpp.labels.trie import LabelTrie, Path

TOKENS = 6
TRIES = st.lists(st.lists(st.integers(0, TOKENS - 1), min_size=1, max_size=5).map(tuple), min_size=2, max_size=40)


class Source:
    """A distribution over the tokens behind every path: the same one whenever it is asked."""

    def __init__(self, seed: int, sharpness: float, left_over: float) -> None:
        self.seed, self.sharpness, self.left_over = seed, sharpness, left_over
        self.asked = 0

    def logprobs(self, path: Path) -> npt.NDArray[np.float64]:
        self.asked += 1
        logits = np.random.default_rng([self.seed, *path]).normal(size=TOKENS) * self.sharpness
        weights = np.exp(logits - logits.max())
        logprobs: npt.NDArray[np.float64] = np.log(weights / weights.sum()) + np.log1p(-self.left_over)
        return logprobs


def read(search: LabelSearch, source: Source, chains: list[Path]) -> None:
    for chain in chains:
        for length, node in enumerate(search.trie.list_nodes(chain)):
            if not search.has_read(node):
                search.add_logprobs(node, source.logprobs(chain[:length])[search.trie.read_tokens[node]])


def walked(trie: LabelTrie, source: Source, tolerance: float) -> npt.NDArray[np.float64]:
    search = LabelSearch(trie)
    chains: list[Path] = [()]
    while chains:
        read(search, source, chains)
        chains = search.plan_next_chains(tolerance)
    return search.compute_logprobs()


def whole(trie: LabelTrie, source: Source) -> npt.NDArray[np.float64]:
    search = LabelSearch(trie)
    read(search, source, trie.chains)
    assert not search.plan_next_chains(0.0)
    return search.compute_logprobs()


def shares(logprobs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    weights = np.exp(logprobs - logprobs.max())
    found: npt.NDArray[np.float64] = weights / weights.sum()
    return found


@settings(max_examples=500, deadline=None)
@given(
    labels=TRIES,
    seed=st.integers(0, 2**32),
    sharpness=st.sampled_from([0.0, 0.3, 1.0, 3.0, 8.0, 30.0]),
    left_over=st.sampled_from([0.0, 0.5, 0.999]),
    tolerance=st.sampled_from([1e-4, 1e-3, 1e-2, 0.1]),
)
def test_whatever_is_left_out_the_shares_the_mass_and_the_top_label_are_those_of_the_whole_trie(
    labels: list[Path], seed: int, sharpness: float, left_over: float, tolerance: float
) -> None:
    trie = LabelTrie(labels)
    exact = whole(trie, Source(seed, sharpness, left_over))
    found = walked(trie, Source(seed, sharpness, left_over), tolerance)
    assert np.abs(shares(found) - shares(exact)).sum() / 2 <= tolerance + 1e-9
    assert trie.compute_mass(found) == pytest.approx(trie.compute_mass(exact), rel=tolerance + 1e-9)
    assert exact[np.argmax(found)] == pytest.approx(exact.max(), abs=1e-9)
    assert np.isfinite(found).all()


def test_without_a_tolerance_all_is_computed() -> None:
    trie = LabelTrie([(0, 1, 2), (0, 1, 3), (4, 5), (4, 5, 1)])
    source = Source(1, 10.0, 0.0)
    np.testing.assert_allclose(walked(trie, source, 0.0), whole(trie, Source(1, 10.0, 0.0)))
    assert source.asked == len(trie)


def test_where_the_model_is_sure_a_small_part_of_a_large_trie_is_computed() -> None:
    labels = [(a, b, c, d) for a in range(TOKENS) for b in range(TOKENS) for c in range(TOKENS) for d in range(TOKENS)]
    source = Source(3, 12.0, 0.0)
    walked(LabelTrie(labels), source, 1e-3)
    assert source.asked < len(LabelTrie(labels)) / 10


def test_impossible_labels_end_a_search_at_once() -> None:
    search = LabelSearch(LabelTrie([(0, 1), (2, 3)]))
    search.add_logprobs(0, np.full(2, -np.inf))
    assert search.plan_next_chains(1e-3) == []
    assert search.compute_logprobs().tolist() == [-np.inf, -np.inf]


def test_a_wave_goes_on_to_the_next_choice() -> None:
    trie = LabelTrie([(0, 1, 2, 3), (0, 1, 2, 4), (5, 1)])
    search = LabelSearch(trie)
    search.add_logprobs(0, np.log([0.5, 0.5, 0.5])[: len(trie.read_tokens[0])])
    assert search.plan_next_chains(1e-3) == [(0, 1, 2), (5,)]


def test_labels_that_begin_each_other_can_all_be_likely() -> None:
    trie = LabelTrie([(1,), (1, 2), (1, 2, 3), (1, 4), (5,), (5,)])
    assert dict(zip(trie.paths, trie.nesting.tolist(), strict=True)) == {(): 3, (1,): 2, (1, 2): 1}
    assert trie.prefix_free.tolist() == [True, False, False, False, True, False]


LARGE = LabelTrie([(a, b, c) for a in range(6) for b in range(6) for c in (1, 2)])


def test_small_tries_and_small_calls_are_computed_in_one_pass() -> None:
    assert SearchBudget().is_worth_searching(LARGE, 1000, 1e-3)
    assert not SearchBudget().is_worth_searching(LabelTrie([(1, 2), (3, 4)]), 1000, 1e-3)
    assert not SearchBudget().is_worth_searching(LARGE, 1, 1e-3)
    assert not SearchBudget().is_worth_searching(LARGE, 1000, 0.0)


def test_where_searches_save_nothing_few_items_search() -> None:
    budget, searches = SearchBudget(), 0
    for seed in range(400):
        if budget.is_worth_searching(LARGE, 1000, 1e-3):
            search, source = LabelSearch(LARGE), Source(seed, 0.1, 0.0)
            chains: list[Path] = [()]
            while chains:
                read(search, source, chains)
                chains = search.plan_next_chains(1e-3)
            budget.observe(search)
            searches += 1
    assert 10 < searches < 100
