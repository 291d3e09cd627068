"""When an engine could begin and finish one more request: own ledger x measured rates; gauges only correct. Pure."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from appliance.core import EngineLoad, EngineStatus
from appliance.engines.rates import interpolate_decode_rate

STALE_SECONDS: Final = 5.0
"""A view older than this is not believed: the engine counts as not ready, never as free."""

BACKLOG_SEQUENCES: Final = 2
"""Beyond its sequences an engine gets this many more, so that it never idles between two; the rest waits here, where it
can be put in order and can still go elsewhere."""

UNHARMED: Final = 1.1
"""By how much work that can wait may slow down what cannot."""

_STEP_SECONDS: Final = 0.15
_LEAST_CHUNK_TOKENS: Final = 64
"""An engine that is writing computes prompts in pieces of about this long, but not smaller ones, between two tokens."""

_PRIOR_PREFILL: Final = 100.0
"""Tokens/s before an engine has measured itself: a slow machine, so that nothing is promised that was not seen."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """What this router has given to one target and not got back yet, and what waits here for it. All are sums."""

    sequences: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    """Still to be computed, of requests whose first token has not come."""
    waiting_prompt_tokens: int = 0
    output_tokens: int = 0
    """Still to be written, as far as can be told, by all in flight."""
    waiting_output_tokens: int = 0
    kv_tokens: int = 0
    """Prompt and output of all in flight: the cells they may come to hold."""
    outputs: tuple[int, ...] | None = None
    """What each in flight has still to write; None: spread evenly."""
    waiting_outputs: tuple[int, ...] | None = None
    at_view: "InFlight | None" = None
    """What was in flight when the engine's gauges were read: what they show beyond that is not ours."""


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


def predict_latency(
    view: EngineStatus | None,
    inflight: InFlight,
    *,
    prompt_tokens: int,
    output_tokens: int,
    now: float,
    not_before: float = 0.0,
    kv_tokens: int | None = None,
    reserved: float = 0.0,
) -> Prediction:
    """What one more request would meet.

    `prompt_tokens` are those that have to be computed, `output_tokens` those expected to be written; `kv_tokens` the
    cells it may come to hold where that is more. `not_before`: views seen up to then are not believed (we know better
    since). `reserved`: the share of sequences and cells that this request must leave free for others.
    """
    problem = _not_ready(view, now, not_before)
    if view is None or view.load is None or problem:
        return Prediction(0.0, 0.0, fits_kv=False, ready=False, reason=problem, can_enter=False)
    load, others = view.load, _not_ours(view.load, inflight)
    capacity = max(1, load.sequences_capacity)
    kept = max(1, int(capacity * reserved)) if reserved else 0
    open_to_it = max(1, capacity - kept)
    cells = prompt_tokens + output_tokens if kv_tokens is None else kv_tokens
    missing = inflight.kv_tokens + others.kv_tokens + cells - int(load.kv_capacity_tokens * (1 - reserved))
    inside = inflight.sequences
    ahead = inside + inflight.waiting
    machine = _Machine(load, min(inside + others.sequences, capacity), inflight.prompt_tokens + others.prompt_tokens)
    wait = 0.0
    if missing > 0 or ahead >= open_to_it:
        wait = machine.wait_seconds(inflight, load, open_to_it, missing)
    first_byte = machine.first_byte_seconds(wait, inflight.waiting_prompt_tokens, prompt_tokens)
    finish = first_byte + output_tokens * machine.seconds_per_token(min(ahead + 1, capacity))
    tokens = machine.prompt_tokens + inflight.waiting_prompt_tokens + prompt_tokens
    reason = f"{tokens} prompt tokens to compute, {ahead} of {capacity} sequences taken"
    if missing > 0:
        reason += f", KV cache full ({load.kv_capacity_tokens} tokens)"
    room = open_to_it + (0 if reserved else BACKLOG_SEQUENCES)
    can_enter = inside < room and (missing <= 0 or inside == 0)
    return Prediction(first_byte, finish, missing <= 0, ready=True, reason=reason, can_enter=can_enter)


def batch_sequences_beside(load: EngineLoad, interactive: int) -> int:
    """How many sequences may run together, work that can wait included, beside so many that cannot.

    As many as slow none of those down by more than UNHARMED, by the engine's own measured rates: on a CPU, which is
    busy with one, that is hardly ever more than those themselves; a GPU has room for many.
    """
    capacity = max(1, load.sequences_capacity)
    if interactive <= 0:
        return capacity + BACKLOG_SEQUENCES
    rates = load.decode_tokens_per_second
    slowest = UNHARMED * interactive / interpolate_decode_rate(rates, interactive)
    room = interactive
    while room < capacity and (room + 1) / interpolate_decode_rate(rates, room + 1) <= slowest:
        room += 1
    return room


