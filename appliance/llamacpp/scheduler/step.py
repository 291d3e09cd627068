"""One step at a time: admit, compute the slots, fill the batch with the rest, decode, read the rows, report.

Owned by one thread. `sequence_manager` says which sequences run, `scheduler` decides, `kv_allocator` moves sequences,
`labels.scorer` computes labels, `decode_meter` runs and times each decode.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import Final

from appliance.errors import EngineFailed
from appliance.llamacpp.batch import DecodeBatch
from appliance.llamacpp.context import ABORTED, NO_KV_ROOM, Rows
from appliance.llamacpp.decode.sampling import find_row_maxima
from appliance.llamacpp.decode.sequence import Sequence
from appliance.llamacpp.decode.speculation import SpeculationPlanner
from appliance.llamacpp.decode.token_commit import commit_tokens
from appliance.llamacpp.engine_protocol import EngineLoadReport
from appliance.llamacpp.labels.jobs import LabelJob
from appliance.llamacpp.model import LlamaModel
from appliance.llamacpp.rates import Rates
from appliance.llamacpp.scheduler.decode_meter import DecodeMeter
from appliance.llamacpp.scheduler.scheduler import (
    BACKGROUND_AFTER_SECONDS,
    IDLE_PRIORITY,
    allot_prompt_tokens,
    find_urgent_priority,
    limit_cached_tokens,
    plan_prefill_chunks,
    plan_step_tokens,
)
from appliance.llamacpp.scheduler.sequence_manager import Chunk, SequenceManager

STEP_SECONDS: Final = 0.2
"""About what prompts and labels may take of a step while a stream is read. Shorter steps compute prompts in
batches that waste the matrix kernels, and generate with few sequences at once while the others' prompts wait: with 0.1
the CPU time for 32 answers of 128 tokens to prompts of 156 was 4 % more."""
_FATAL_FAILURES: Final = 3
"""So many failed steps in a row mean that it is not the requests' fault."""
_PREFILL_OBSERVED: Final = 32
"""Steps that compute fewer prompt tokens say little about the prefill rate."""
_RUN_TOKENS: Final = 16
"""So many tokens that had no choice come with the next one; longer runs are computed as prompts are."""


@dataclass(slots=True)
class StepResult:
    """What one step brought: sequences with new events or an end, and calls that are answered."""

    sequences: list[Sequence] = field(default_factory=list)
    jobs: list[LabelJob] = field(default_factory=list)


