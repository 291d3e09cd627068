"""What `probability` and `confidence` mean, in one place.

Decisions: the model gives every label a log likelihood; its `scores` are these, normalised over the labels of the
question. With `debias` they are averaged over two orders of the options, forward and reversed; with `calibrate:
"content_free"` the scores for a text that says nothing are taken off, so that only what the text itself adds counts.
`probabilities` are the softmax of scores / temperature + bias, and sum to 1; temperature and biases are those that were
fitted for the task the request names (fitting.py), and 1 and 0 otherwise. `confidence` is the probability of the option
that is reported. `label_mass` says how much of the model's whole distribution fell on any label at all: a low one means
that the model wanted to say something else, and makes the answer unsure however confident it looks. A fit belongs to a
task, a model and a variant; an answer of any other model is never given it.

Extraction: the confidence of a field is the product of the probabilities of the tokens that its value was written with:
the model's own probability of writing exactly this value, given what it wrote before. Long values score lower than
short ones by nature, so a threshold belongs to a field, a model and a variant.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from appliance.core.json_types import JsonObject
from appliance.tasks.extract.value_spans import find_value_spans

DEFAULT_TEMPERATURE = 1.0
"""1 leaves the model's own distribution as it is: no calibration set has been given."""


UNSURE_LABEL_MASS = 0.05
"""Below, an answer is marked `unsure`: nineteen times out of twenty the model would have said something else."""
LEAST_SCORE = -100.0
"""Scores are not let further down: differences beyond say nothing, and infinities cannot be averaged or taken off."""


def calibrate_scores(
    scores: Sequence[float], temperature: float = DEFAULT_TEMPERATURE, bias: Sequence[float] = ()
) -> tuple[float, ...]:
    """Probabilities of the labels, summing to 1. Excluded labels have -inf; ValueError where all are."""
    if not math.isfinite(max(scores)):
        raise ValueError("no label has a finite log probability")
    shifts = bias or (0.0,) * len(scores)
    values = [score / temperature + shift for score, shift in zip(scores, shifts, strict=True)]
    top = max(values)
    weights = [math.exp(value - top) for value in values]
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def normalise_logprobs(logprobs: Sequence[float]) -> tuple[float, ...]:
    """Scores: log shares among the labels, none below LEAST_SCORE."""
    shares = calibrate_scores(logprobs)
    return tuple(max(LEAST_SCORE, math.log(share)) if share else LEAST_SCORE for share in shares)


def average_scores(scores: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """One question asked in several ways: the mean score of every label."""
    return tuple(math.fsum(column) / len(scores) for column in zip(*scores, strict=True))


def subtract_prior(scores: Sequence[float], prior: Sequence[float]) -> tuple[float, ...]:
    """What a text adds to the scores of one that says nothing."""
    return tuple(score - before for score, before in zip(scores, prior, strict=True))


def find_most_likely(probabilities: Sequence[float]) -> int:
    """Index of the option to report; the first of equals, so that equal answers are reported alike."""
    return probabilities.index(max(probabilities))


def compute_expected_level(probabilities: Sequence[float]) -> float:
    """The mean level, counted from 0: what a score reports, which may lie between two levels."""
    return math.fsum(index * probability for index, probability in enumerate(probabilities))


def measure_field_confidence(content: str, logprobs: object) -> Mapping[str, float] | None:
    """Confidence by JSON pointer for every leaf of the JSON in `content`.

    `logprobs` is the `logprobs` object of a chat choice. None where it is absent or its tokens do not spell `content`:
    a confidence is measured or not given.
    """
    tokens = _spelled(content, logprobs)
    if tokens is None:
        return None
    ends = [end for end, _ in tokens]
    is_ascii = content.isascii()
    confidence: dict[str, float] = {}
    for pointer, span in find_value_spans(content).items():
        start, stop = span if is_ascii else (len(content[:place].encode()) for place in span)
        first, last = bisect_right(ends, start), bisect_left(ends, stop)
        total = math.fsum(logprob for _, logprob in tokens[first : last + 1])
        confidence[pointer] = min(1.0, math.exp(total))
    return confidence


def _spelled(content: str, logprobs: object) -> list[tuple[int, float]] | None:
    """(byte after the last, log probability) of each token, if the tokens together are `content`."""
    rows: Any = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(rows, list):
        return None
    tokens: list[tuple[int, float]] = []
    spelled = bytearray()
    for row in rows:
        piece = _bytes_of(row) if isinstance(row, dict) else None
        if piece is None or not isinstance(row.get("logprob"), int | float):
            return None
        spelled += piece
        tokens.append((len(spelled), float(row["logprob"])))
    if bytes(spelled) == content.encode():
        return tokens
    # Some servers tell the token that ended the turn as well, which is no part of what was written.
    return tokens[:-1] if len(tokens) > 1 and bytes(spelled[: tokens[-2][0]]) == content.encode() else None


def _bytes_of(row: JsonObject) -> bytes | None:
    given = row.get("bytes")
    if isinstance(given, list) and all(type(item) is int and 0 <= item < 256 for item in given):
        return bytes(given)
    token = row.get("token")
    return token.encode("utf-8", "replace") if isinstance(token, str) else None
