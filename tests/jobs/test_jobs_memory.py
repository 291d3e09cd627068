"""A hundred thousand lines are never all in memory: neither while they are looked at nor while they are answered."""

import os
from pathlib import Path

import psutil
import pytest

from appliance.core import Usage
from appliance.jobs.manager import new_batch_id
from appliance.jobs.models import Batch, BatchLine, BatchTerms, LineAnswer, StoredFile
from appliance.jobs.storage.files import new_file_id
from tests.jobs.office import CHAT, Answers, Office, line, until

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(300)]

LINES = 100_000
TEXT = "what is it that holds the world together, " * 12
MOST_BYTES = 100_000_000
"""The lines alone, parsed, would take three times as much. What grows are two digests a line."""


def short(one: BatchLine, terms: BatchTerms) -> LineAnswer:
    return LineAnswer(200, {"of": one.number}, "r", "onsite", Usage(10, 2), 0.0)


async def test_a_hundred_thousand_lines_are_never_held_together(tmp_path: Path) -> None:
    office = Office(tmp_path, Answers(together=True, reply=short))
    process, most = psutil.Process(os.getpid()), 0
    async with office.desk() as desk:
        file_id = new_file_id()
        with desk.folder.receive_upload(file_id) as receiver:
            for number in range(1, LINES + 1):
                receiver.write(line(number, f"{number}: {TEXT}").encode() + b"\n")
            receiver.commit()
        assert receiver.size_bytes > 50_000_000
        await desk.store.add_file(StoredFile(file_id, "k", "in.jsonl", "batch", receiver.size_bytes, 0.0, None))
        before = process.memory_info().rss
        made = Batch(new_batch_id(), "k", CHAT, file_id, "24h", office.wall, office.wall + 86_400)
        await desk.create(made)

        async def over() -> bool:
            nonlocal most
            most = max(most, process.memory_info().rss - before)
            found = await desk.store.get_batch(made.id)
            return found is not None and found.is_over

        await until(over, 280)
        found = await desk.store.get_batch(made.id)
    assert found is not None
    assert found.counts.completed == LINES
    assert most < MOST_BYTES, f"{most / 1e6:.0f} MB"
