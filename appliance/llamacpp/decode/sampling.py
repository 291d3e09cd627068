"""Choosing the next token from one row of logits.

Greedy, unconstrained sequences never come here one by one: `Sampler.plain_greedy` says so and the step takes one argmax
over all their rows. Rows are views into llama.cpp's buffer: a sampler may write into its own row and in no other.
"""

import math
from collections.abc import Collection, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from appliance.llamacpp.engine_protocol import Constraint, Logits, LookaheadConstraint, Sampling, TokenEvent

_GREEDY_TEMPERATURE: Final = 1e-5
"""At or below, the distribution is a single token in float32 anyway."""
_NEAR: Final = np.float32(6.0)
"""Tokens so far below the best one (in logits) are looked at only where too few are nearer: about a hundred are."""
_HEADS: Final = (1e-2, 1e-4, 0.0)
"""Least weights, where the best token weighs 1, of the tokens that are sorted for a nucleus; the first that do."""
_BLOCK: Final = 512


def compute_log_normalizer(logits: Logits) -> float:
    """log(sum(exp(logits))), computed without overflow."""
    top = float(logits.max())
    if top == -math.inf:
        return top
    return top + math.log(_weights(logits, top, 1.0)[1])


def find_most_probable(logits: Logits, count: int) -> npt.NDArray[np.intp]:
    """Indices of the `count` highest logits, best first, of equal ones the lower index first.

    Which of several equal ones at the very end are in is left open.
    """
    near = np.flatnonzero(logits >= logits.max() - _NEAR)
    if len(near) < count:
        near = np.arange(len(logits))
    if len(near) > 2 * count:
        near = np.sort(near[np.argpartition(logits[near], -count)[-count:]])
    return near[np.argsort(-logits[near], kind="stable")][:count]


