"""How fast this engine is: measured values, corrected by every busy step, and what follows from them."""

import time
from collections.abc import Mapping
from typing import Final

from appliance.errors import EngineFailed
from appliance.llamacpp.context import LlamaContext
from appliance.llamacpp.model import LlamaModel

_WEIGHT: Final = 0.1
"""Share of a new observation in the running average: about the last twenty steps count."""
_BUCKETS: Final = (1, 4, 8, 16, 32, 64, 128)
_PROBE_TOKENS: Final = 16
_PREFILL_TOKENS: Final = 256
_PREFILL_SECONDS: Final = 0.15
_DECODE_SECONDS: Final = 0.03
"""For each number of sequences, but always two steps."""
_DECODE_SEQUENCES: Final = (1, 4, 8, 32)
_ALL_SECONDS: Final = 0.4
"""When so much is used up, what is left to measure is left to the first requests."""


class Rates:
    """Prefill and decode tokens per second. A rate that was not measured is 0, never a guess."""

    def __init__(self, sequences: int) -> None:
        self.prefill_tokens_per_second = 0.0
        self._decode: dict[int, float] = dict.fromkeys([n for n in _BUCKETS if n < sequences] + [sequences], 0.0)

    @property
    def buckets(self) -> tuple[int, ...]:
        return tuple(self._decode)

    @property
    def decode_tokens_per_second(self) -> Mapping[int, float]:
        """By number of sequences, over all of them together; only what was measured."""
        return {count: rate for count, rate in self._decode.items() if rate > 0}

    def observe_prefill(self, tokens: int, seconds: float, weight: float = _WEIGHT) -> None:
        self.prefill_tokens_per_second = _blend(self.prefill_tokens_per_second, tokens / seconds, weight)

    def observe_decode(self, sequences: int, seconds: float, weight: float = _WEIGHT) -> None:
        """Correct the bucket nearest to `sequences` (in ratio) by what one step of that many took.

        Each row of a step counts as a sequence; steps of more than there can be correct the last bucket.
        """
        most = max(self._decode)
        if sequences > most:
            row = self.row_seconds(most)
            if row is None:
                return
            seconds, sequences = seconds * most / (most + (sequences - most) * row[0] / row[1]), most
        nearest = min(self._decode, key=lambda count: max(count, sequences) / min(count, sequences))
        known, seen = self._decode[nearest], sequences / seconds
        if known > 0 and nearest != sequences:
            # Carry the ratio over, so that steps of 5 do not drag the rate at 4 towards the rate at 5.
            seen = known * seen / self.decode_at(sequences)
        self._decode[nearest] = _blend(known, seen, weight)

    def decode_at(self, sequences: int) -> float:
        """Tokens per second at any number of sequences, between the measured ones by straight lines; 0: unknown."""
        known = sorted(self.decode_tokens_per_second.items())
        if not known:
            return 0.0
        below = [pair for pair in known if pair[0] <= sequences]
        above = [pair for pair in known if pair[0] >= sequences]
        if not below:
            return above[0][1] * sequences / above[0][0]
        if not above:
            return below[-1][1]
        (low, low_rate), (high, high_rate) = below[-1], above[0]
        share = (sequences - low) / (high - low) if high > low else 0.0
        return low_rate + share * (high_rate - low_rate)

    def row_seconds(self, rows: int) -> tuple[float, float] | None:
        """What one row more adds to a decode step of `rows`, and what each of its rows takes on average.

        The first is what a prompt's token takes: so it was within a tenth for five variants of SmolLM2-135M, and it is
        measured more steadily than the difference of two steps. None while one of them is unknown.
        """
        decode = self.decode_at(rows)
        if not decode or not self.prefill_tokens_per_second:
            return None
        return min(1.0 / self.prefill_tokens_per_second, 1.0 / decode), 1.0 / decode

    def seconds_for(self, prompt_tokens: int, output_tokens: int, sequences: int) -> float | None:
        """Time for that much work at full concurrency; None while a rate it needs is unknown."""
        decode = self.decode_at(max(1, sequences))
        if (prompt_tokens and not self.prefill_tokens_per_second) or (output_tokens and not decode):
            return None
        seconds = prompt_tokens / self.prefill_tokens_per_second if prompt_tokens else 0.0
        return seconds + (output_tokens / decode if output_tokens else 0.0)


def _blend(known: float, seen: float, weight: float) -> float:
    return seen if known <= 0 else known + weight * (seen - known)


def measure_first_rates(model: LlamaModel, rates: Rates) -> None:
    """Fill `rates` in less than half a second, or in five steps where a model takes longer than that for these.

    Prefill on up to 256 tokens, decoding at 1, 4, 8 and 32 sequences. Leaves the model's memory empty.
    """
    began = time.perf_counter()
    _prefill_once(model, _PROBE_TOKENS)  # touches the weights for the first time: not measured
    probe = _prefill_once(model, _PROBE_TOKENS)
    affordable = int(_PREFILL_SECONDS / probe * _PROBE_TOKENS)
    tokens = max(_PROBE_TOKENS, min(_PREFILL_TOKENS, affordable, model.batch.capacity_tokens, model.context_tokens))
    rates.observe_prefill(tokens, _prefill_once(model, tokens), weight=1.0)
    for sequences in _DECODE_SEQUENCES:
        if sequences in rates.buckets and (sequences == 1 or time.perf_counter() - began < _ALL_SECONDS):
            rates.observe_decode(sequences, _decode(model, sequences), weight=1.0)
    model.memory_clear()


def run_prefill(model: LlamaModel, tokens: int) -> float:
    """Seconds that a prompt of `tokens` takes in one batch. The memory holds it afterwards, as sequence 0."""
    model.batch.clear()
    model.batch.add([position % model.vocabulary_size for position in range(tokens)], 0, 0, last_output=True)
    return run_batch(model, model)


def run_batch(model: LlamaModel, context: LlamaContext) -> float:
    """Seconds of one decode, its result awaited. Raises EngineFailed."""
    began = time.perf_counter()
    code = context.decode()
    if code:
        raise EngineFailed(f"a decode failed with {code} while measuring: {model.last_log_lines()}")
    _ = context.rows  # waits for the result
    return time.perf_counter() - began


def _prefill_once(model: LlamaModel, tokens: int) -> float:
    seconds = run_prefill(model, tokens)
    model.memory_clear()
    return seconds


def _decode(model: LlamaModel, sequences: int) -> float:
    """Seconds of one step, the quickest of a few: what disturbs a measurement only ever makes it longer."""
    where = model.slots if model.slots is not None and sequences > 1 else model
    times: list[float] = []
    while sum(times) < _DECODE_SECONDS or len(times) < 2:
        where.batch.clear()
        where.batch.add_each([1] * sequences, [len(times)] * sequences, list(range(sequences)))
        times.append(run_batch(model, where))
    where.memory_clear()
    return min(times)
