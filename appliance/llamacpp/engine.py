"""The engine as asyncio sees it: requests in, events out. All llama.cpp work happens in one thread of its own.

Requests cross to the thread through an inbox that is read between steps; results cross back with one wake-up of the
loop for all sequences of a step.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Final

from appliance.errors import ApplianceError, ContextTooLong, EngineBusy, EngineFailed, RequestError
from appliance.llamacpp.decode.sequence import Sequence as Running
from appliance.llamacpp.engine_protocol import (
    EngineLoadReport,
    LabelItem,
    LabelScores,
    SequenceFinished,
    SequenceRequest,
    TokenEvent,
)
from appliance.llamacpp.engine_stream import EngineGeneration, Mailbox
from appliance.llamacpp.kv.prefix_cache import to_token_array
from appliance.llamacpp.labels.jobs import LabelJob
from appliance.llamacpp.model import LlamaModel
from appliance.llamacpp.rates import measure_first_rates
from appliance.llamacpp.scheduler.step import STEP_SECONDS, StepResult, StepRunner

_LEAST_RETRY_SECONDS: Final = 1.0
_RESTART_SECONDS: Final = 5.0
"""About what an engine that ends needs to be back."""
_JOIN_SECONDS: Final = 10.0
"""A decode that is aborted stops between two graph nodes, within milliseconds; this is for hung machines."""


class LlamaEngine:
    """Runs one model. `start` and everything else is called on the event loop; `close` does not close the model."""

    def __init__(
        self,
        model: LlamaModel,
        *,
        max_queued_requests: int = 256,
        max_queued_tokens: int | None = None,
        calibrate: bool = True,
        step_seconds: float = STEP_SECONDS,
    ) -> None:
        """`max_queued_tokens` bounds the prompt tokens that wait (None: no bound but the number of requests).

        `step_seconds` is about the longest pause of a running stream while other prompts are computed.
        """
        self.model = model
        self.failed: ApplianceError | None = None
        """Set when the engine can work no more; the process should say so and end. `until_failed` waits for it."""
        self._max_requests, self._max_tokens, self._calibrates = max_queued_requests, max_queued_tokens, calibrate
        self._runner = StepRunner(model, step_seconds=step_seconds)
        self._numbers = count()
        self._inbox: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._wake = threading.Event()
        self._closing = self._stopping = False
        self._thread = threading.Thread(target=self._work, name="llama.cpp", daemon=True)
        self._mailboxes: dict[Running, Mailbox] = {}
        self._answers: dict[LabelJob, asyncio.Future[None]] = {}
        self._ready: asyncio.Event = asyncio.Event()
        self._failing: asyncio.Event = asyncio.Event()
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()
        self._sent = _InboxTotals()
        self._received = _InboxTotals()
        self._last_load = (self._runner.report_load(), self._received)
        """The thread's last word: its load, and what of the inbox that load takes in. Replaced whole."""

    def start(self) -> None:
        """Start the thread. The first thing it does is the calibration; requests may be submitted at once."""
        self._loop = asyncio.get_running_loop()
        self.model.reset()
        self._thread.start()

    async def wait_until_ready(self) -> None:
        """Wait for the calibration; raises what made the engine fail."""
        await self._ready.wait()
        if self.failed is not None:
            raise self.failed

    async def wait_until_failed(self) -> ApplianceError:
        """Wait until the engine can work no more; gives the reason. It may never return."""
        await self._failing.wait()
        assert self.failed is not None
        return self.failed

    def submit(self, request: SequenceRequest) -> EngineGeneration:
        """Queue one sequence. Raises ContextTooLong, RequestError for impossible tokens, and EngineBusy."""
        self._check(request)
        self._refuse_when_busy(len(request.prompt))
        sequence = Running.from_request(
            request, next(self._numbers), self.model.sequence_context_tokens, self.model.end_tokens
        )
        mailbox = self._mailboxes[sequence] = Mailbox()
        self._idle.clear()
        self._send(self._runner.submit, sequence, len(request.prompt), sequence.remaining)
        return EngineGeneration(mailbox, lambda: self._drop(sequence, self._runner.cancel))

    async def score_labels(self, items: Sequence[LabelItem]) -> list[LabelScores]:
        """Score the labels of every item; answers come in the items' order, `error` set where one cannot be scored.

        Raises EngineBusy. Cancelling the caller drops the work that is left.
        """
        job = LabelJob(items)
        self._refuse_when_busy(job.waiting_tokens)
        answered = self._answers[job] = asyncio.get_running_loop().create_future()
        self._idle.clear()
        self._send(self._runner.submit_labels, job, job.waiting_tokens, 0)
        try:
            await answered
        finally:
            if self._answers.pop(job, None) is not None:
                self._drop(job, self._runner.cancel_labels)
                self._note_idle()
        return [scores for scores in job.results if scores is not None]

    def report_load(self) -> EngineLoadReport:
        """The engine's state as of the last step, with what was submitted since counted as queued."""
        load, seen = self._last_load
        sent = self._sent
        return replace(
            load,
            queued_requests=load.queued_requests + sent.requests - seen.requests,
            queued_prompt_tokens=load.queued_prompt_tokens + sent.prompt_tokens - seen.prompt_tokens,
            remaining_output_tokens=load.remaining_output_tokens + sent.output_tokens - seen.output_tokens,
        )

    async def close(self, drain_seconds: float) -> None:
        """Refuse new work, let the running finish for `drain_seconds`, cancel the rest, stop the thread."""
        self._closing = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), drain_seconds)
        self._stopping = True
        if not self._idle.is_set():
            self.model.abort()
        self._wake.set()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, _JOIN_SECONDS)
            if self._thread.is_alive():
                self.model.abandon()
        self._end_all("cancelled", None)

    # The loop's side.

    def _check(self, request: SequenceRequest) -> None:
        prompt, context = to_token_array(request.prompt), self.model.sequence_context_tokens
        if len(prompt) + 1 > context:
            raise ContextTooLong(
                f"the prompt is {len(prompt)} tokens and the context holds {context}, one of them for the answer: "
                "shorten the prompt",
                param="prompt",
            )
        if not len(prompt):
            raise RequestError("the prompt has no tokens: give at least one", param="prompt")
        if request.max_tokens < 1:
            raise RequestError(f"max_tokens is {request.max_tokens}: ask for at least 1", param="max_tokens")
        if not ((prompt >= 0) & (prompt < self.model.vocabulary_size)).all():
            raise RequestError(
                f"a token id is outside of the vocabulary of {self.model.vocabulary_size}", param="prompt"
            )

    def _refuse_when_busy(self, prompt_tokens: int) -> None:
        if self.failed is not None or self._closing:
            raise EngineBusy(
                "the engine is shutting down: use another target or try again when it is back",
                retry_after_seconds=_RESTART_SECONDS,
            )
        load = self.report_load()
        free = load.sequences_capacity - load.running_sequences
        full = load.queued_requests >= self._max_requests + free
        if self._max_tokens is not None and load.queued_prompt_tokens:
            full = full or load.queued_prompt_tokens + prompt_tokens > self._max_tokens
        if full:
            raise EngineBusy(
                f"{load.queued_requests} requests with {load.queued_prompt_tokens} prompt tokens wait already: "
                "try again later",
                retry_after_seconds=self._retry_after(load),
            )

    def _retry_after(self, load: EngineLoadReport) -> float:
        """About when the next place in the queue comes free: the time for all known work over its requests."""
        seconds = self._runner.rates.seconds_for(
            load.queued_prompt_tokens, load.remaining_output_tokens, load.sequences_capacity
        )
        requests = max(1, load.queued_requests + load.running_sequences)
        return max(_LEAST_RETRY_SECONDS, round((seconds or 0.0) / requests, 1))

    def _send(self, action: Callable[[Any], None], what: Any, prompt_tokens: int, output_tokens: int) -> None:
        sent = self._sent
        self._sent = _InboxTotals(
            sent.requests + 1, sent.prompt_tokens + prompt_tokens, sent.output_tokens + output_tokens
        )
        self._post(self._note_received, self._sent)
        self._post(action, what)

    def _post(self, action: Callable[[Any], None], what: Any) -> None:
        self._inbox.append((action, what))
        self._wake.set()

    def _drop(self, what: Running | LabelJob, action: Callable[[Any], None]) -> None:
        """Drop what is not waited for any more; when that was all that is being computed, stop computing it."""
        what.dropped = True
        self._post(action, what)
        in_step = self._runner.in_step
        if in_step and all(one.dropped for one in in_step):
            self.model.abort()  # should the thread be in its next step by now, it does that again

    def _deliver(
        self, news: list[tuple[Running, list[TokenEvent], SequenceFinished | None]], jobs: list[LabelJob]
    ) -> None:
        for sequence, events, finished in news:
            mailbox = self._mailboxes.get(sequence)
            if mailbox is None:
                continue
            mailbox.put(events, finished)
            if finished is not None:
                del self._mailboxes[sequence]
        for job in jobs:
            answered = self._answers.pop(job, None)
            if answered is not None and not answered.done():
                answered.set_result(None)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._mailboxes and not self._answers:
            self._idle.set()

    def _end_all(self, reason: Any, error: str | None) -> None:
        """Finish what is still open without the thread's help: it has ended."""
        for sequence, mailbox in list(self._mailboxes.items()):
            sequence.finish(reason, error)
            mailbox.put([], sequence.finished)
        self._mailboxes.clear()
        for answered in self._answers.values():
            if not answered.done():
                answered.set_exception(_closed_error(error))
        self._answers.clear()
        self._idle.set()
        self._ready.set()
        if self.failed is not None:
            self._failing.set()

    # The thread's side.

    def _work(self) -> None:
        try:
            if self._calibrates:
                measure_first_rates(self.model, self._runner.rates)
            self._store_load()
            self._call(self._ready.set)
            while not self._stopping:
                self._run_once()
        except Exception as error:  # the thread's root: whatever it is, the process must hear of it
            self.failed = (
                error if isinstance(error, ApplianceError) else EngineFailed(f"{type(error).__name__}: {error}")
            )
            self._call(self._end_all, "error", str(self.failed))

    def _run_once(self) -> None:
        """Read the inbox and do one step, or sleep until there is something to do."""
        self._wake.clear()
        while self._inbox:
            action, what = self._inbox.popleft()
            action(what)
        if self._runner.idle:
            self._store_load()
            self._wake.wait()
            return
        result = self._runner.run_step()
        self._store_load()
        self._publish(result)

    def _note_received(self, sent: "_InboxTotals") -> None:
        self._received = sent

    def _store_load(self) -> None:
        self._last_load = (self._runner.report_load(), self._received)

    def _publish(self, result: StepResult) -> None:
        news = []
        for sequence in dict.fromkeys(result.sequences):
            events, sequence.events = sequence.events, []
            news.append((sequence, events, sequence.finished))
        if news or result.jobs:
            self._call(self._deliver, news, result.jobs)

    def _call(self, function: Callable[..., None], *values: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed before the engine
            self._loop.call_soon_threadsafe(function, *values)


def _closed_error(error: str | None) -> ApplianceError:
    if error is not None:
        return EngineFailed(error)
    return EngineBusy("the engine was shut down: try again when it is back", retry_after_seconds=_RESTART_SECONDS)


@dataclass(frozen=True, slots=True)
class _InboxTotals:
    """Totals of what was put into the inbox; the thread has not seen what it lacks of them."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