class StepRunner:
    """All work of one model: sequences that generate, and label calls."""

    def __init__(
        self,
        model: LlamaModel,
        *,
        step_seconds: float = STEP_SECONDS,
        batch_tokens: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.batch = model, model.batch
        self.rates = Rates(model.sequences)
        self._speculation = SpeculationPlanner(self.rates)
        self._meter = DecodeMeter(model, clock)
        self._clock, self._step_seconds = clock, step_seconds
        self._last_urgent_seconds = float("-inf")
        """When something that cannot wait ran last."""
        self._forced_run_tokens = min(_RUN_TOKENS, model.batch.capacity_tokens // (2 * model.sequences))
        self._batch_tokens = min(batch_tokens or model.batch.capacity_tokens, model.batch.capacity_tokens)
        self._manager = SequenceManager(model)
        self._kv, self._running = self._manager.kv, self._manager.running
        self._suspects, self._label_scorer = self._manager.suspects, self._manager.label_scorer
        self._result = StepResult()
        self._failures = 0
        self.in_step: frozenset[Sequence | LabelJob] = frozenset()
        """Whose prompts and labels are being computed. Read by the event loop's thread, to abort it."""

    # What comes in, between steps.

    def submit(self, sequence: Sequence) -> None:
        self._manager.submit(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence now and free its cells; harmless when it has ended already."""
        if sequence.finished is not None:
            return
        sequence.finish("cancelled")
        if sequence.running:
            self._retire(sequence)
        else:
            self._manager.wait_queue.remove(sequence)
            self._result.sequences.append(sequence)

    def submit_labels(self, job: LabelJob) -> None:
        self._label_scorer.queue.add(job)

    def cancel_labels(self, job: LabelJob) -> None:
        """Drop what is left of a call."""
        self._label_scorer.cancel(job)

    @property
    def idle(self) -> bool:
        return not (self._running or len(self._manager.wait_queue) or self._label_scorer.busy or self._result.sequences)

    # One step.

    def run_step(self) -> StepResult:
        """Do one step's work; give everything that changed since the last one."""
        self._meter.begin()
        self._update_urgency()
        self._manager.admit_waiting()
        self._update_urgency()
        if self._step_slots():
            self._step_shared()
        waiting = self._label_scorer.queue.waiting_tokens + sum(one.pending for one in self._running if one.slot < 0)
        crowded = len(self._manager.wait_queue) > 0 or waiting > self._batch_tokens
        kept = max(
            limit_cached_tokens(self.model.context_tokens, crowded), self._label_scorer.touch_expected_prefixes()
        )
        self._manager.prefix_cache.evict(self._manager.prefix_cache.evictable_tokens - kept)
        self._result.jobs = self._label_scorer.queue.take_answered()
        result, self._result = self._result, StepResult()
        return result

    def _update_urgency(self) -> None:
        self._manager.urgent_priority = find_urgent_priority(
            (one.request.priority for one in self._running), self._label_scorer.priority
        )
        if self._manager.urgent_priority <= 0:
            self._last_urgent_seconds = self._clock()

    def _step_slots(self) -> bool:
        """The next token of every sequence in a slot. False when that failed and the step is over."""
        self._manager.assign_slots()
        slots, sequences = self.model.slots, self._manager.select_runnable(list(self._kv.in_slots))
        if slots is None or not sequences:
            return True
        slots.batch.clear()
        _add_next_tokens(slots.batch, sequences)
        code, seconds = self._meter.decode(slots)
        if code:
            self._recover(code, sequences)
            return False
        self._failures = 0
        self._meter.decode_tokens += len(sequences)
        self.rates.observe_decode(len(sequences), seconds)
        self._read_decoding(sequences, slots.rows)
        return True

    def _step_shared(self) -> None:
        """The next tokens of those in the shared memory, pieces of prompts, and labels."""
        decoding = self._manager.select_runnable(
            [one for one in self._running if one.slot < 0 and self._is_decoding(one)]
        )
        chunks = self._fill(decoding)
        if not self.batch.size:
            return
        with_labels = self._label_scorer.in_step
        self.in_step = frozenset((*decoding, *(sequence for sequence, _ in chunks), *with_labels))
        code, seconds = self._meter.decode(self.model)
        self.in_step = frozenset()
        if code:
            self._recover(code, [*decoding, *(sequence for sequence, _ in chunks)])
            return
        self._failures = 0
        next_tokens, accepted = sum(sequence.pending for sequence in decoding), self._speculation.accepted_total
        decoded = next_tokens + sum(len(sequence.draft) for sequence in decoding)
        prefilled = self.batch.size - decoded
        self._meter.prefill_tokens += prefilled
        row = self._read_decoding(decoding, self.model.rows)
        self._label_scorer.read_rows(self._read_prefilled(chunks, row))
        self._meter.decode_tokens += next_tokens + self._speculation.accepted_total - accepted
        if decoded and not prefilled:
            self.rates.observe_decode(decoded, seconds)
        elif prefilled >= _PREFILL_OBSERVED and not decoded:
            self.rates.observe_prefill(prefilled, seconds)

    def _fill(self, decoding: list[Sequence]) -> list[Chunk]:
        """Put the step into the batch: the next token of each that generates, then pieces of prompts, then labels."""
        batch, scorer = self.batch, self._label_scorer
        batch.clear()
        next_tokens = sum(sequence.pending for sequence in decoding)
        budget = plan_step_tokens(
            self._batch_tokens,
            next_tokens,
            sum(sequence.request.streamed for sequence in (*decoding, *self._kv.in_slots)),
            self.rates.prefill_tokens_per_second,
            self._step_seconds,
            can_wait=0 < self._manager.urgent_priority < IDLE_PRIORITY
            and self._clock() - self._last_urgent_seconds < BACKGROUND_AFTER_SECONDS,
        )
        prefilling = self._manager.select_runnable(
            [one for one in self._running if one.slot < 0 and not self._is_decoding(one)]
        )
        pending = sum(sequence.pending for sequence in prefilling)
        urgent = min((sequence.request.priority for sequence in prefilling), default=0)
        for_prompts = allot_prompt_tokens(
            budget - next_tokens, pending, urgent, scorer.queue.waiting_tokens, scorer.priority
        )
        chunks = plan_prefill_chunks(prefilling, for_prompts, batch.outputs_max - len(decoding))
        chunks = self._manager.free_cells_for_step(decoding, chunks)
        self._plan_drafts(decoding, chunks)
        _add_next_tokens(batch, decoding)
        for sequence, tokens in chunks:
            _add_run(batch, sequence, tokens)
        if not self._suspects:
            scorer.fill_batch(
                max(0, budget - batch.size), alone=not self._running, urgent=self._manager.urgent_priority
            )
        return chunks

    def _is_decoding(self, sequence: Sequence) -> bool:
        """Whether it generates: its next tokens come first in a step, whatever prompts there are."""
        return sequence.pending == 1 or (sequence.generated > 0 and sequence.pending <= self._forced_run_tokens)

    def _plan_drafts(self, decoding: list[Sequence], chunks: list[Chunk]) -> None:
        """Where rows and cells are left for them, and every sequence's memory can be cut."""
        writing = [*decoding, *(sequence for sequence, tokens in chunks if tokens == sequence.pending)]
        tokens = sum(sequence.pending for sequence in decoding) + sum(tokens for _, tokens in chunks)
        room = min(
            self.batch.outputs_max - len(writing),
            self.batch.capacity_tokens - tokens,
            self._manager.count_unused_cells() - tokens,
        )
        has_readers = any(sequence.request.streamed for sequence in (*writing, *self._kv.in_slots))
        self._speculation.plan_drafts(
            writing, room if self.model.forkable and not self._suspects else 0, has_readers=has_readers
        )

    # Generating.

    def _read_decoding(self, decoding: list[Sequence], rows: Rows) -> int:
        """Take what the rows of `decoding` say; give the first row that is not theirs."""
        wanted = sum(1 + len(sequence.draft) for sequence in decoding)
        best = find_row_maxima(rows[:wanted]) if any(one.sampler.plain_greedy for one in decoding) else ()
        row = 0
        for sequence in list(decoding):  # slots close up when one of them ends
            after = row + 1 + len(sequence.draft)
            self._commit(sequence, rows[row:after], best[row:after])
            row = after
        return row

    def _read_prefilled(self, chunks: list[Chunk], row: int) -> int:
        for sequence, tokens in chunks:
            sequence.computed += tokens
            if sequence.computed == sequence.length:
                if sequence.shared < sequence.prompt_length:
                    self._kv.cache_prefix(sequence, sequence.length)
                rows = self.model.rows[row : row + 1 + len(sequence.draft)]
                row += len(rows)
                self._commit(sequence, rows, find_row_maxima(rows) if sequence.sampler.plain_greedy else ())
        return row

    def _commit(self, sequence: Sequence, rows: Rows, best: Ordered[int]) -> None:
        self._speculation.accepted_total += commit_tokens(sequence, rows, best, self.model)
        if sequence.finished is not None:
            self._retire(sequence)
        else:
            self._result.sequences.append(sequence)
        if self._suspects and sequence is self._suspects[0]:
            self._suspects.popleft()

    def _retire(self, sequence: Sequence) -> None:
        """Take a finished sequence out; its tokens stay cached where they are whole."""
        assert sequence.finished is not None
        if sequence.finished.reason in ("stop", "length"):
            self._kv.cache_computed(sequence, self._manager.count_unused_cells())
        self._manager.remove(sequence)
        self._result.sequences.append(sequence)

    # Room, and what happens when a step fails.

    def _recover(self, code: int, sequences: list[Sequence]) -> None:
        """A decode failed. What was alone in it ends; of several, it is unknown which it was, so they try one by one.

        All others are put back too and begin again with empty memory; they lose nothing but time.
        """
        for sequence in sequences:
            sequence.draft = []
        if code == ABORTED:
            self._resume_after_abort(sequences)
            return
        self._failures += 1
        if code == NO_KV_ROOM and self._failures == 1 and self._manager.prefix_cache.evict(self.model.context_tokens):
            return  # nothing changed in memory: the same step comes again with the cache gone
        reason = f"llama_decode failed with {code}: {self.model.last_log_lines()}"
        alone = len(sequences) + len(self._label_scorer.in_step) == 1
        self._suspects.clear()
        self._label_scorer.recover(reason, alone=alone)
        for sequence in sequences:
            if alone:
                sequence.finish("error", reason)
                self._retire(sequence)
            else:
                self._suspects.append(sequence)
        for sequence in list(self._running):
            self._manager.preempt(sequence)
        self.model.memory_clear()
        self._manager.prefix_cache.clear()
        if self._failures >= _FATAL_FAILURES:
            raise EngineFailed(f"{self._failures} steps failed in a row; the last: {reason}")

    def _resume_after_abort(self, sequences: list[Sequence]) -> None:
        """A decode was given up, since nothing in it was wanted any more; what still is comes again.

        llama.cpp takes the cells of an aborted batch back. Label forks share cells, so they begin anew.
        """
        self.model.clear_abort()
        if self._label_scorer.in_step:
            self._label_scorer.requeue_window()
        for sequence in sequences:
            if self._kv.count_held_positions(sequence) != sequence.computed:
                self._manager.preempt(sequence)

    def report_load(self) -> EngineLoadReport:
        """The state as of now, between two steps."""
        return self._meter.report_load(self._manager, self.rates, self._speculation)


def _add_next_tokens(batch: DecodeBatch, sequences: list[Sequence]) -> None:
    """What each still has to compute, and its draft. Most have a single token, and those go in all at once."""
    if any(sequence.draft or sequence.pending > 1 for sequence in sequences):
        for sequence in sequences:
            _add_run(batch, sequence, sequence.pending)
    elif sequences:
        batch.add_each(
            [int(sequence.tokens[sequence.computed]) for sequence in sequences],
            [sequence.computed for sequence in sequences],
            [sequence.slot if sequence.slot >= 0 else sequence.id for sequence in sequences],
        )


def _add_run(batch: DecodeBatch, sequence: Sequence, tokens: int) -> None:
    """The next `tokens` of a sequence, and its draft where they are its last."""
    start, stop = sequence.computed, sequence.computed + tokens
    last = stop == sequence.length
    drafted = len(sequence.draft) if last else 0
    run = sequence.tokens[start : stop + drafted]
    batch.add(run, start, sequence.id, last_output=last, before_last=drafted)
