"""All jobs of a node: begun again at start, kept going, shown, cancelled; and files removed when their time is over."""

import asyncio
import contextlib
import secrets
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog
from sqlalchemy import URL

from appliance.config import JobsSettings
from appliance.core import HealthAlerts
from appliance.errors import ApplianceError
from appliance.jobs.deps import JobDeps, JobProgress
from appliance.jobs.fair_share import FairShareSlots
from appliance.jobs.models import Batch, LineHandler
from appliance.jobs.planner import choose_concurrency
from appliance.jobs.provider.lines import ProviderLines
from appliance.jobs.runner import BatchRun
from appliance.jobs.storage.files import JobFolder, read_free_bytes
from appliance.jobs.storage.store import JobStore
from appliance.state import State
from appliance.telemetry.background import GuardedTask

_CLEANUP_SECONDS: Final = 600.0

_log = structlog.stdlib.get_logger(__name__)


def new_batch_id() -> str:
    """128 random bits: a batch cannot be found by guessing."""
    return f"batch_{secrets.token_hex(16)}"


class JobManager:
    """`open` it, `start` it once lines can be answered, and `aclose` it: what runs then goes on at the next start."""

    def __init__(self, deps: JobDeps) -> None:
        self._deps = deps
        self.store, self.folder, self.config = deps.store, deps.folder, deps.config
        self._runs: dict[str, BatchRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.ended: Counter[str] = Counter()
        """Batches that have ended since the start, by status."""
        self.lines_done: Counter[str] = Counter()
        """Lines of batches that have ended since the start: completed, failed, copied, onsite, hosted."""

    @classmethod
    async def open(
        cls,
        config: JobsSettings,
        home: Path,
        *,
        line_handler: LineHandler,
        state: State,
        alerts: HealthAlerts,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        free: Callable[[Path], int] = read_free_bytes,
        provider_lines: ProviderLines | None = None,
    ) -> "JobManager":
        """Files lie in `config.folder`, else below `home`. Raises JobsUnavailable, StorageFull, OSError."""
        root = await asyncio.to_thread(Path(config.folder).expanduser) if config.folder else home / "jobs"
        limits = {"max_file_bytes": config.max_file_bytes, "min_free_bytes": config.min_free_bytes}
        folder = await asyncio.to_thread(partial(JobFolder, root, free=free, **limits))
        url = config.url or URL.create("sqlite", database=str(root / "jobs.sqlite")).render_as_string()
        store = await JobStore.open(url)
        slots = FairShareSlots(lambda: choose_concurrency(state.snapshot, config.concurrency))
        return cls(
            JobDeps(config, store, folder, line_handler, slots, state, alerts, clock, wall_clock, provider_lines)
        )

    async def start(self) -> None:
        """Go on with what has not ended, and remove files that the store does not know."""
        batches = await self.store.list_open_batches()
        known = await self.store.list_file_ids()
        results = {name for one in batches for name in (one.output_file_id, one.error_file_id) if name is not None}
        await asyncio.to_thread(self.folder.remove_unknown, known | results, frozenset(batch.id for batch in batches))
        for batch in batches:
            self._begin(batch)
        self._spawn(GuardedTask("cleanup of job files", self._remove_expired_forever, self._deps.alerts).run())

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.store.close()

    @property
    def endpoints(self) -> Sequence[str]:
        return self._deps.line_handler.endpoints

    async def create(self, batch: Batch) -> Batch:
        await self.store.add_batch(batch)
        self._begin(batch)
        return batch

    async def cancel(self, batch: Batch) -> Batch:
        """`cancelling`, or as it is where it has ended."""
        run = self._runs.get(batch.id)
        if run is None:
            return batch
        await run.stop("cancelled", "batch_cancelled", "the batch was cancelled before this line was answered")
        return run.batch

    def current_batch(self, batch: Batch) -> Batch:
        """As it is now, where it runs."""
        run = self._runs.get(batch.id)
        return batch if run is None else run.batch

    def progress(self, batch_id: str) -> JobProgress | None:
        """None for a batch that does not run."""
        run = self._runs.get(batch_id)
        return None if run is None else run.progress

    @property
    def running(self) -> Mapping[str, BatchRun]:
        return self._runs

    def wake(self) -> None:
        """Have every run look around at once: at the clock, the disk, the places."""
        for run in self._runs.values():
            run.wake()

    async def remove_file(self, file_id: str) -> bool:
        """Forget it, then remove it; a job that reads it has a copy of its own."""
        was_there = await self.store.remove_file(file_id)
        await asyncio.to_thread(self.folder.remove_file, file_id)
        return was_there

    async def remove_expired(self) -> None:
        """Remove files and ended batches that have had their time."""
        now = self._deps.wall_clock()
        for file_id in await self.store.list_expired_files(now):
            await self.remove_file(file_id)
        await self.store.remove_old_batches(now - self.config.retention_days * 86_400.0)

    async def _remove_expired_forever(self) -> None:
        while True:
            with contextlib.suppress(ApplianceError, OSError):
                await self.remove_expired()
            await asyncio.sleep(_CLEANUP_SECONDS)

    def _begin(self, batch: Batch) -> None:
        self._runs[batch.id] = run = BatchRun(batch, self._deps)
        self._spawn(self._run(run))

    async def _run(self, run: BatchRun) -> None:
        try:
            await run.run()
        except Exception as error:
            # It goes on with the next start; what is on disk is whole.
            text = f"batch {run.batch.id} stopped unexpectedly ({error!r}); it goes on when the node is restarted"
            self._deps.alerts.warn("job_stopped", text, run.batch.id)
            _log.exception("batch stopped unexpectedly", batch=run.batch.id)
        else:
            self._count(run.batch)
        finally:
            del self._runs[run.batch.id]
            self.wake()

    def _count(self, batch: Batch) -> None:
        if batch.is_over:
            self.ended[batch.status] += 1
            counts = batch.counts
            for name in ("completed", "failed", "copied", "onsite", "hosted"):
                self.lines_done[name] += getattr(counts, name)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
