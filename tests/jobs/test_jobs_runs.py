"""Batches from their beginning to every end there is, with crashes, a full disk and a clock that the tests drive."""

import asyncio
import json
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from appliance.errors import StorageFull
from appliance.jobs.models import Batch, BatchLine, BatchTerms, LineAnswer
from appliance.jobs.storage.result_files import ResultFile
from appliance.jobs.storage.store import JobStore
from tests.jobs.office import HOSTED, Answers, Office, answered, ended, line, rows, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


async def test_every_line_is_answered_once_and_counted(office: Office) -> None:
    async with office.desk() as desk:
        batch = await ended(desk, await office.batch(desk, [line(n) for n in range(1, 301)]))
        found = rows(desk, batch.output_file_id)
    assert batch.status == "completed"
    assert (batch.counts.total, batch.counts.completed, batch.counts.failed) == (300, 300, 0)
    assert sorted(row["line"] for row in found) == list(range(1, 301))
    assert all(row["response"]["body"]["echo"] == f"question {row['line']}" for row in found)
    assert batch.usage.prompt_tokens == 3000
    assert batch.error_file_id is None
    assert list(batch.times) == ["in_progress", "finalizing", "completed"]


async def test_a_mistake_costs_its_own_line(office: Office) -> None:
    lines: list[str | bytes] = [line(1), "{broken", line(1), b"\xff\xfe", line(5)]
    async with office.desk() as desk:
        batch = await ended(desk, await office.batch(desk, lines))
        bad = rows(desk, batch.error_file_id)
        assert len(rows(desk, batch.output_file_id)) == 2
    assert batch.status == "completed"
    assert (batch.counts.total, batch.counts.completed, batch.counts.failed) == (5, 2, 3)
    assert [(row["line"], row["error"]["code"]) for row in bad] == [
        (2, "invalid_json_line"),
        (3, "duplicate_custom_id"),
        (4, "invalid_encoding"),
    ]
    assert [one.line for one in batch.problems] == [2, 3, 4]


@pytest.mark.parametrize(
    ("lines", "code"), [([], "empty_file"), (["", " "], "empty_file"), (["{", "["], "invalid_json_line")]
)
async def test_a_file_with_nothing_to_ask_fails(office: Office, lines: list[str], code: str) -> None:
    async with office.desk() as desk:
        batch = await ended(desk, await office.batch(desk, lines))
    assert batch.status == "failed"
    assert batch.problems[0].code == code
    assert office.answers.asked == []


async def test_too_many_lines_fail_before_anything_is_asked(office: Office) -> None:
    office.config = office.config.model_copy(update={"max_lines": 700})
    async with office.desk() as desk:
        batch = await ended(desk, await office.batch(desk, [line(n) for n in range(1, 1200)]))
    assert batch.status == "failed"
    assert batch.problems[0].code == "too_many_lines"
    assert office.answers.asked == []


async def test_identical_lines_are_asked_once_and_copied(office: Office) -> None:
    texts = ["same" if n % 3 else f"other {n}" for n in range(1, 31)]
    async with office.desk() as desk:
        batch = await ended(desk, await office.batch(desk, [line(n, text) for n, text in enumerate(texts, 1)]))
        found = {row["custom_id"]: row["response"]["body"]["echo"] for row in rows(desk, batch.output_file_id)}
    assert found == {f"c{n}": text for n, text in enumerate(texts, 1)}
    assert len(office.answers.asked) == 11
    assert (batch.counts.completed, batch.counts.copied, batch.counts.onsite) == (30, 19, 11)
    assert batch.cost_usd == pytest.approx(11 * 0.5)


async def test_identical_lines_that_sample_are_each_asked(office: Office) -> None:
    body = {"temperature": 0.8, "seed": 3, "messages": [{"role": "user", "content": "a name for a cat"}]}
    async with office.desk() as desk:
        batch = await ended(desk, await office.batch(desk, [line(n, body=body) for n in range(1, 6)]))
    assert sorted(office.answers.asked) == [(n,) for n in range(1, 6)]
    assert (batch.counts.completed, batch.counts.copied) == (5, 0)


async def test_a_refusal_is_copied_too_and_counts_as_failed(office: Office) -> None:
    office.answers.reply = lambda one, terms: LineAnswer(400, {"error": {"message": "no"}}, "r")
    async with office.desk() as desk:
        batch = await ended(desk, await office.batch(desk, [line(n, "same") for n in range(1, 4)]))
        bad = rows(desk, batch.error_file_id)
    assert [row["custom_id"] for row in bad] == ["c1", "c2", "c3"]
    assert all(row["response"]["status_code"] == 400 for row in bad)
    assert (batch.status, batch.counts.failed) == ("completed", 3)
    assert len(office.answers.asked) == 1


