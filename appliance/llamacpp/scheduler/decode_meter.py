"""What steps cost and bring: every decode is timed here, and the engine's load is reported from it."""

import time
from collections.abc import Callable

from appliance.llamacpp.context import LlamaContext
from appliance.llamacpp.decode.speculation import SpeculationPlanner
from appliance.llamacpp.engine_protocol import EngineLoadReport
from appliance.llamacpp.model import LlamaModel
from appliance.llamacpp.rates import Rates
from appliance.llamacpp.scheduler.sequence_manager import SequenceManager
from appliance.llamacpp.scheduler.thread_governor import ThreadGovernor


class DecodeMeter:
    """Runs decodes, counts and times them, and sets the threads of the next one. The engine's thread only."""

    def __init__(self, model: LlamaModel, clock: Callable[[], float]) -> None:
        self._model, self._clock = model, clock
        self._thread_governor = ThreadGovernor(model.threads)
        self.steps = self.prefill_tokens = self.decode_tokens = 0
        self._compute_seconds = self._compute_cpu_seconds = 0.0
        self._cpu_at_start: float | None = None

    def begin(self) -> None:
        """The first step begins: CPU time of this thread counts from now on."""
        if self._cpu_at_start is None:
            self._cpu_at_start = time.thread_time()

    def decode(self, context: LlamaContext) -> tuple[int, float]:
        """llama.cpp's code and the seconds it took."""
        began, cpu, all_cpu = self._clock(), time.thread_time(), time.process_time()
        code = context.decode()
        self._compute_cpu_seconds += time.thread_time() - cpu
        seconds = self._clock() - began
        threads = self._thread_governor.observe(seconds, time.process_time() - all_cpu)
        if threads != self._model.threads:
            self._model.set_threads(threads)
        self._compute_seconds += seconds
        if not code:
            self.steps += 1
        return code, seconds

    def report_load(self, manager: SequenceManager, rates: Rates, speculation: SpeculationPlanner) -> EngineLoadReport:
        """The state as of now, between two steps."""
        waiting, running, labels = manager.wait_queue.list_in_order(), manager.running, manager.label_scorer
        prompts = sum(sequence.length for sequence in waiting)
        prompts += sum(sequence.pending for sequence in running if sequence.pending > 1)
        used = sum(sequence.private_cells for sequence in running) + manager.kv.used_slot_tokens
        return EngineLoadReport(
            queued_requests=len(waiting) + labels.queue.untouched_jobs,
            running_sequences=len(running),
            sequences_capacity=self._model.sequences,
            queued_prompt_tokens=prompts + labels.queue.waiting_tokens,
            remaining_output_tokens=sum(sequence.remaining for sequence in (*waiting, *running)),
            kv_used_tokens=used + manager.prefix_cache.pinned_tokens + labels.window_tokens,
            kv_cached_tokens=manager.prefix_cache.evictable_tokens,
            kv_capacity_tokens=self._model.kv_capacity_tokens,
            steps=self.steps,
            prefill_tokens_total=self.prefill_tokens,
            decode_tokens_total=self.decode_tokens,
            prefill_tokens_per_second=rates.prefill_tokens_per_second,
            decode_tokens_per_second=rates.decode_tokens_per_second,
            label_items=labels.queue.open_items,
            drafted_tokens_total=speculation.drafted_total,
            accepted_tokens_total=speculation.accepted_total,
            lane_sequences=len(manager.kv.in_slots),
            compute_seconds_total=self._compute_seconds,
            host_seconds_total=self._host_seconds(),
        )

    def _host_seconds(self) -> float:
        """CPU time of the thread that steps, outside of decoding. Only that thread can measure it."""
        if self._cpu_at_start is None:
            return 0.0
        return max(0.0, time.thread_time() - self._cpu_at_start - self._compute_cpu_seconds)
