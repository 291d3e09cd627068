"""A short measurement at start, so that load reports rest on this machine and this model from the first request on."""

import time
from typing import Final

from appliance.errors import EngineFailed
from appliance.llamacpp.context import LlamaContext
from appliance.llamacpp.model import LlamaModel
from appliance.llamacpp.rates import Rates

_PROBE_TOKENS: Final = 16
_PREFILL_TOKENS: Final = 256
_PREFILL_SECONDS: Final = 0.15
_DECODE_SECONDS: Final = 0.03
"""For each number of sequences, but always two steps."""
_DECODE_SEQUENCES: Final = (1, 4, 8, 32)
_ALL_SECONDS: Final = 0.4
"""When so much is used up, what is left to measure is left to the first requests."""


def measure(model: LlamaModel, rates: Rates) -> None:
    """Fill `rates` in less than half a second, or in five steps where a model takes longer than that for these.

    Prefill on up to 256 tokens, decoding at 1, 4, 8 and 32 sequences. Leaves the model's memory empty.
    """
    began = time.perf_counter()
    _prefill(model, _PROBE_TOKENS)  # touches the weights for the first time: not measured
    probe = _prefill(model, _PROBE_TOKENS)
    affordable = int(_PREFILL_SECONDS / probe * _PROBE_TOKENS)
    tokens = max(_PROBE_TOKENS, min(_PREFILL_TOKENS, affordable, model.batch.capacity_tokens, model.context_tokens))
    rates.observe_prefill(tokens, _prefill(model, tokens), weight=1.0)
    for sequences in _DECODE_SEQUENCES:
        if sequences in rates.buckets and (sequences == 1 or time.perf_counter() - began < _ALL_SECONDS):
            rates.observe_decode(sequences, _decode(model, sequences), weight=1.0)
    model.memory_clear()


def _prefill(model: LlamaModel, tokens: int) -> float:
    model.batch.clear()
    model.batch.add([position % model.vocabulary_size for position in range(tokens)], 0, 0, last_output=True)
    seconds = _run(model, model)
    model.memory_clear()
    return seconds


def _decode(model: LlamaModel, sequences: int) -> float:
    """Seconds of one step, the quickest of a few: what disturbs a measurement only ever makes it longer."""
    where = model.lanes if model.lanes is not None and sequences > 1 else model
    times: list[float] = []
    while sum(times) < _DECODE_SECONDS or len(times) < 2:
        where.batch.clear()
        where.batch.add_each([1] * sequences, [len(times)] * sequences, list(range(sequences)))
        times.append(_run(model, where))
    where.memory_clear()
    return min(times)


def _run(model: LlamaModel, context: LlamaContext) -> float:
    began = time.perf_counter()
    code = context.decode()
    if code:
        raise EngineFailed(f"the first decode failed with {code}: {model.last_words()}")
    _ = context.rows  # waits for the result
    return time.perf_counter() - began