async def test_what_was_busy_is_asked_again_when_its_time_has_come(office: Office) -> None:
    tries: list[int] = []

    def reply(one: BatchLine, terms: BatchTerms) -> LineAnswer:
        tries.append(one.number)
        busy = one.number == 1 and tries.count(1) < 7
        again = LineAnswer(429, {"error": {"message": "full"}}, "r", retry_after_seconds=5.0)
        return again if busy else answered(one)

    office.answers.reply = reply
    async with office.desk() as desk:
        made = await office.batch(desk, [line(1), line(2)])
        for count in range(1, 7):
            await until(lambda count=count: tries.count(1) == count)  # type: ignore[misc]
            office.clock += 100.0
            desk.wake()
        batch = await ended(desk, made)
    assert (batch.counts.completed, tries.count(1)) == (2, 7)


async def test_a_target_that_keeps_failing_is_given_up(office: Office) -> None:
    office.answers.reply = lambda one, terms: LineAnswer(502, {"error": {}}, "r", retry_after_seconds=1.0)
    async with office.desk() as desk:
        made = await office.batch(desk, [line(1)])
        for count in range(1, 5):
            await until(lambda count=count: len(office.answers.asked) == count)  # type: ignore[misc]
            office.clock += 100.0
            desk.wake()
        batch = await ended(desk, made)
    assert (batch.counts.failed, len(office.answers.asked)) == (1, 4)


async def test_a_cancelled_batch_keeps_what_it_has_and_names_the_rest(office: Office) -> None:
    office.answers.allow = asyncio.Semaphore(3)
    async with office.desk() as desk:
        made = await office.batch(desk, [line(n) for n in range(1, 51)])
        await until(lambda: len(office.answers.asked) >= 6)
        cancelling = await desk.cancel(desk.current_batch(made))
        assert cancelling.status == "cancelling"
        batch = await ended(desk, made)
        good, bad = rows(desk, batch.output_file_id), rows(desk, batch.error_file_id)
    assert batch.status == "cancelled"
    assert len(good) == 3
    assert {row["line"] for row in good} | {row["line"] for row in bad} == set(range(1, 51))
    assert all(row["error"]["code"] == "batch_cancelled" for row in bad)
    assert office.answers.under_way == 0


async def test_what_is_not_done_in_time_expires(office: Office) -> None:
    office.answers.allow = asyncio.Semaphore(2)
    async with office.desk() as desk:
        made = await office.batch(desk, [line(n) for n in range(1, 11)], seconds=60)
        await until(lambda: len(office.answers.asked) >= 5)
        office.wall += 61
        desk.wake()
        batch = await ended(desk, made)
        bad = rows(desk, batch.error_file_id)
    assert batch.status == "expired"
    assert (batch.counts.completed, batch.counts.failed) == (2, 8)
    assert {row["error"]["code"] for row in bad} == {"batch_expired"}


async def test_a_stop_of_the_node_loses_nothing_and_doubles_nothing(office: Office) -> None:
    office.answers.allow = asyncio.Semaphore(20)
    async with office.desk() as desk:
        made = await office.batch(desk, [line(n) for n in range(1, 101)])
        await until(lambda: len(office.answers.asked) >= 24)
    before = len(office.answers.asked)
    office.answers = Answers()
    async with office.desk() as desk:
        batch = await ended(desk, made)
        found = rows(desk, batch.output_file_id)
    assert sorted(row["line"] for row in found) == list(range(1, 101))
    assert batch.counts.completed == 100
    assert before + len(office.answers.asked) <= 100 + 6  # only what was under way is asked again


async def test_bytes_that_were_not_committed_are_cut_off(office: Office) -> None:
    """As after a crash between writing and committing."""
    office.answers.allow = asyncio.Semaphore(5)
    async with office.desk() as desk:
        made = await office.batch(desk, [line(n) for n in range(1, 11)])
        await until(lambda: len(office.answers.asked) >= 9)
    torn = desk.folder.output_path(made.id)
    with torn.open("ab") as file:
        file.write(b'{"id":"batch_req_x","custom_id":"c9","line":9,"resp')
    office.answers = Answers()
    async with office.desk() as desk:
        batch = await ended(desk, made)
        found = rows(desk, batch.output_file_id)
    assert sorted(row["line"] for row in found) == list(range(1, 11))


