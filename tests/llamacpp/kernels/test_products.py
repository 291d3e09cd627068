"""Products with quantised weights against numpy, with activations that are quantised the same way."""

import numpy as np
import numpy.typing as npt
import pytest

from tests.llamacpp.kernels import graphs
from tests.llamacpp.kernels.conftest import Run
from tests.llamacpp.kernels.graphs import BLOCKS, F16, F32, Q4_0, Q4_1, Q8_0, Floats

BLOCK = 32
KINDS = {"q4_0": Q4_0, "q4_1": Q4_1, "q8_0": Q8_0}

by_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def blocks(kind: int, outputs: int, inputs: int, seed: int) -> npt.NDArray[np.void]:
    random = np.random.default_rng(seed)
    made = np.empty((outputs, inputs // BLOCK), BLOCKS[kind])
    made["scale"] = random.uniform(0.001, 0.02, made.shape)
    if kind == Q4_1:
        made["least"] = random.uniform(-0.2, 0.1, made.shape)
    span = np.iinfo(made["weights"].dtype)
    made["weights"] = random.integers(span.min, span.max + 1, made["weights"].shape)
    return made


def real(made: npt.NDArray[np.void]) -> npt.NDArray[np.float64]:
    """What the blocks stand for: (outputs, inputs)."""
    scale = made["scale"].astype(np.float64)[..., None]
    if made.dtype == BLOCKS[Q8_0]:
        weights = made["weights"] * scale
    else:
        nibbles = np.concatenate([made["weights"] & 15, made["weights"] >> 4], axis=-1)
        least = made["least"].astype(np.float64)[..., None] if made.dtype == BLOCKS[Q4_1] else -8 * scale
        weights = nibbles * scale + least
    return np.asarray(weights.reshape(len(made), -1))


def activations(planes: int, tokens: int, inputs: int, seed: int) -> Floats:
    random = np.random.default_rng(seed)
    made = random.normal(size=(planes, tokens, inputs)).astype(np.float32)
    made[..., :BLOCK] *= 40  # as the large values that some hidden units of real models have
    made[0, -1, BLOCK : 2 * BLOCK] = 0  # a block of zeros has no scale
    return made


def expected(weights: npt.NDArray[np.void], inputs: Floats) -> npt.NDArray[np.float64]:
    parts = inputs.reshape(*inputs.shape[:-1], -1, BLOCK)
    largest = np.abs(parts).max(-1)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest != 0)
    whole = np.rint(parts * inverse[..., None]).astype(np.float64)
    seen = (whole * (largest / 127)[..., None]).reshape(inputs.shape)
    return np.asarray(seen @ real(weights).T)


def difference(found: Floats, wanted: npt.NDArray[np.float64]) -> float:
    """The largest one, relative to the results' own size."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@by_kind
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 32), (64, 96), (576, 192), (576, 1536), (1536, 576)])
def test_products_are_those_of_the_quantised_numbers(
    inputs: int, outputs: int, threads: int, kind: int, kernels: Run
) -> None:
    weights = blocks(kind, outputs, inputs, seed=inputs)
    for tokens in range(1, 14):
        given = activations(1, tokens, inputs, seed=tokens)
        found = kernels(graphs.multiply, weights, given, threads)
        assert difference(found, expected(weights, given)) < 1e-4


@by_kind
@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_planes_of_inputs_share_their_weights(tokens: int, kind: int, kernels: Run) -> None:
    weights, given = blocks(kind, 64, 96, seed=1), activations(2, tokens, 96, seed=2)
    assert difference(kernels(graphs.multiply, weights, given, 2), expected(weights, given)) < 1e-4


@pytest.mark.parametrize("planes", [1, 2])
def test_rows_of_inputs_may_lie_apart(planes: int, kernels: Run) -> None:
    weights, given = blocks(Q8_0, 64, 96, seed=3), activations(planes, 5, 96, seed=4)
    assert difference(kernels(graphs.multiply, weights, given, 2, gap=24), expected(weights, given)) < 1e-4


@by_kind
def test_neither_threads_nor_other_tokens_change_a_bit(kind: int, kernels: Run) -> None:
    weights, given = blocks(kind, 96, 576, seed=5), activations(1, 9, 576, seed=6)
    one, *others = (kernels(graphs.multiply, weights, given, threads) for threads in (1, 2, 3))
    assert all(np.array_equal(one, other) for other in others)
    alone = [kernels(graphs.multiply, weights, given[:, [token]], 2) for token in range(9)]
    assert np.array_equal(one, np.concatenate(alone, axis=1))


@by_kind
def test_llama_cpps_own_products_are_the_same_but_for_rounding(kind: int, kernels: Run, plain: Run) -> None:
    weights, given = blocks(kind, 96, 576, seed=7), activations(1, 9, 576, seed=8)
    own, ours = (run(graphs.multiply, weights, given, 1) for run in (plain, kernels))
    assert difference(ours, own.astype(np.float64)) < 1e-3
    assert not np.array_equal(own, ours), "the kernels have computed it"


@pytest.mark.parametrize(
    ("kind", "shape", "taken"),
    [
        (Q8_0, (64, 96), True),
        (Q8_0, (32, 32), True),
        (Q4_0, (64, 96), True),
        (Q4_1, (64, 96), True),
        (Q8_0, (48, 96), False),  # outputs are packed by 32
        (Q8_0, (100, 64), False),
        (Q4_1, (48, 96), False),
        (Q8_0, (2, 64, 96), False),  # experts, or one matrix for each head
        (F16, (64, 96), False),
        (F32, (64, 96), False),
    ],
)
def test_weights_that_do_not_suit_stay_where_they_were(
    kind: int, shape: tuple[int, ...], taken: bool, kernels: Run
) -> None:
    assert kernels(graphs.accepts, kind, shape) is taken


@by_kind
@pytest.mark.parametrize("threads", [1, 3])
def test_single_rows_are_what_the_blocks_stand_for(kind: int, threads: int, kernels: Run) -> None:
    weights = blocks(kind, 96, 576, seed=kind)
    numbers = np.array([0, 95, 31, 32, 95, 17, 64], np.int32)
    found = kernels(graphs.pick, weights, numbers, threads)
    assert difference(found, real(weights)[numbers]) < 1e-6
