"""How fast a loaded model is: prompt tokens a second, and generated tokens a second by number of sequences.

Each figure is the median of short repeats within a time limit. Repeats in which our threads had to wait for a core are
left out while enough others are there; where they are not, the figure says that it was disturbed.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from appliance.llamacpp.calibrate.interference import InterferenceSample, InterferenceStopwatch
from appliance.llamacpp.model import LlamaModel
from appliance.llamacpp.rates import run_batch, run_prefill

SEQUENCES: Final = (8, 1, 4, 16, 32)
MOST_SEQUENCES: Final = max(SEQUENCES)
CONTEXT_TOKENS: Final = 2048
"""Enough for the longest measurement: a prefix, and every sequence's own tokens."""

PREFILL_TOKENS: Final = 512
_PREFIX_TOKENS: Final = 128
"""What stands before the generated tokens, shared by all sequences: attention costs as in small everyday use."""
_PROBE_TOKENS: Final = 16
_FEWEST_REPEATS: Final = 3
_MOST_REPEATS: Final = 40
_DISTURBED_SHARE: Final = 0.1
"""A repeat that lost more than this to waiting says more about the other programs than about the model."""


@dataclass(frozen=True, slots=True)
class SpeedSample:
    kind: Literal["prefill", "decode"]
    threads: int
    sequences: int
    """How many generated at once; 1 for prefill."""
    tokens_per_second: float
    """Over all sequences together, by the clock."""
    tokens_per_core_second: float
    """By the CPU time that was used: comparable between variants even where other programs held the cores."""
    repeats: int
    disturbed: bool
    waited_share: float | None
    """Median share of a repeat in which our threads were ready and waited for a core; None: not known here."""


def measure_prefill(model: LlamaModel, seconds: float) -> SpeedSample:
    """Read a prompt of up to 512 tokens, fewer where three times that would take longer than `seconds`."""
    _prefill(model, _PROBE_TOKENS)  # touches the weights for the first time: not measured
    stopwatch = InterferenceStopwatch()
    _prefill(model, _PROBE_TOKENS)
    affordable = int(seconds / _FEWEST_REPEATS / stopwatch.lap().seconds * _PROBE_TOKENS)
    tokens = max(_PROBE_TOKENS, min(PREFILL_TOKENS, affordable, model.batch.capacity_tokens))
    laps = _repeat(lambda _: _prefill(model, tokens), seconds, _MOST_REPEATS)
    return _figure("prefill", model.threads, 1, tokens, laps)


def measure_decode(model: LlamaModel, sequences: int, seconds: float) -> SpeedSample:
    """Generate with `sequences` at once, each one token a step, after a shared prefix."""
    start = _fork_prefix(model, sequences)
    room = (model.context_tokens - start) // sequences

    def step(number: int) -> None:
        model.batch.clear()
        model.batch.add_each([1] * sequences, [start + number] * sequences, list(range(sequences)))
        run_batch(model, model)

    step(0)  # the first one after a prompt still builds its graph
    laps = _repeat(lambda number: step(number + 1), seconds, min(_MOST_REPEATS, room - 1))
    model.memory_clear()
    return _figure("decode", model.threads, sequences, sequences, laps)


def _fork_prefix(model: LlamaModel, sequences: int) -> int:
    """Compute a prefix for all sequences; its length. Models whose memory cannot be shared do without."""
    model.memory_clear()
    if not model.forkable:
        return 0
    run_prefill(model, _PREFIX_TOKENS)
    for sequence in range(1, sequences):
        model.memory_copy(0, sequence, 0, _PREFIX_TOKENS)
    return _PREFIX_TOKENS


def _prefill(model: LlamaModel, tokens: int) -> None:
    model.memory_clear()
    run_prefill(model, tokens)


def _repeat(work: Callable[[int], None], seconds: float, most: int) -> list[InterferenceSample]:
    """Laps of `work(0)`, `work(1)` ... until `seconds` are over, at least three and at most `most`."""
    laps: list[InterferenceSample] = []
    stopwatch = InterferenceStopwatch()
    while len(laps) < most and (len(laps) < _FEWEST_REPEATS or sum(lap.seconds for lap in laps) < seconds):
        stopwatch.start()
        work(len(laps))
        laps.append(stopwatch.lap())
    return laps


def _figure(
    kind: Literal["prefill", "decode"], threads: int, sequences: int, tokens: int, laps: list[InterferenceSample]
) -> SpeedSample:
    known = [lap.waited_share for lap in laps if lap.waited_share is not None]
    quiet = [lap for lap in laps if lap.waited_share is None or lap.waited_share <= _DISTURBED_SHARE]
    disturbed = len(quiet) < _FEWEST_REPEATS
    used = laps if disturbed else quiet
    return SpeedSample(
        kind=kind,
        threads=threads,
        sequences=sequences,
        tokens_per_second=round(tokens / statistics.median(lap.seconds for lap in used), 2),
        tokens_per_core_second=round(tokens / max(1e-9, statistics.median(lap.cpu_seconds for lap in used)), 2),
        repeats=len(used),
        disturbed=disturbed,
        waited_share=round(statistics.median(known), 4) if known else None,
    )