async def test_a_crash_while_results_become_files_is_made_good(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    crashed = asyncio.Event()
    async with office.desk() as desk:

        async def crash(*_: object) -> None:
            crashed.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(desk.store, "end_batch", crash)
        made = await office.batch(desk, [line(1), "{"])
        await asyncio.wait_for(crashed.wait(), 20)
    async with office.desk() as desk:
        batch = await ended(desk, made)
        assert batch.status == "completed"
        assert len(rows(desk, batch.output_file_id)) == len(rows(desk, batch.error_file_id)) == 1
        assert await desk.store.get_file(batch.output_file_id or "") is not None


async def test_a_full_disk_pauses_and_is_told_and_the_job_goes_on(office: Office) -> None:
    async with office.desk() as desk:
        office.free_then = 10
        made = await office.batch(desk, [line(n) for n in range(1, 11)])
        await until(lambda: (desk.progress(made.id) or pytest.fail("ended")).state == "paused")
        progress = desk.progress(made.id)
        assert progress is not None
        assert "free some space" in progress.reason
        assert desk.current_batch(made).status == "in_progress"
        assert ("jobs_paused", made.id) in office.alerts.warnings
        assert office.answers.asked == []
        office.free = 10**12
        office.clock += 100
        desk.wake()
        batch = await ended(desk, made)
    assert batch.counts.completed == 10
    assert office.alerts.warnings == {}


async def test_results_that_find_no_room_are_written_later(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    full = True
    append = ResultFile.append_rows

    def refusing(self: ResultFile, data: list[bytes]) -> object:
        if full:
            raise StorageFull("no space is left")
        return append(self, data)

    monkeypatch.setattr(ResultFile, "append_rows", refusing)
    async with office.desk() as desk:
        made = await office.batch(desk, [line(n) for n in range(1, 6)])
        await until(lambda: len(office.answers.asked) == 5 or ("jobs_paused", made.id) in office.alerts.warnings)
        office.clock += 1
        await until(lambda: ("jobs_paused", made.id) in office.alerts.warnings)
        full = False
        desk.wake()
        batch = await ended(desk, made)
        assert sorted(row["line"] for row in rows(desk, batch.output_file_id)) == [1, 2, 3, 4, 5]
    assert len(office.answers.asked) == 5  # what was answered is not asked again


async def test_outside_its_hours_a_job_waits_and_says_so(office: Office) -> None:
    now = datetime.fromtimestamp(office.wall)
    begin, end = now + timedelta(hours=2), now + timedelta(hours=3)
    hours = f"{begin:%H:%M}-{end:%H:%M}"
    office.config = office.config.model_copy(update={"hours": (hours,)})
    async with office.desk() as desk:
        made = await office.batch(desk, [line(1)])
        await until(lambda: (desk.progress(made.id) or pytest.fail("ended")).state == "paused")
        progress = desk.progress(made.id)
        assert progress is not None
        assert hours in progress.reason
        assert office.answers.asked == []
        office.wall += 2 * 3600 + 60
        desk.wake()
        assert (await ended(desk, made)).counts.completed == 1


async def test_a_batch_whose_end_finds_no_room_ends_later(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    full = True
    async with office.desk() as desk:
        save = desk.store.save_batch

        async def refusing(batch: Batch) -> None:
            if full and batch.status == "finalizing":
                raise StorageFull("no space is left")
            await save(batch)

        monkeypatch.setattr(desk.store, "save_batch", refusing)
        made = await office.batch(desk, [line(1)])
        await until(lambda: ("jobs_paused", made.id) in office.alerts.warnings)
        assert desk.current_batch(made).status == "in_progress"
        full = False
        desk.wake()
        assert (await ended(desk, made)).counts.completed == 1


async def test_two_batches_share_the_engine(office: Office) -> None:
    office.answers.allow = asyncio.Semaphore(0)
    async with office.desk() as desk:
        first = await office.batch(desk, [line(n) for n in range(1, 31)])
        await until(lambda: office.answers.under_way == 6)
        second = await office.batch(desk, [line(n) for n in range(1, 31)])
        await until(lambda: desk.current_batch(second).status == "in_progress")
        for _ in range(60):
            office.answers.allow.release()
        await ended(desk, first)
        await ended(desk, second)
    order = [terms.batch_id for terms in office.answers.terms]
    middle = order[6:46]
    assert 12 <= middle.count(second.id) <= 28


async def test_a_file_deleted_while_its_job_runs_does_not_disturb_it(office: Office) -> None:
    office.answers.allow = asyncio.Semaphore(1)
    async with office.desk() as desk:
        made = await office.batch(desk, [line(n) for n in range(1, 301)])
        await until(lambda: len(office.answers.asked) >= 6)
        assert await desk.remove_file(made.input_file_id)
        for _ in range(300):
            office.answers.allow.release()
        batch = await ended(desk, made)
        assert batch.counts.completed == 300
        assert not desk.folder.input_path(made.id).exists()


async def test_a_file_that_is_gone_before_validation_fails_the_batch(office: Office) -> None:
    async with office.desk() as desk:
        file = await office.upload(desk, [line(1)])
        desk.folder.remove_file(file.id)
        made = await office.batch(desk, [line(1)])
        from dataclasses import replace

        from appliance.jobs.manager import new_batch_id

        lost = await desk.create(replace(made, id=new_batch_id(), input_file_id=file.id))
        batch = await ended(desk, lost)
    assert batch.status == "failed"
    assert batch.problems[0].code == "file_not_found"


async def test_a_revoked_key_ends_its_batches(office: Office) -> None:
    office.answers.key_is_known = False
    async with office.desk() as desk:
        batch = await ended(desk, await office.batch(desk, [line(1), line(2)]))
        assert len(rows(desk, batch.error_file_id)) == 2
    assert batch.status == "failed"
    assert batch.problems[0].code == "invalid_api_key"


async def test_lines_of_a_kind_are_asked_together(office: Office) -> None:
    office.answers.together = True
    async with office.desk() as desk:
        batch = await ended(desk, await office.batch(desk, [line(n) for n in range(1, 101)]))
    assert batch.counts.completed == 100
    assert max(len(numbers) for numbers in office.answers.asked) == 32
    assert len(office.answers.asked) == 4


async def test_no_more_is_under_way_than_keeps_the_engine_busy(office: Office) -> None:
    async with office.desk() as desk:
        await ended(desk, await office.batch(desk, [line(n) for n in range(1, 101)]))
    assert office.answers.most_under_way == 6


@pytest.mark.parametrize(
    ("residency", "leaves"), [("any", True), ("region:EU", True), ("region:US", False), ("onsite", False)]
)
async def test_what_would_be_late_leaves_unless_it_is_bound(office: Office, residency: str, leaves: bool) -> None:
    office.targets = (*office.targets, HOSTED)
    office.answers.allow = asyncio.Semaphore(0)
    async with office.desk() as desk:
        made = await office.batch(desk, [line(n) for n in range(1, 101)], seconds=60, residency=residency)
        await until(lambda: len(office.answers.asked) == 6)
        for _ in range(12):
            office.answers.allow.release()
        await until(lambda: len(office.answers.asked) == 18)
        office.clock += 10.0  # some twelve lines in ten seconds: not even half will be done in a minute
        desk.wake()
        if leaves:
            await until(lambda: sum(terms.patience_seconds == 0.0 for terms in office.answers.terms) == 8)
        progress = desk.progress(made.id)
        assert progress is not None
        await until(lambda: (desk.progress(made.id) or progress).late_lines > 0)
        gone = [terms for terms in office.answers.terms if terms.patience_seconds == 0.0]
        assert len(gone) == (8 if leaves else 0)
        assert all(terms.residency == residency for terms in office.answers.terms)


async def test_files_and_batches_that_have_had_their_time_are_removed(office: Office) -> None:
    async with office.desk() as desk:
        batch = await ended(desk, await office.batch(desk, [line(1)]))
        assert batch.output_file_id is not None
        office.wall += 31 * 86_400
        await desk.remove_expired()
        assert await desk.store.get_file(batch.output_file_id) is None
        assert not desk.folder.file_path(batch.output_file_id).exists()
        assert await desk.store.get_batch(batch.id) is None


async def test_a_cleanup_that_fails_unexpectedly_is_seen_on_the_health_page(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> list[str]:
        raise RuntimeError("a defect")

    monkeypatch.setattr(JobStore, "list_expired_files", fail)
    async with office.desk():
        await until(lambda: ("control_task_failed", "cleanup of job files") in office.alerts.warnings)


async def test_what_a_crash_left_of_an_upload_is_swept_away(office: Office) -> None:
    async with office.desk() as desk:
        file = await office.upload(desk, [line(1)])
        folder = desk.folder.file_path(file.id).parent
        (folder / "file-00000000000000000000000000000000.part").write_bytes(b"half")
    async with office.desk():
        assert [path.name for path in folder.iterdir()] == [file.id]


@pytest.mark.slow
async def test_a_hundred_thousand_lines_go_through_with_a_broken_one(office: Office) -> None:
    office.answers.together = True
    lines = [line(n) for n in range(1, 100_001)]
    lines[69_999] = lines[69_999][:-5]
    async with office.desk() as desk:
        made = await office.batch(desk, lines)
        del lines

        async def over() -> bool:
            found = await desk.store.get_batch(made.id)
            return found is not None and found.is_over

        await until(over, 110)
        batch = await desk.store.get_batch(made.id)
        assert batch is not None
        assert (batch.counts.completed, batch.counts.failed) == (99_999, 1)
        assert [row["line"] for row in rows(desk, batch.error_file_id)] == [70_000]
        with desk.folder.file_path(batch.output_file_id or "").open() as file:
            assert sum(json.loads(row)["line"] for row in file) == 100_000 * 100_001 // 2 - 70_000
