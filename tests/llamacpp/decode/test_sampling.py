"""Sampling as tables over small rows of logits."""

import math

import numpy as np
import pytest

from appliance.llamacpp.decode.sampling import (
    Sampler,
    compute_log_normalizer,
    find_most_probable,
    find_row_maxima,
    find_top_logprobs,
    pick_token,
    select_candidates,
)
from appliance.llamacpp.engine_protocol import Logits, Sampling

PROBABILITIES = [0.05, 0.4, 0.1, 0.3, 0.15]


def row(values: list[float] = PROBABILITIES) -> Logits:
    return np.log(np.array(values, np.float32)) + np.float32(3.0)


class Only:
    """A constraint that allows some tokens."""

    def __init__(self, *allowed: int) -> None:
        self.allowed, self.accepted = allowed, list[int]()

    def apply(self, logits: Logits) -> None:
        forbidden = [token for token in range(len(logits)) if token not in self.allowed]
        logits[forbidden] = -np.inf

    def accept(self, token: int) -> None:
        self.accepted.append(token)

    def finished(self) -> bool:
        return len(self.accepted) >= 2


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_p=1.0), {0, 1, 2, 3, 4}),
        (Sampling(top_k=2), {1, 3}),
        (Sampling(top_k=50), {0, 1, 2, 3, 4}),
        (Sampling(top_p=0.39), {1}),
        (Sampling(top_p=0.41), {1, 3}),
        (Sampling(top_p=0.8), {1, 3, 4}),
        (Sampling(top_p=0.0), {1}),
        (Sampling(min_p=0.3), {1, 3, 4}),
        (Sampling(min_p=1.0), {1}),
        (Sampling(top_k=3, top_p=0.5), {1, 3}),
        (Sampling(top_p=0.96, min_p=0.5), {1, 3}),
        (Sampling(top_k=4, min_p=0.3), {1, 3, 4}),
        (Sampling(temperature=0.25, top_p=0.9), {1, 3}),
        (Sampling(temperature=100.0, min_p=0.9), {0, 1, 2, 3, 4}),
    ],
)
def test_truncation_keeps_these_tokens(sampling: Sampling, kept: set[int]) -> None:
    tokens, weights = select_candidates(row(), sampling)
    assert set(tokens.tolist()) == kept
    assert len(tokens) == len(weights)


def test_top_p_is_the_share_of_the_mass_that_top_k_left() -> None:
    tokens, _ = select_candidates(row(), Sampling(top_k=2, top_p=0.56))
    assert set(tokens.tolist()) == {1}
    tokens, _ = select_candidates(row(), Sampling(top_k=2, top_p=0.58))
    assert set(tokens.tolist()) == {1, 3}


def test_a_flat_distribution_over_more_tokens_than_the_head_is_cut_rightly() -> None:
    flat = np.zeros(1000, np.float32)
    tokens, _ = select_candidates(flat, Sampling(top_p=0.5))
    assert len(tokens) == 500


@pytest.mark.parametrize("size", [1, 511, 512, 513, 5000])
def test_a_place_in_the_summed_weights_is_found_through_blocks(size: int) -> None:
    weights = np.random.default_rng(size).random(size).astype(np.float32)
    edges = np.cumsum(weights, dtype=np.float64)
    for share in (0.0, 0.1, 0.5, 0.77, 0.999):
        assert pick_token(weights, share) == np.searchsorted(edges, share * edges[-1], side="right")


def test_draws_follow_the_probabilities() -> None:
    sampler = Sampler(Sampling(seed=7))
    drawn = np.bincount([sampler.choose(row()).token for _ in range(4000)], minlength=5) / 4000
    assert np.abs(drawn - PROBABILITIES).max() < 0.03


def test_temperature_sharpens() -> None:
    sampler = Sampler(Sampling(seed=7, temperature=0.5))
    expected = np.square(PROBABILITIES) / np.square(PROBABILITIES).sum()
    drawn = np.bincount([sampler.choose(row()).token for _ in range(4000)], minlength=5) / 4000
    assert np.abs(drawn - expected).max() < 0.03


