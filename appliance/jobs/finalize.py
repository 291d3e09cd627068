"""How a batch ends: what was not answered is named, and what was written becomes files. Each step may be done twice."""

import asyncio
from dataclasses import replace
from functools import partial
from typing import Final

import structlog

from appliance.jobs.deps import JobDeps, JobStopped
from appliance.jobs.models import Batch, BatchProblem, Ending, StoredFile
from appliance.jobs.storage.batch_state import BatchState
from appliance.jobs.storage.files import new_file_id

_UNDONE_AT_ONCE: Final = 500

_log = structlog.stdlib.get_logger(__name__)


async def end_early(keeper: BatchState, means: JobDeps, stopped: JobStopped) -> None:
    """Lines that were not answered are named in the error file, so that none is missing from the results."""
    keeper.say("ending", stopped.message)
    while await keeper.patiently(keeper.results.copy):
        pass
    undone = partial(means.store.waiting, keeper.batch.id, 0, _UNDONE_AT_ONCE)
    while places := await keeper.patiently(undone):
        await keeper.patiently(partial(keeper.results.put_undone, places, stopped.code, stopped.message))
    problems = keeper.batch.problems
    if stopped.ending == "failed":
        problems = (BatchProblem(stopped.code, stopped.message), *problems)
    await finalize(keeper, replace(keeper.batch, problems=problems), stopped.ending)


async def finalize(keeper: BatchState, batch: Batch, ending: Ending) -> None:
    """Which files the results become is decided once, and on disk before they are made."""
    sized = keeper.results.with_sizes(batch)
    named = replace(
        sized,
        ending=ending,
        output_file_id=new_file_id() if sized.output_bytes else None,
        error_file_id=new_file_id() if sized.error_bytes else None,
    )
    await keeper.patiently(partial(keeper.change, named, "finalizing"))


async def publish(keeper: BatchState, means: JobDeps) -> None:
    """Twice does no harm: the files' names are on disk, and they are moved, not copied."""
    batch, now = keeper.batch, means.wall()
    keeper.results.close()
    assert batch.ending is not None
    kept = batch.output_seconds or means.config.retention_days * 86_400.0
    made = []
    for file_id, size, path, name in (
        (batch.output_file_id, batch.output_bytes, means.folder.output_of(batch.id), "output"),
        (batch.error_file_id, batch.error_bytes, means.folder.errors_of(batch.id), "error"),
    ):
        if file_id is not None:
            await asyncio.to_thread(means.folder.publish, path, file_id, size)
            filename = f"{batch.id}_{name}.jsonl"
            made.append(StoredFile(file_id, batch.owner, filename, "batch_output", size, now, now + kept))
    ended = keeper.in_status(batch, batch.ending)
    await means.store.end(ended, made)
    keeper.results.batch = ended
    await asyncio.to_thread(means.folder.clear, batch.id)
    _log.info("batch ended", batch=batch.id, status=ended.status, completed=ended.counts.completed)
