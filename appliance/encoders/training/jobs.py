"""Trainings under way: each is a child process that reads examples and reports its progress. One at a time."""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import orjson

from appliance.encoders.linear_models import Tier
from appliance.errors import Busy, NotFound
from appliance.worker.json_log import log

JobState = Literal["running", "done", "failed", "cancelled"]

_LONGEST_LINE_BYTES: Final = 1_000_000
_KEPT_JOBS: Final = 50


@dataclass(frozen=True, slots=True)
class TrainingOrder:
    """What a training process reads from its stdin, as JSON."""

    name: str
    texts: Sequence[str]
    truth: Sequence[int]
    """Of each text: the place of its label in `labels`."""
    labels: Sequence[str]
    notes: Sequence[str]
    wanted_accuracy: float | None
    max_tier: Tier
    """The most expensive tier that may be used."""
    encoder: str | None
    """Name of the encoder to train on; None: the first there is."""
    serve: bool
    """Whether the new version serves at once."""


@dataclass(slots=True)
class TrainingJob:
    """One training, as far as it has come."""

    name: str
    examples: int
    started_at: float
    state: JobState = "running"
    step: str = "starting"
    share: float = 0.0
    version: int | None = None
    error: str | None = None
    ended_at: float | None = None
    process: "asyncio.subprocess.Process | None" = field(default=None, repr=False)

    def to_json(self) -> Mapping[str, str | int | float | None]:
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
    """`ended` is called on the event loop with each job that has come to its end."""

    def __init__(self, data: Path, models: Path, threads: int, ended: Callable[[TrainingJob], None]) -> None:
        self._data, self._models, self._threads, self._ended = data, models, threads, ended
        self._jobs: dict[str, TrainingJob] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def running(self) -> TrainingJob | None:
        return next((job for job in self._jobs.values() if job.state == "running"), None)

    def get(self, name: str) -> TrainingJob:
        """The last training of that name. Raises NotFound."""
        job = self._jobs.get(name)
        if job is None:
            raise NotFound(f"no training of {name!r} since this program started; its report is at the classifier")
        return job

    def find(self, name: str) -> TrainingJob | None:
        return self._jobs.get(name)

    def start(self, order: TrainingOrder) -> TrainingJob:
        """Raises Busy while another one runs: two would only slow each other down."""
        busy = self.running
        if busy is not None:
            raise Busy(
                f"{busy.name!r} is being trained ({busy.share:.0%}): wait for it, or cancel it", retry_after_seconds=10
            )
        name = order.name
        job = TrainingJob(name, len(order.texts), time.time())
        self._jobs.pop(name, None)
        while len(self._jobs) >= _KEPT_JOBS:
            self._jobs.pop(next(iter(self._jobs)))
        self._jobs[name] = job
        task = asyncio.create_task(self._train(job, orjson.dumps(order)), name=f"training {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    def cancel(self, name: str) -> TrainingJob:
        """What serves stays as it is. A training that has ended stays as it ended."""
        job = self.get(name)
        if job.state == "running":
            job.state = "cancelled"
            if job.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    job.process.kill()
        return job

    async def wait_until_idle(self) -> None:
        """Until no training is under way."""
        await asyncio.gather(*self._tasks)

    async def aclose(self) -> None:
        for job in list(self._jobs.values()):
            if job.state == "running":
                self.cancel(job.name)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _train(self, job: TrainingJob, order: bytes) -> None:
        try:
            await self._run_process(job, order)
        except OSError as error:
            job.error = f"the training could not be started: {error.strerror or error}"
        if job.state == "running":
            job.state = "done" if job.version is not None else "failed"
            job.error = job.error if job.version is None else None
            if job.state == "failed" and job.error is None:
                job.error = "the training process ended without a result; the log of this program says more"
        job.ended_at = time.time()
        log("training_ended", name=job.name, state=job.state, version=job.version, reason=job.error)
        self._ended(job)

    async def _run_process(self, job: TrainingJob, order: bytes) -> None:
        arguments = [
            "-m",
            "appliance.encoders.training.worker",
            "--data",
            str(self._data),
            "--models",
            str(self._models),
        ]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            "--threads",
            str(self._threads),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": str(self._threads), "OPENBLAS_NUM_THREADS": str(self._threads)},
            limit=_LONGEST_LINE_BYTES,
        )
        job.process = process
        if job.state == "cancelled":
            process.kill()
        assert process.stdin is not None and process.stdout is not None
        feeding = asyncio.create_task(_feed(process.stdin, order))
        try:
            async for line in process.stdout:
                _note(job, line)
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            code = await process.wait()
            if code not in (0, -9) and job.error is None:
                job.error = f"the training process ended with code {code}"


async def _feed(stdin: asyncio.StreamWriter, order: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        stdin.write(order)
        await stdin.drain()
        stdin.close()


def _note(job: TrainingJob, line: bytes) -> None:
    fact = orjson.loads(line)
    if "version" in fact:
        job.version, job.share, job.step = fact["version"], 1.0, "done"
    elif "error" in fact:
        job.error = fact["error"]
    else:
        job.step, job.share = fact["step"], fact["share"]