def test_the_same_seed_draws_the_same_tokens_and_another_does_not() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(Sampling(seed=seed))
        return [sampler.choose(row()).token for _ in range(40)]

    assert draws(1) == draws(1) != draws(2)


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.0), Sampling(temperature=5.0, top_k=1), Sampling(temperature=1e-6)]
)
def test_these_are_greedy(sampling: Sampling) -> None:
    sampler = Sampler(sampling)
    assert sampler.plain_greedy
    assert sampler.choose(row()).token == 1


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=0, logit_bias={0: 5.0}), 0),
        (Sampling(temperature=0, logit_bias={1: -100.0}), 3),
        (Sampling(temperature=0, presence_penalty=1.0), 3),
        (Sampling(temperature=0, presence_penalty=0.2), 1),
        (Sampling(temperature=0, frequency_penalty=0.15), 3),
        (Sampling(temperature=0, repetition_penalty=1.5), 3),
        (Sampling(temperature=0, repetition_penalty=1.01), 1),
    ],
)
def test_bias_and_penalties_move_the_choice_after_two_times_token_one(sampling: Sampling, expected: int) -> None:
    sampler = Sampler(sampling)
    for _ in range(2):
        sampler.accept(1)
    assert not sampler.plain_greedy
    assert sampler.choose(row()).token == expected


def test_a_repetition_penalty_makes_negative_logits_more_negative() -> None:
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0))
    sampler.accept(0)
    assert sampler.choose(np.array([-1.0, -1.5], np.float32)).token == 1


def test_logprobs_are_the_models_own_after_the_constraint_and_before_everything_else() -> None:
    sampler = Sampler(Sampling(temperature=0.0, logit_bias={4: 50.0}), logprobs=2, constraint=Only(3, 4))
    event = sampler.choose(row())
    assert event.token == 4
    assert event.logprob == pytest.approx(math.log(0.15 / 0.45), abs=1e-5)
    assert [token for token, _ in event.top] == [3, 4]
    assert event.top[0][1] == pytest.approx(math.log(0.3 / 0.45), abs=1e-5)


def test_no_alternatives_are_given_when_none_are_asked_for() -> None:
    event = Sampler(Sampling(temperature=0.0), logprobs=0).choose(row())
    assert event.top == ()
    assert event.logprob == pytest.approx(math.log(0.4), abs=1e-5)


def test_forbidden_tokens_are_no_alternatives() -> None:
    event = Sampler(Sampling(temperature=0.0), logprobs=5, constraint=Only(0, 2)).choose(row())
    assert [token for token, _ in event.top] == [2, 0]


def test_a_constraint_comes_before_the_draw_and_hears_of_it() -> None:
    only = Only(2)
    sampler = Sampler(Sampling(seed=1), constraint=only)
    for _ in range(2):
        sampler.accept(sampler.choose(row()).token)
    assert only.accepted == [2, 2]
    assert sampler.finished


def test_end_tokens_can_be_forbidden_without_changing_the_models_probabilities() -> None:
    event = Sampler(Sampling(temperature=0.0), logprobs=1, forbidden=(1,)).choose(row())
    assert event.token == 3
    assert event.logprob == pytest.approx(math.log(0.3), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_in_which_nothing_is_allowed_is_an_error(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, seed=1), constraint=Only())
    with pytest.raises(ValueError, match="no token is allowed"):
        sampler.choose(row())


def test_the_log_normalizer_survives_large_logits() -> None:
    assert compute_log_normalizer(np.array([1000.0, 1000.0], np.float32)) == pytest.approx(1000 + math.log(2))


def test_ties_go_to_the_lower_id() -> None:
    tied = np.array([1.0, 2.0, 2.0, 0.0], np.float32)
    assert find_most_probable(tied, 2).tolist() == [1, 2]
    assert find_most_probable(tied, 9).tolist() == [1, 2, 0, 3]
    assert find_row_maxima(np.stack([tied, tied[::-1]])) == [1, 1]
    assert find_top_logprobs(tied, 0.5, 2) == ((1, 1.5), (2, 1.5))


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    drawn = [Sampler(Sampling(temperature=1.0, seed=seed)).choose(row()).token for _ in range(2)]
    assert drawn[0] == drawn[1]
