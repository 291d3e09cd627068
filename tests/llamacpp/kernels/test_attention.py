"""Attention against numpy in float64, over memories as sequences leave them; what is declined is ggml's as before."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.llamacpp.kernels import graphs
from tests.llamacpp.kernels.conftest import Run
from tests.llamacpp.kernels.graphs import Floats, Halves

Seen = npt.NDArray[np.bool_]
"""Which cells each query sees: (streams, queries, cells)."""


class Case:
    """Random numbers for one attention; `seen` says which cells each query sees."""

    def __init__(self, seen: Seen, *, head: int = 64, shared: int = 2, group: int = 1, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        streams, queries, cells = seen.shape
        self.seen, self.scale = seen, head**-0.5
        self.queries = random.normal(size=(streams, queries, shared * group, head)).astype(np.float32) * 3
        self.keys = random.normal(size=(streams, cells, shared, head)).astype(np.float16)
        self.values = random.normal(size=(streams, cells, shared, head)).astype(np.float16)

    @property
    def mask(self) -> Halves:
        return np.where(self.seen, np.float16(0), np.float16(-np.inf))[:, None].astype(np.float16)

    def run(self, run: Run, threads: int, **more: Any) -> Floats:
        given: dict[str, Any] = {"keys": self.keys, "scale": self.scale, **more}
        keys = given.pop("keys")
        found: Floats = run(graphs.attend, self.queries, keys, self.values, self.mask, threads, **given)
        return found

    def expected(self) -> npt.NDArray[np.float64]:
        """In float64; a query that sees nothing gets zeros."""
        group = self.queries.shape[2] // self.keys.shape[2]
        keys = np.repeat(self.keys.astype(np.float64), group, axis=2)
        values = np.repeat(self.values.astype(np.float64), group, axis=2)
        scores = np.einsum("sqhd,schd->shqc", self.queries.astype(np.float64), keys) * self.scale
        scores = np.where(self.seen[:, None], scores, -np.inf)
        largest = scores.max(-1, keepdims=True)
        weights = np.exp(scores - np.where(np.isfinite(largest), largest, 0))
        totals = weights.sum(-1, keepdims=True)
        shares = np.divide(weights, totals, out=np.zeros_like(weights), where=totals > 0)
        return np.asarray(np.einsum("shqc,schd->sqhd", shares, values))

    def error(self, run: Run, threads: int = 1) -> float:
        return float(np.abs(self.run(run, threads) - self.expected()).max())


# ggml's own turns queries into float16 and differs by a hundred times as much, so what stays below is not ggml's.
EXACT = 1e-5


def causal(queries: int, cells: int) -> Seen:
    """One sequence whose last tokens are the queries."""
    return np.tri(queries, cells, cells - queries, dtype=bool)[None]


def ragged(random: np.random.Generator, queries: int, cells: int, streams: int = 1) -> Seen:
    """Cells of several sequences in any order; each query sees those of its own up to some place, perhaps none."""
    owners = random.integers(0, max(1, queries // 2), (streams, 1, cells))
    mine = random.integers(0, max(1, queries // 2), (streams, queries, 1))
    ends = random.integers(0, cells + 1, (streams, queries, 1))
    return np.asarray((owners == mine) & (np.arange(cells) < ends))


@pytest.mark.parametrize("head", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_heads_of_every_size_and_share_agree_with_float64(head: int, group: int, kernels: Run) -> None:
    for queries, cells in ((1, 7), (5, 40), (33, 129)):
        case = Case(causal(queries, cells), head=head, shared=2, group=group, seed=head + group)
        assert case.error(kernels, threads=2) < EXACT


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_memories_of_many_sequences_agree_with_float64(threads: int, kernels: Run) -> None:
    random = np.random.default_rng(threads)
    for seed in range(20):
        queries, cells = int(random.integers(1, 71)), int(random.integers(1, 601))
        case = Case(ragged(random, queries, cells), shared=3, group=3, seed=seed)
        assert case.error(kernels, threads) < EXACT, (queries, cells)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_cells_with_gaps_between_them_agree_with_float64(share: float, kernels: Run) -> None:
    random = np.random.default_rng(7)
    for queries, cells in ((1, 600), (16, 333), (70, 64)):
        case = Case(random.random((1, queries, cells)) < share, shared=2, group=3)
        assert case.error(kernels, threads=2) < EXACT


def test_a_query_that_sees_nothing_gets_zeros_and_disturbs_no_other(kernels: Run) -> None:
    seen = causal(9, 50).copy()
    seen[0, [0, 4, 8]] = False
    found = Case(seen, group=3).run(kernels, 2)
    assert not found[0, [0, 4, 8]].any()
    assert np.abs(found - Case(seen, group=3).expected()).max() < EXACT
    assert not Case(np.zeros((1, 3, 40), bool)).run(kernels, 1).any()


@pytest.mark.parametrize("streams", [2, 5])
def test_streams_are_computed_each_with_its_own_mask(streams: int, kernels: Run) -> None:
    random = np.random.default_rng(streams)
    for queries, cells in ((1, 90), (12, 256)):
        case = Case(ragged(random, queries, cells, streams), shared=3, group=3)
        assert case.error(kernels, threads=3) < EXACT


def test_very_large_and_very_small_scores_do_not_overflow(kernels: Run) -> None:
    case = Case(causal(8, 100), group=3)
    case.queries *= np.float32(400)
    # Where one cell takes all, what remains is the rounding of scores of many thousands.
    assert case.error(kernels) < 1e-2
    case.queries *= np.float32(1e-9)
    assert case.error(kernels) < EXACT


def test_the_number_of_threads_changes_no_bit(kernels: Run) -> None:
    case = Case(ragged(np.random.default_rng(3), 40, 300), shared=3, group=3)
    one, *others = (case.run(kernels, threads) for threads in (1, 2, 3))
    assert all(np.array_equal(one, other) for other in others)


@pytest.mark.parametrize(("head", "group"), [(64, 1), (64, 3), (80, 8), (128, 2)])
def test_other_queries_and_cells_in_between_change_no_bit(head: int, group: int, kernels: Run) -> None:
    case = Case(ragged(np.random.default_rng(group), 40, 300), head=head, shared=2, group=group)
    together = case.run(kernels, 2)
    for query in range(0, 40, 3):
        mine = np.flatnonzero(case.seen[0, query])
        if not len(mine):
            continue
        alone = Case(np.ones((1, 1, len(mine)), bool), head=head, shared=2, group=group)
        alone.queries = case.queries[:, [query]]
        alone.keys, alone.values = case.keys[:, mine], case.values[:, mine]
        assert np.array_equal(alone.run(kernels, 1)[0, 0], together[0, query]), query


@pytest.mark.parametrize(
    "more",
    [
        {"largest_bias": 8.0},
        {"soft_cap": 30.0},
        {"sinks": np.linspace(-2, 2, 6, dtype=np.float32)},
        {"keys": np.random.default_rng(5).normal(size=(1, 60, 2, 64)).astype(np.float32)},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_is_declined_is_computed_by_ggml_as_ever(more: dict[str, Any], kernels: Run, plain: Run) -> None:
    case = Case(causal(5, 60), group=3)
    if "keys" in more:  # ggml wants keys and values of one kind
        case.values = case.values.astype(np.float32)
    assert np.array_equal(case.run(kernels, 1, **more), case.run(plain, 1, **more))
    assert not np.array_equal(case.run(kernels, 1, **more), Case(causal(5, 60), group=3).run(kernels, 1))


def test_ggmls_own_attention_is_the_same_but_for_rounding(kernels: Run, plain: Run) -> None:
    case = Case(ragged(np.random.default_rng(9), 20, 200), group=3)
    case.seen[:, :, 0] = True  # of a query that sees nothing ggml makes no number
    assert np.abs(case.run(plain, 1) - case.run(kernels, 1)).max() < 2e-2
    assert case.error(plain) > EXACT
