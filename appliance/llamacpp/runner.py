"""One step at a time: admit, fill the batch, decode, read it, tell.

Owned by one thread. Decisions lie in `scheduler`, what is cached in `prefix`, label work in `scoring`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from appliance.errors import EngineFailed
from appliance.llamacpp.labels import ScoreJob
from appliance.llamacpp.model import ABORTED, NO_KV_ROOM, Model
from appliance.llamacpp.params import Load, TokenEvent
from appliance.llamacpp.prefix import PrefixTree
from appliance.llamacpp.rates import Rates
from appliance.llamacpp.sampling import argmax_rows
from appliance.llamacpp.scheduler import (
    Line,
    Room,
    leads,
    promised_tokens,
    share_prefill,
    split_budget,
    step_budget,
    victim,
)
from appliance.llamacpp.scoring import Scorer
from appliance.llamacpp.sequence import Sequence

STEP_SECONDS: Final = 0.15
"""About the longest gap between two tokens of a stream while long prompts arrive; shorter steps waste prefill speed."""
_CACHED_SHARE: Final = 0.5
"""Share of the KV cells that unused prefixes may keep. Every cell slows attention a little for everybody: 7,000 idle
cells cost 20 % of decode speed on SmolLM2-135M."""
_FATAL_FAILURES: Final = 3
"""So many failed steps in a row mean that it is not the requests' fault."""
_PREFILL_OBSERVED: Final = 32
"""Steps that compute fewer prompt tokens say little about the prefill rate."""

Chunk = tuple[Sequence, int]


@dataclass(slots=True)
class Told:
    """What one step has to tell: sequences with new events or an end, and calls that are answered."""

    sequences: list[Sequence] = field(default_factory=list)
    jobs: list[ScoreJob] = field(default_factory=list)