def _not_ours(load: EngineLoad, inflight: InFlight) -> InFlight:
    """What the engine's gauges showed beyond what we had given it when they were read.

    Our own ledger is exact and at once, a gauge is late: so it never makes an engine look emptier than the ledger says,
    and what has left since it was read is not counted again.
    """
    ours = inflight if inflight.at_view is None else inflight.at_view
    return InFlight(
        sequences=max(0, load.running_sequences - ours.sequences),
        prompt_tokens=max(0, load.queued_prompt_tokens - ours.prompt_tokens),
        kv_tokens=max(0, load.kv_used_tokens - ours.kv_tokens),
    )


@dataclass(frozen=True, slots=True)
class _Machine:
    """An engine at work: `running` sequences, and `prompt_tokens` of theirs still to be computed.

    Between two tokens of the running sequences it computes a piece of a prompt, if there is one.
    """

    load: EngineLoad
    running: int
    prompt_tokens: int

    def wait_seconds(self, inflight: InFlight, load: EngineLoad, capacity: int, missing_cells: int) -> float:
        """Until so many have finished that one more finds a sequence among `capacity`, and its cells."""
        outputs = inflight.outputs
        if outputs is None:
            outputs = _evenly(max(inflight.output_tokens, load.remaining_output_tokens), max(1, inflight.sequences))
        ends = sorted(self._writing_seconds(tokens) for tokens in outputs)
        for_cells = 0.0
        if missing_cells > 0 and ends:
            each = max(1.0, inflight.kv_tokens / len(ends))
            for_cells = ends[min(len(ends), math.ceil(missing_cells / each)) - 1]
        queue = inflight.waiting_outputs
        if queue is None:
            queue = _evenly(inflight.waiting_output_tokens, inflight.waiting)
        return max(for_cells, self._for_a_sequence(ends, queue, inflight, capacity))

    def _for_a_sequence(self, ends: list[float], queue: Sequence[int], inflight: InFlight, capacity: int) -> float:
        """Those who wait take the places as they become free, one after the other, and free them in turn."""
        free = capacity - len(ends)
        if free < 0:  # more inside than there is room for: the last ones are the engine's own queue
            ends = ends[-free:]
        heap = [0.0] * max(0, free) + ends
        heapq.heapify(heap)
        prompt = self.prefill_seconds(inflight.waiting_prompt_tokens // len(queue)) if queue else 0.0
        for tokens in queue:
            heapq.heapreplace(heap, heap[0] + prompt + tokens * self.seconds_per_token(capacity))
        return heap[0]

    def first_byte_seconds(self, wait: float, waiting_tokens: int, prompt_tokens: int) -> float:
        """Prompts ahead are computed while it waits; its own comes after them."""
        if wait == 0.0:
            return self.prefill_seconds(self.prompt_tokens + waiting_tokens + prompt_tokens)
        left = max(0.0, self.prefill_seconds(self.prompt_tokens) - wait)
        return wait + left + self.prefill_seconds(prompt_tokens)

    def prefill_seconds(self, tokens: int) -> float:
        """Computing prompts, with one step of the running sequences between two pieces."""
        seconds = tokens / self._prefill_rate
        return seconds + tokens / self._chunk * self.seconds_per_token(self.running) if self.running else seconds

    def seconds_per_token(self, running: int) -> float:
        """One step of so many sequences: each of them writes one token."""
        together = max(1, running)
        return together / interpolate_decode_rate(self.load.decode_tokens_per_second, together)

    def _writing_seconds(self, tokens: int) -> float:
        """Until one of the running sequences has written so many, slowed down while prompts are computed between."""
        between = min(tokens * self._chunk, self.prompt_tokens) / self._prefill_rate
        return tokens * self.seconds_per_token(self.running) + between

    @property
    def _prefill_rate(self) -> float:
        return self.load.prefill_tokens_per_second or _PRIOR_PREFILL

    @property
    def _chunk(self) -> float:
        return max(_LEAST_CHUNK_TOKENS, self._prefill_rate * _STEP_SECONDS)


def _evenly(total: int, count: int) -> tuple[int, ...]:
    """`total` over `count` sequences that began one after another: the next to finish is nearly done."""
    if count <= 0:
        return ()
    return tuple(round(total * 2 * (place + 1) / (count * (count + 1))) for place in range(count))


def _not_ready(view: EngineStatus | None, now: float, not_before: float) -> str:
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
