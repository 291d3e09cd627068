"""Trainings under way: each a child process that is fed examples and tells how far it is. One at a time."""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import orjson

from appliance.errors import Busy, NotFound
from appliance.worker.json_log import log

RunState = Literal["running", "done", "failed", "cancelled"]

_LONGEST_LINE_BYTES: Final = 1_000_000
_KEPT_RUNS: Final = 50


@dataclass(slots=True)
class TrainingJob:
    """One training, as far as it has come."""

    name: str
    examples: int
    started_at: float
    state: RunState = "running"
    step: str = "starting"
    share: float = 0.0
    version: int | None = None
    error: str | None = None
    ended_at: float | None = None
    process: "asyncio.subprocess.Process | None" = field(default=None, repr=False)

    def facts(self) -> Mapping[str, Any]:
        seconds = (self.ended_at or time.time()) - self.started_at
        return {
            "name": self.name,
            "state": self.state,
            "step": self.step,
            "share": self.share,
            "examples": self.examples,
            "started_at": self.started_at,
            "seconds": round(seconds, 1),
            "version": self.version,
            "error": self.error,
        }


class TrainingJobs:
    """`ended` is called on the event loop with each run that has come to its end."""

    def __init__(self, data: Path, models: Path, threads: int, ended: Callable[[TrainingJob], None]) -> None:
        self._data, self._models, self._threads, self._ended = data, models, threads, ended
        self._runs: dict[str, TrainingJob] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def running(self) -> TrainingJob | None:
        return next((run for run in self._runs.values() if run.state == "running"), None)

    def get(self, name: str) -> TrainingJob:
        """The last training of that name. Raises NotFound."""
        run = self._runs.get(name)
        if run is None:
            raise NotFound(f"no training of {name!r} since this program started; its report is at the classifier")
        return run

    def find(self, name: str) -> TrainingJob | None:
        return self._runs.get(name)

    def start(self, name: str, job: Mapping[str, Any]) -> TrainingJob:
        """Raises Busy while another one runs: two would only slow each other down."""
        busy = self.running
        if busy is not None:
            raise Busy(
                f"{busy.name!r} is being trained ({busy.share:.0%}): wait for it, or cancel it", retry_after_seconds=10
            )
        run = TrainingJob(name, len(job["texts"]), time.time())
        self._runs.pop(name, None)
        while len(self._runs) >= _KEPT_RUNS:
            self._runs.pop(next(iter(self._runs)))
        self._runs[name] = run
        task = asyncio.create_task(self._train(run, orjson.dumps(job)), name=f"training {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return run

    def cancel(self, name: str) -> TrainingJob:
        """What serves stays as it is. A training that has ended stays as it ended."""
        run = self.get(name)
        if run.state == "running":
            run.state = "cancelled"
            if run.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    run.process.kill()
        return run

    async def wait_until_idle(self) -> None:
        """Until no training is under way."""
        await asyncio.gather(*self._tasks)

    async def aclose(self) -> None:
        for run in list(self._runs.values()):
            if run.state == "running":
                self.cancel(run.name)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _train(self, run: TrainingJob, job: bytes) -> None:
        try:
            await self._work(run, job)
        except OSError as error:
            run.error = f"the training could not be started: {error.strerror or error}"
        if run.state == "running":
            run.state = "done" if run.version is not None else "failed"
            run.error = run.error if run.version is None else None
            if run.state == "failed" and run.error is None:
                run.error = "the training process ended without a result; the log of this program says more"
        run.ended_at = time.time()
        log("training_ended", name=run.name, state=run.state, version=run.version, reason=run.error)
        self._ended(run)

    async def _work(self, run: TrainingJob, job: bytes) -> None:
        words = ["-m", "appliance.encoders.training.worker", "--data", str(self._data), "--models", str(self._models)]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *words,
            "--threads",
            str(self._threads),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": str(self._threads), "OPENBLAS_NUM_THREADS": str(self._threads)},
            limit=_LONGEST_LINE_BYTES,
        )
        run.process = process
        if run.state == "cancelled":
            process.kill()
        assert process.stdin is not None and process.stdout is not None
        feeding = asyncio.create_task(_feed(process.stdin, job))
        try:
            async for line in process.stdout:
                _note(run, line)
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            code = await process.wait()
            if code not in (0, -9) and run.error is None:
                run.error = f"the training process ended with code {code}"


async def _feed(stdin: asyncio.StreamWriter, job: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        stdin.write(job)
        await stdin.drain()
        stdin.close()


def _note(run: TrainingJob, line: bytes) -> None:
    fact = orjson.loads(line)
    if "version" in fact:
        run.version, run.share, run.step = fact["version"], 1.0, "done"
    elif "error" in fact:
        run.error = fact["error"]
    else:
        run.step, run.share = fact["step"], fact["share"]