def find_top_logprobs(logits: Logits, normalizer: float, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most probable tokens with their log probabilities; forbidden tokens are left out."""
    if count <= 0:
        return ()
    best = find_most_probable(logits, count)
    pairs = zip(best.tolist(), (logits[best].astype(np.float64) - normalizer).tolist(), strict=True)
    return tuple((token, value) for token, value in pairs if value > -math.inf)


class Sampler:
    """What one sequence remembers between its tokens: its random stream, its counts and its constraint."""

    __slots__ = (
        "_bias_tokens",
        "_bias_values",
        "_constraint",
        "_counts",
        "_greedy",
        "_logprobs",
        "_lookahead",
        "_penalizes",
        "_random",
        "_sampling",
        "_shifts",
        "plain_greedy",
    )

    def __init__(
        self,
        sampling: Sampling,
        logprobs: int | None = None,
        constraint: Constraint | None = None,
        forbidden: Collection[int] = (),
    ) -> None:
        """`forbidden` tokens are never drawn; the log probabilities are those of the model with them all the same."""
        self._sampling, self._logprobs, self._constraint = sampling, logprobs, constraint
        self._lookahead = constraint if isinstance(constraint, LookaheadConstraint) else None
        self._greedy = sampling.temperature <= _GREEDY_TEMPERATURE or sampling.top_k == 1
        self._random = None if self._greedy else np.random.default_rng(_seed(sampling.seed))
        self._counts: dict[int, int] = {}
        penalties = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty - 1.0
        self._penalizes = any(penalties)
        bias = dict(sampling.logit_bias) | dict.fromkeys(forbidden, -math.inf)
        self._bias_tokens = np.fromiter(bias.keys(), np.intp, len(bias))
        self._bias_values = np.fromiter(bias.values(), np.float32, len(bias))
        self._shifts = self._penalizes or bool(bias)
        self.plain_greedy = self._greedy and logprobs is None and constraint is None and not self._shifts
        """True when the next token is the plain argmax of the logits and nothing else is wanted."""

    @property
    def stateless(self) -> bool:
        """True when tokens need not be reported to `accept`."""
        return self._constraint is None and not self._penalizes

    @property
    def repeatable(self) -> bool:
        """True when the same text before it is followed by the same token: worth guessing from earlier text."""
        return self._greedy and not self._penalizes

    @property
    def finished(self) -> bool:
        """True when the constraint allows nothing but the end."""
        return self._constraint is not None and self._constraint.finished()

    def choose(self, logits: Logits) -> TokenEvent:
        """Draw the next token from a row (which is changed) and say how probable it was."""
        if self._constraint is not None:
            self._constraint.apply(logits)
        normalizer = 0.0
        top: tuple[tuple[int, float], ...] = ()
        known = logits
        if self._logprobs is not None:
            normalizer = compute_log_normalizer(logits)
            top = find_top_logprobs(logits, normalizer, self._logprobs)
            known = logits.copy() if self._shifts else logits
        if self._shifts:
            self._shift(logits)
        token = int(logits.argmax())
        if not logits[token] > -math.inf:  # also where it is not a number
            raise ValueError("no token is allowed here: constraint and logit bias together exclude every one")
        if not self._greedy:
            token = self._draw(logits)
        if self._logprobs is None:
            return TokenEvent(token)
        return TokenEvent(token, float(known[token]) - normalizer, top)

    def accept(self, token: int) -> None:
        """Take note of a token that was chosen here or by the shared argmax."""
        if self._constraint is not None:
            self._constraint.accept(token)
        if self._penalizes:
            self._counts[token] = self._counts.get(token, 0) + 1

    def list_forced_events(self) -> list[TokenEvent]:
        """The tokens that the constraint leaves no choice about, to be taken as they are; each must be accepted."""
        tokens: list[int] = self._lookahead.list_forced_tokens() if self._lookahead is not None else []
        if self._logprobs is None:
            return [TokenEvent(token) for token in tokens]
        return [TokenEvent(token, 0.0, ((token, 0.0),) if self._logprobs else ()) for token in tokens]

    def cut_to_allowed(self, tokens: list[int]) -> list[int]:
        """The first of `tokens`, as many as the constraint lets follow one another."""
        return tokens[: self._lookahead.count_allowed(tokens)] if self._lookahead is not None else tokens

    def _shift(self, logits: Logits) -> None:
        """Logit bias, then the penalties over the tokens generated so far."""
        if len(self._bias_tokens):
            logits[self._bias_tokens] += self._bias_values
        if not self._counts:
            return
        wanted = self._sampling
        tokens = np.fromiter(self._counts.keys(), np.intp, len(self._counts))
        counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
        values = logits[tokens]
        if wanted.repetition_penalty != 1.0:
            rate = np.float32(wanted.repetition_penalty)
            values = np.where(values > 0, values / rate, values * rate)
        values -= np.float32(wanted.presence_penalty) + np.float32(wanted.frequency_penalty) * counts
        logits[tokens] = values

    def _draw(self, logits: Logits) -> int:
        assert self._random is not None
        wanted = self._sampling
        if wanted.top_k <= 0 and wanted.top_p >= 1.0 and wanted.min_p <= 0.0:
            return pick_token(_weights(logits, float(logits.max()), wanted.temperature)[0], self._random.random())
        tokens, weights = select_candidates(logits, wanted)
        edges = np.cumsum(weights)
        place = int(np.searchsorted(edges, self._random.random() * edges[-1], side="right"))
        return int(tokens[min(place, len(tokens) - 1)])


def select_candidates(logits: Logits, sampling: Sampling) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """The tokens that may be drawn and their weights (not normalised): top_k, then top_p, then min_p, best first.

    All three look at the distribution after temperature.
    """
    top, temperature = float(logits.max()), sampling.temperature
    weights, total = _weights(logits, top, temperature)
    if sampling.top_k > 0:
        tokens = find_most_probable(logits, sampling.top_k)
        total = float(weights[tokens].sum(dtype=np.float64))
    else:
        tokens = _head(weights, total, sampling)
    kept = weights[tokens].astype(np.float64)
    keep = len(tokens)
    if sampling.top_p < 1.0:
        # The token that crosses the bound still belongs to the nucleus.
        keep = int(np.searchsorted(np.cumsum(kept), sampling.top_p * total, side="left")) + 1
    if sampling.min_p > 0.0:
        keep = min(keep, int(np.count_nonzero(kept >= sampling.min_p * kept[0])))
    keep = max(1, min(keep, len(tokens)))
    return tokens[:keep], kept[:keep]


def _head(weights: Logits, total: float, sampling: Sampling) -> npt.NDArray[np.intp]:
    """The best tokens, best first, as many as top_p and min_p can need: sorting is what costs, so sort few."""
    for least in _HEADS:
        near = np.flatnonzero(weights >= least)
        deep_enough = least <= 0.999 * sampling.min_p
        if deep_enough or float(weights[near].sum(dtype=np.float64)) >= sampling.top_p * total:
            break
    return near[np.argsort(-weights[near], kind="stable")]


def pick_token(weights: Logits, share: float) -> int:
    """The token at `share` (0 to 1) of the summed weights. Sums blocks first: one running sum over all is slow."""
    starts = np.arange(0, len(weights), _BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    place = share * float(blocks[-1])
    block = min(int(np.searchsorted(blocks, place, side="right")), len(blocks) - 1)
    before = float(blocks[block - 1]) if block else 0.0
    inside = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    return block * _BLOCK + min(int(np.searchsorted(inside, place - before, side="right")), len(inside) - 1)


def _weights(logits: Logits, top: float, temperature: float) -> tuple[Logits, float]:
    """exp((logits - top) / temperature) and its sum. Float32 halves the time, and pairwise sums keep six digits."""
    scaled = logits - np.float32(top)
    if temperature != 1.0:
        scaled *= np.float32(1.0 / temperature)
    np.exp(scaled, out=scaled)
    return scaled, float(scaled.sum())


def _seed(seed: int | None) -> int | None:
    """Callers' seeds may be negative, the generator's may not."""
    return None if seed is None else seed % 2**64


def find_row_maxima(rows: npt.NDArray[np.float32]) -> Sequence[int]:
    """The best token of every row; ties go to the lower id."""
    best: Sequence[int] = rows.argmax(axis=1).tolist()
    return best