class Runner:
    """All work of one model: sequences that generate, and label calls."""

    def __init__(
        self,
        model: Model,
        *,
        step_seconds: float = STEP_SECONDS,
        batch_tokens: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.batch = model, model.batch
        self.rates = Rates(model.sequences)
        self._clock, self._step_seconds = clock, step_seconds
        self._batch_tokens = min(batch_tokens or model.batch.capacity_tokens, model.batch.capacity_tokens)
        self._free_ids = list(range(model.sequence_ids))
        self._tree = PrefixTree(model, self._free_ids)
        self._line = Line()
        self._running: list[Sequence] = []
        self._scorer = Scorer(model, self._tree, self._free_ids, self._room)
        self._told = Told()
        self._failures = 0
        self.steps = self.prefill_tokens_total = self.decode_tokens_total = 0

    # What comes in, between steps.

    def submit(self, sequence: Sequence) -> None:
        self._line.push(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence now and free its cells; harmless when it has ended already."""
        if sequence.finished is not None:
            return
        if sequence.id < 0:
            self._line.remove(sequence)
            sequence.finish("cancelled")
            self._told.sequences.append(sequence)
        else:
            sequence.finish("cancelled")
            self._retire(sequence)

    def score(self, job: ScoreJob) -> None:
        self._scorer.add(job)

    def cancel_score(self, job: ScoreJob) -> None:
        """Drop what is left of a call."""
        self._scorer.cancel(job)

    @property
    def idle(self) -> bool:
        return not (self._running or len(self._line) or self._scorer.busy or self._told.sequences)

    # One step.

    def step(self) -> Told:
        """Do one step's work; give everything that changed since the last one."""
        began = self._clock()
        self._admit()
        decoding = [sequence for sequence in self._running if sequence.pending == 1]
        chunks = self._fill(decoding)
        if self.batch.size:
            self._compute(decoding, chunks, began)
        self._told.jobs = self._scorer.take_answered()
        told, self._told = self._told, Told()
        return told

    def _fill(self, decoding: list[Sequence]) -> list[Chunk]:
        """Put the step into the batch: the next token of each that generates, then pieces of prompts, then labels."""
        batch = self.batch
        batch.clear()
        budget = step_budget(
            self._batch_tokens, len(decoding), self.rates.prefill_tokens_per_second, self._step_seconds
        )
        prefilling = [sequence for sequence in self._running if sequence.pending > 1]
        pending = sum(sequence.pending for sequence in prefilling)
        for_prompts = split_budget(budget - len(decoding), pending, self._scorer.busy)
        chunks = share_prefill(prefilling, for_prompts, batch.outputs_max - len(decoding))
        chunks = self._make_room(decoding, chunks)
        if decoding:
            batch.add_each(
                [int(sequence.tokens[sequence.computed]) for sequence in decoding],
                [sequence.computed for sequence in decoding],
                [sequence.id for sequence in decoding],
            )
        for sequence, tokens in chunks:
            start, stop = sequence.computed, sequence.computed + tokens
            batch.add(sequence.tokens[start:stop], start, sequence.id, last_output=stop == sequence.length)
        self._scorer.fill(budget - batch.size, alone=not self._running)
        return chunks

    def _compute(self, decoding: list[Sequence], chunks: list[Chunk], began: float) -> None:
        code = self.model.decode()
        if code:
            self._recover(code, decoding, chunks)
            return
        self._failures = 0
        self.steps += 1
        prefilled = self.batch.size - len(decoding)
        self.decode_tokens_total += len(decoding)
        self.prefill_tokens_total += prefilled
        decoded = len(decoding)
        self._read_decoding(decoding)
        self._scorer.read(self._read_prefilled(chunks, decoded))
        self._tree.evict(self._tree.evictable_tokens - int(_CACHED_SHARE * self.model.context_tokens))
        self._observe(decoded, prefilled, self._clock() - began)

    def _observe(self, decoded: int, prefilled: int, seconds: float) -> None:
        if decoded and not prefilled:
            self.rates.observe_decode(decoded, seconds)
        elif prefilled >= _PREFILL_OBSERVED and not decoded:
            self.rates.observe_prefill(prefilled, seconds)

    # Generating.

    def _admit(self) -> None:
        for sequence in self._line.in_order():
            if len(self._running) >= self.model.sequences or not self._tree.free_up_ids(1):
                return
            if self._waits_for_leader(sequence):
                continue
            if not self._start(sequence):
                return

    def _waits_for_leader(self, sequence: Sequence) -> bool:
        if not self.model.forkable:
            return False
        cached = self._tree.depth(sequence.tokens[: sequence.length - 1], sequence.request.cache_salt)
        return any(leads(leader, sequence, cached) for leader in self._running)

    def _start(self, sequence: Sequence) -> bool:
        """Give a sequence its id and cells if they fit; False when it has to wait."""
        depth = 0
        if self.model.forkable:
            tokens = sequence.tokens[: sequence.length]
            match = self._tree.match(tokens, sequence.request.cache_salt, sequence.length - 1)
            self._tree.pin(match.node)
            sequence.node, depth = match.node, match.depth
        sequence.computed = sequence.shared = depth
        if not self._room().fits(promised_tokens(sequence)) and (self._running or self._scorer.window_tokens):
            self._let_go(sequence)
            return False
        self._line.remove(sequence)
        sequence.id = self._free_ids.pop()
        if sequence.node is not None:
            self._tree.share(sequence.node, sequence.id, 0, depth)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = depth
        self._running.append(sequence)
        return True

    def _read_decoding(self, decoding: list[Sequence]) -> None:
        rows = self.model.rows
        greedy = [sequence.sampler.plain_greedy for sequence in decoding]
        best = argmax_rows(rows[: len(decoding)]) if any(greedy) else ()
        for index, sequence in enumerate(decoding):
            sequence.computed += 1
            if greedy[index]:
                self._take(sequence, TokenEvent(best[index]))
            else:
                self._sample(sequence, index)

    def _read_prefilled(self, chunks: list[tuple[Sequence, int]], row: int) -> int:
        for sequence, tokens in chunks:
            sequence.computed += tokens
            if sequence.computed == sequence.length:
                self._cache(sequence, sequence.length)
                self._sample(sequence, row)
                row += 1
        return row

    def _sample(self, sequence: Sequence, row: int) -> None:
        try:
            event = sequence.sampler.choose(self.model.rows[row])
        except Exception as error:  # a constraint's fault harms its own sequence only
            sequence.finish("error", f"the next token cannot be chosen: {error}")
            self._retire(sequence)
            return
        self._take(sequence, event)

    def _take(self, sequence: Sequence, event: TokenEvent) -> None:
        if event.token in self.model.end_tokens and not sequence.request.ignore_eos:
            sequence.finish("stop")
            self._retire(sequence)
            return
        sequence.append(event)
        sampler = sequence.sampler
        if not sampler.stateless:
            try:
                sampler.accept(event.token)
            except Exception as error:
                sequence.finish("error", f"the constraint refuses its own token: {error}")
        if sequence.finished is None and (sampler.finished or not sequence.remaining):
            sequence.finish("stop" if sampler.finished else "length")
        if sequence.finished is not None:
            self._retire(sequence)
        else:
            self._told.sequences.append(sequence)

    def _retire(self, sequence: Sequence) -> None:
        """Take a finished sequence out; its tokens stay cached where they are whole."""
        assert sequence.finished is not None
        if sequence.finished.reason in ("stop", "length"):
            self._cache(sequence, sequence.computed)
        self._running.remove(sequence)
        self._free(sequence)
        self._told.sequences.append(sequence)

    def _put_back(self, sequence: Sequence) -> None:
        """Preempt: the cells go, the tokens stay, and the line takes it back at its old place."""
        self._running.remove(sequence)
        self._free(sequence)
        self._line.push(sequence)

    def _free(self, sequence: Sequence) -> None:
        self.model.memory_remove(sequence.id, 0)
        self._free_ids.append(sequence.id)
        sequence.id = -1
        self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        if sequence.node is not None:
            self._tree.unpin(sequence.node)
        sequence.node, sequence.computed, sequence.shared = None, 0, 0

    def _cache(self, sequence: Sequence, length: int) -> None:
        """Hand the first `length` cells of a sequence to the prefix tree, and pin them there for it."""
        if sequence.node is None or length <= sequence.shared:
            return
        tokens = sequence.tokens[:length]
        node = self._tree.insert(tokens, sequence.request.cache_salt, sequence.id, sequence.shared)
        if node is None:
            return
        self._tree.pin(node)
        self._tree.unpin(sequence.node)
        sequence.node, sequence.shared = node, length

    # Room, and what happens when a step fails.

    def _room(self) -> Room:
        used = sum(sequence.private for sequence in self._running)
        promised = sum(promised_tokens(sequence) for sequence in self._running)
        used += self._tree.pinned_tokens + self._scorer.window_tokens
        return Room(self.model.context_tokens, used, promised)

    def _make_room(self, decoding: list[Sequence], chunks: list[Chunk]) -> list[Chunk]:
        """Free the cells this step needs: first cached prefixes, then whole sequences, youngest first.

        Takes those that were put back out of `decoding`, and gives the chunks that are left.
        """
        while True:
            needed = len(decoding) + sum(tokens for _, tokens in chunks)
            own = sum(sequence.private for sequence in self._running)
            free = self.model.context_tokens - self._tree.tokens - own - self._scorer.window_tokens
            if free + self._tree.evict(needed - free) >= needed or not self._running:
                return chunks
            self._put_back(victim(self._running))
            decoding[:] = [sequence for sequence in decoding if sequence.id >= 0]
            chunks = [chunk for chunk in chunks if chunk[0].id >= 0]

    def _recover(self, code: int, decoding: list[Sequence], chunks: list[Chunk]) -> None:
        """A decode failed: end what was in its batch, put everything else back, begin again with empty memory."""
        if code == ABORTED:
            return  # the engine is closing
        self._failures += 1
        if code == NO_KV_ROOM and self._failures == 1 and self._tree.evict(self.model.context_tokens):
            return  # nothing changed in memory: the same step comes again with the cache gone
        reason = f"llama_decode failed with {code}: {self.model.last_words()}"
        for sequence in [*decoding, *(sequence for sequence, _ in chunks)]:
            sequence.finish("error", reason)
            self._retire(sequence)
        self._scorer.fail(reason)
        for sequence in list(self._running):
            self._put_back(sequence)
        self.model.memory_clear()
        self._tree.forget()
        if self._failures >= _FATAL_FAILURES:
            raise EngineFailed(f"{self._failures} steps failed in a row; the last: {reason}")

    def load(self) -> Load:
        """The state as of now, between two steps."""
        line, running = self._line.in_order(), self._running
        prompts = sum(sequence.length for sequence in line)
        prompts += sum(sequence.pending for sequence in running if sequence.pending > 1)
        private = sum(sequence.private for sequence in running)
        return Load(
            queued_requests=len(line) + self._scorer.untouched_jobs,
            running_sequences=len(running),
            sequences_capacity=self.model.sequences,
            queued_prompt_tokens=prompts + self._scorer.waiting_tokens,
            remaining_output_tokens=sum(sequence.remaining for sequence in (*line, *running)),
            kv_used_tokens=private + self._tree.pinned_tokens + self._scorer.window_tokens,
            kv_cached_tokens=self._tree.evictable_tokens,
            kv_capacity_tokens=self.model.context_tokens,
            steps=self.steps,
            prefill_tokens_total=self.prefill_tokens_total,
            decode_tokens_total=self.decode_tokens_total,
            prefill_tokens_per_second=self.rates.prefill_tokens_per_second,
            decode_tokens_per_second=self.rates.decode_tokens_per_second,
        )
