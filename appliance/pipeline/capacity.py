"""When an engine could begin and finish one more request: own ledger x measured rates; gauges only correct. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from appliance.core import EngineLoad, EngineView

STALE_SECONDS: Final = 5.0
"""A view older than this is not believed: the engine counts as not ready, never as free."""

BACKLOG_SEQUENCES: Final = 2
"""Beyond its sequences an engine gets this many more, so that it never idles between two; the rest waits here, where it
can be put in order and can still go elsewhere."""

_CHUNK_TOKENS: Final = 256
"""Prompt tokens an engine computes between two steps of the sequences it is writing."""

_PRIOR_PREFILL: Final = 100.0
_PRIOR_DECODE: Final = 10.0
"""Tokens/s before an engine has measured itself: a slow machine, so that nothing is promised that was not seen."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """What this router has given to one target and not got back yet, and what waits here for it. All are sums."""

    sequences: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    """Of requests whose first token has not come."""
    waiting_prompt_tokens: int = 0
    output_tokens: int = 0
    """Still to be written at most, by all in flight."""
    waiting_output_tokens: int = 0
    kv_tokens: int = 0
    """Prompt and output of all in flight: the cells they may come to hold."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """`first_byte_seconds` is to the first token, streamed or not: that is what a latency budget is about."""

    first_byte_seconds: float
    finish_seconds: float
    fits_kv: bool
    ready: bool
    reason: str
    can_enter: bool = True
    """Whether the engine should be given one more now, or it should wait here."""


NOT_PREDICTED: Final = Prediction(0.0, 0.0, fits_kv=True, ready=True, reason="not predicted")
"""For targets that are not engines of this node: assumed to keep the budget; breakers tell when they do not."""


def predict(
    view: EngineView | None,
    inflight: InFlight,
    *,
    prompt_tokens: int,
    output_tokens: int,
    now: float,
    not_before: float = 0.0,
) -> Prediction:
    """What one more request would meet. `not_before`: views seen up to then are not believed (we know better since)."""
    problem = _not_ready(view, now, not_before)
    if view is None or view.load is None or problem:
        return Prediction(0.0, 0.0, fits_kv=False, ready=False, reason=problem, can_enter=False)
    load = view.load
    capacity = max(1, load.sequences_capacity)
    ahead = inflight.sequences + inflight.waiting
    running = max(inflight.sequences, load.running_sequences)
    fits = _fits_kv(load, inflight, prompt_tokens + output_tokens)
    wait = 0.0 if fits and ahead < capacity else _wait_for_a_place(load, inflight, ahead, capacity)
    # own ledger first; the engine's own queue counts where it knows of more than we do
    queued = max(inflight.prompt_tokens, load.queued_prompt_tokens) + inflight.waiting_prompt_tokens
    prefill = _prefill_seconds(load, queued + prompt_tokens, min(running, capacity))
    first_byte = wait + prefill
    together = min(ahead + 1, capacity)
    finish = first_byte + output_tokens / (decode_rate(load.decode_tokens_per_second, together) / together)
    reason = f"{queued + prompt_tokens} prompt tokens to compute, {ahead} of {capacity} sequences taken"
    if not fits:
        reason += f", KV cache full ({load.kv_capacity_tokens} tokens)"
    can_enter = inflight.sequences < capacity + BACKLOG_SEQUENCES and (fits or inflight.sequences == 0)
    return Prediction(first_byte, finish, fits, ready=True, reason=reason, can_enter=can_enter)


def _not_ready(view: EngineView | None, now: float, not_before: float) -> str:
    if view is None:
        return "no engine is known for it"
    if view.state != "ready":
        return f"engine {view.state}" + (f" ({view.reason})" if view.reason else "")
    if view.load is None:
        return "the engine has not told its load yet"
    if now - view.seen > STALE_SECONDS:
        return f"nothing was heard from the engine for {now - view.seen:.0f} s"
    if view.seen <= not_before:
        return "the engine has just failed to answer"
    return ""


def _fits_kv(load: EngineLoad, inflight: InFlight, tokens: int) -> bool:
    held = max(inflight.kv_tokens, load.kv_used_tokens)
    return held + tokens <= load.kv_capacity_tokens


def _wait_for_a_place(load: EngineLoad, inflight: InFlight, ahead: int, capacity: int) -> float:
    """Seconds until so many have finished that one more finds a sequence.

    `n` sequences with `left` tokens between them finish one after another, on average spread evenly over twice the mean
    time; those behind the first `capacity` come in further rounds of the same length.
    """
    busy = min(max(1, ahead), capacity)
    left = max(inflight.output_tokens + inflight.waiting_output_tokens, load.remaining_output_tokens)
    rate = decode_rate(load.decode_tokens_per_second, busy)
    rounds_left = left / rate
    behind = ahead - capacity + 1
    if behind <= 0:  # a sequence is free but the cache is full: somebody has to finish
        behind = 1
    return min(rounds_left * 2 * behind / (busy + 1), rounds_left)


def _prefill_seconds(load: EngineLoad, tokens: int, running: int) -> float:
    """Computing prompts, with one step of the running sequences between two chunks."""
    seconds = tokens / (load.prefill_tokens_per_second or _PRIOR_PREFILL)
    if running:
        steps = -(-tokens // _CHUNK_TOKENS)
        seconds += steps * running / decode_rate(load.decode_tokens_per_second, running)
    return seconds


def decode_rate(measured: Mapping[int, float], sequences: int) -> float:
    """Tokens/s over `sequences` running together, between the nearest measured numbers of sequences."""
    points = sorted((count, rate) for count, rate in measured.items() if rate > 0)
    if not points:
        return _PRIOR_DECODE
    below = [point for point in points if point[0] <= sequences]
    above = [point for point in points if point[0] >= sequences]
    if not below:
        # fewer sequences than ever measured: each at the same speed at least
        return above[0][1] * max(1, sequences) / above[0][0]
    if not above:
        return below[-1][1]
    (low, low_rate), (high, high_rate) = below[-1], above[0]
    if low == high:
        return low_rate
    return low_rate + (high_rate - low_rate) * (sequences - low) / (high - low)


class TokenRatios:
    """How far our token estimates are off, per target, learned from the usage that targets report.

    No tokenizer of ours counts for a hosted model, so the estimate is corrected by experience instead of trusted.
    """

    _LEARNING: Final = 0.05
    _FIRST: Final = 1.2
    """Until something was learned, estimates are raised by a fifth: too few tokens promise too much."""
    _ENOUGH: Final = 3

    def __init__(self) -> None:
        self._ratios: dict[str, tuple[float, int]] = {}

    def correct(self, target: str, estimated_tokens: int) -> int:
        ratio, _ = self._ratios.get(target, (self._FIRST, 0))
        return max(1, round(estimated_tokens * ratio))

    def at_least(self, target: str, estimated_tokens: int) -> int:
        """What the true count is hardly ever below, to refuse by: half the estimate, or a bit under the learned one."""
        ratio, seen = self._ratios.get(target, (self._FIRST, 0))
        return int(estimated_tokens * (ratio * 0.7 if seen >= self._ENOUGH else 0.5))

    def learn(self, target: str, estimated_tokens: int, reported_tokens: int) -> None:
        """Short prompts teach nothing: the chat template outweighs them."""
        if estimated_tokens < 20 or reported_tokens <= 0:
            return
        new = min(max(reported_tokens / estimated_tokens, 0.25), 6.0)
        ratio, seen = self._ratios.get(target, (new, 0))
        weight = max(self._LEARNING, 1 / (seen + 1))
        self._ratios[target] = (ratio + (new - ratio) * weight, seen + 1)
