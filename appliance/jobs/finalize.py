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


async def end_batch_early(batch_state: BatchState, deps: JobDeps, stopped: JobStopped) -> None:
    """Lines that were not answered are named in the error file, so that none is missing from the results."""
    batch_state.set_run_state("ending", stopped.message)
    while await batch_state.retry_storage(batch_state.results.copy_duplicates):
        pass
    undone = partial(deps.store.list_unfinished_lines, batch_state.batch.id, 0, _UNDONE_AT_ONCE)
    while places := await batch_state.retry_storage(undone):
        await batch_state.retry_storage(
            partial(batch_state.results.commit_unanswered, places, stopped.code, stopped.message)
        )
    problems = batch_state.batch.problems
    if stopped.ending == "failed":
        problems = (BatchProblem(stopped.code, stopped.message), *problems)
    await finalize_batch(batch_state, replace(batch_state.batch, problems=problems), stopped.ending)


async def finalize_batch(batch_state: BatchState, batch: Batch, ending: Ending) -> None:
    """Which files the results become is decided once, and on disk before they are made."""
    sized = batch_state.results.with_sizes(batch)
    named = replace(
        sized,
        ending=ending,
        output_file_id=new_file_id() if sized.output_bytes else None,
        error_file_id=new_file_id() if sized.error_bytes else None,
    )
    await batch_state.retry_storage(partial(batch_state.set_status, named, "finalizing"))


async def publish_results(batch_state: BatchState, deps: JobDeps) -> None:
    """Twice does no harm: the files' names are on disk, and they are moved, not copied."""
    batch, now = batch_state.batch, deps.wall_clock()
    batch_state.results.close()
    assert batch.ending is not None
    kept = batch.output_seconds or deps.config.retention_days * 86_400.0
    made = []
    for file_id, size, path, name in (
        (batch.output_file_id, batch.output_bytes, deps.folder.output_path(batch.id), "output"),
        (batch.error_file_id, batch.error_bytes, deps.folder.error_path(batch.id), "error"),
    ):
        if file_id is not None:
            await asyncio.to_thread(deps.folder.publish_result, path, file_id, size)
            filename = f"{batch.id}_{name}.jsonl"
            made.append(StoredFile(file_id, batch.owner, filename, "batch_output", size, now, now + kept))
    ended = batch_state.with_status(batch, batch.ending)
    await deps.store.end_batch(ended, made)
    batch_state.results.batch = ended
    await asyncio.to_thread(deps.folder.remove_work, batch.id)
    _log.info("batch ended", batch=batch.id, status=ended.status, completed=ended.counts.completed)
