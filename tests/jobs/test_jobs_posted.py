"""Lines that leave in a provider's own batch: which, for how much, and that a crash pays for none of them twice."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from appliance.jobs.manager import JobManager
from appliance.jobs.models import Batch
from tests.jobs.office import Answers, ended, rows, until
from tests.jobs.posted import LOCAL_FIRST, WEEK, PostOffice, chat
from tests.providers.batches_api import BatchesApi
from tests.providers.speech import Fail

pytestmark = pytest.mark.anyio

DAY = 86_400.0
LINE_USD = (1000 * 2.0 + 500 * 8.0) / 1e6 / 2
"""What the stand-in says it took, at half the price."""


@pytest.fixture
async def provider() -> AsyncIterator[BatchesApi]:
    async with BatchesApi() as made:
        yield made


@pytest.fixture
def office(tmp_path: Path, provider: BatchesApi) -> PostOffice:
    return PostOffice(tmp_path, provider.address)


def said(desk: JobManager, batch: Batch) -> dict[str, str]:
    found = rows(desk, batch.output_file_id)
    names = [row["custom_id"] for row in found]
    assert len(set(names)) == len(names), "a line was answered twice"
    return {row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"] for row in found}


def expected(numbers: Sequence[int]) -> dict[str, str]:
    return {f"c{number}": f"re: question {number}" for number in numbers}


async def nudged_until_ended(desk: JobManager, batch: Batch) -> Batch:
    async def is_over() -> bool:
        desk.wake()
        found = await desk.store.get_batch(batch.id)
        return found is not None and found.is_over and desk.progress(batch.id) is None

    await until(is_over)
    return await ended(desk, batch)


async def test_lines_whose_route_begins_with_the_provider_leave_in_its_batch_for_half_the_price(
    office: PostOffice, provider: BatchesApi
) -> None:
    async with office.desk() as desk:
        batch = await ended(desk, await office.batch(desk, [chat(n) for n in range(1, 41)]))
        assert said(desk, batch) == expected(range(1, 41))
        kept = rows(desk, batch.output_file_id)
    assert provider.wrongs == []
    assert [job.asked["endpoint"] for job in provider.jobs.values()] == ["/v1/chat/completions"]
    assert provider.alone == []
    assert batch.counts.hosted == 40
    assert batch.cost_usd == pytest.approx(40 * LINE_USD)
    assert office.ledger.usd == pytest.approx(40 * LINE_USD)
    assert set(office.ledger.settled) == set(office.ledger.reserved)
    outcomes = {outcome.decision_id: outcome for outcome in office.ledger.outcomes}
    assert set(outcomes) == {row["response"]["decision_id"] for row in kept}
    for outcome in outcomes.values():
        (attempt,) = outcome.attempts
        assert (attempt.target, attempt.result, attempt.location) == ("cloud/big", "answered", "hosted")
        assert attempt.reason.startswith("in batch batch_theirs_1: ")
        assert attempt.cost_usd == pytest.approx(LINE_USD)
        assert attempt.reservation in office.ledger.reserved


async def test_what_the_provider_kept_is_deleted_once_it_was_read(office: PostOffice, provider: BatchesApi) -> None:
    async with office.desk() as desk:
        await ended(desk, await office.batch(desk, [chat(1), chat(2)]))
    assert provider.files == {}


async def test_all_money_is_put_aside_before_anything_is_sent(office: PostOffice, provider: BatchesApi) -> None:
    provider.stop_at = ("POST", "/files", "before")
    async with office.desk() as desk:
        await office.batch(desk, [chat(n) for n in range(1, 31)])
        await provider.stopped.wait()
        assert len(office.ledger.reserved) == 30
        assert office.ledger.settled == {}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"discount": None}, "unknown is not cheaper"),
        ({"seconds": 1.05 * DAY}, "no time for a provider's day and what it leaves"),
        ({"residency": "onsite"}, "bound by its maker"),
        ({"residency": "region:US", "region": "EU"}, "bound to another region"),
    ],
)
async def test_lines_that_may_not_or_had_better_not_leave_so_do_not(
    office: PostOffice, provider: BatchesApi, fields: dict[str, Any], why: str
) -> None:
    office.discount, office.region = fields.pop("discount", 0.5), fields.pop("region", None)
    async with office.desk() as desk:
        await office.batch(desk, [chat(n) for n in range(1, 6)], **{"seconds": WEEK, **fields})
        if "residency" in fields:
            await until(lambda: any(outcome.status != 200 for outcome in office.ledger.outcomes))
        else:
            await until(lambda: len(provider.alone) == 5)
    assert provider.jobs == {}, why
    assert provider.uploads == 0


async def test_a_bound_line_stays_while_the_others_leave(office: PostOffice, provider: BatchesApi) -> None:
    long = "what is it that holds the world together, " * 60
    async with office.desk() as desk:
        made = await office.batch(desk, [chat(1), chat(2, long), chat(3)])
        await until(lambda: (desk.current_batch(made).counts.completed) == 2)
        assert "together" not in str(provider.bodies)
        assert {name.rpartition("-")[2] for name in provider.paid} == {"1", "3"}
        assert provider.alone == []


async def test_lines_beyond_the_budget_are_not_sent(office: PostOffice, provider: BatchesApi) -> None:
    office.ledger.limit_usd = 0.0
    async with office.desk() as desk:
        made = await office.batch(desk, [chat(1)])
        await until(lambda: "spent" in (desk.progress(made.id) or pytest.fail("ended")).reason)
        assert provider.paths == []
        office.ledger.limit_usd = 0.005
        second = await office.batch(desk, [chat(n) for n in range(1, 41)])
        await until(lambda: desk.current_batch(second).counts.completed >= 8)
        assert sum(provider.paid.values()) < 40


async def test_what_would_be_late_on_site_leaves_in_a_batch(office: PostOffice, provider: BatchesApi) -> None:
    office.policy, office.engine, allow = LOCAL_FIRST, True, asyncio.Semaphore(0)
    answers = office.answers = Answers(allow=allow)
    async with office.desk() as desk:
        made = await office.batch(desk, [chat(n) for n in range(1, 301)])
        await until(lambda: len(answers.asked) == 6)
        for _ in range(12):
            allow.release()
        await until(lambda: len(answers.asked) == 18)
        assert provider.uploads == 0
        office.clock += 60_000.0  # twelve lines in so long: not half of them will be done in a week
        office.scene.publish()
        desk.wake()
        await until(lambda: bool(provider.jobs))
        await until(lambda: desk.current_batch(made).counts.hosted >= 128)
        for _ in range(300):
            allow.release()
        batch = await nudged_until_ended(desk, made)
    assert batch.counts.completed == 300
    assert batch.counts.hosted + batch.counts.onsite == 300
    assert 128 <= batch.counts.hosted < 290
    assert all(terms.patience_seconds > 0 for terms in answers.terms), "none left singly"
    assert set(provider.paid.values()) == {1}


async def test_lines_that_failed_or_were_left_there_are_asked_singly(office: PostOffice, provider: BatchesApi) -> None:
    provider.fails, provider.leaves, provider.at_once = {"3": 500, "4": 400}, {"7"}, False
    async with office.desk() as desk:
        made = await office.batch(desk, [chat(n) for n in range(1, 11)])
        await until(lambda: bool(provider.jobs))
        provider.finish("expired")
        batch = await nudged_until_ended(desk, made)
        assert said(desk, batch) == expected(range(1, 11))
    assert len(provider.jobs) == 1
    assert sorted(body["messages"][0]["content"] for body in provider.alone) == [
        "question 3", "question 4", "question 7",
    ]  # fmt: skip
    assert office.ledger.usd == pytest.approx(7 * LINE_USD + 3 * LINE_USD * 2)


async def test_a_batch_that_is_refused_costs_nothing_and_its_lines_are_asked_singly(
    office: PostOffice, provider: BatchesApi
) -> None:
    provider.refuses = Fail(400, "invalid_request_error", "no batches for you")
    async with office.desk() as desk:
        batch = await nudged_until_ended(desk, await office.batch(desk, [chat(n) for n in range(1, 5)]))
        assert said(desk, batch) == expected(range(1, 5))
    assert (len(provider.alone), provider.files) == (4, {})
    assert set(office.ledger.settled) == set(office.ledger.reserved)
    assert office.ledger.usd == pytest.approx(4 * LINE_USD * 2)


async def test_cancelling_cancels_there_too_and_what_was_done_is_used(office: PostOffice, provider: BatchesApi) -> None:
    provider.at_once, provider.leaves = False, {str(number) for number in range(6, 11)}
    async with office.desk() as desk:
        made = await office.batch(desk, [chat(n) for n in range(1, 11)])
        await until(
            lambda: (desk.progress(made.id) or pytest.fail("ended")).lines_at_providers == 10 and bool(provider.jobs)
        )
        await desk.cancel(desk.current_batch(made))
        batch = await nudged_until_ended(desk, made)
        assert said(desk, batch) == expected(range(1, 6))
        assert {row["custom_id"] for row in rows(desk, batch.error_file_id)} == {f"c{n}" for n in range(6, 11)}
    assert batch.status == "cancelled"
    assert [job.status for job in provider.jobs.values()] == ["cancelled"]
    assert provider.alone == []


async def test_what_is_not_back_in_time_is_taken_out_and_asked_singly(office: PostOffice, provider: BatchesApi) -> None:
    provider.at_once, provider.leaves = False, {"2"}
    async with office.desk() as desk:
        made = await office.batch(desk, [chat(1), chat(2)], seconds=1.2 * DAY)
        await until(lambda: bool(provider.jobs))
        office.wall += 1.15 * DAY
        batch = await nudged_until_ended(desk, made)
        assert said(desk, batch) == expected([1, 2])
    assert len(provider.alone) == 1


STOPS = [
    (method, path, when)
    for method, path in (
        ("POST", "/files"), ("POST", "/batches"), ("GET", "/batches/"), ("GET", "/files/"), ("DELETE", "/files/"),
    )
    for when in ("before", "after")
]  # fmt: skip


@pytest.mark.parametrize("stop", STOPS)
async def test_a_crash_at_any_step_loses_no_line_and_pays_for_none_twice(
    office: PostOffice, provider: BatchesApi, stop: tuple[str, str, str]
) -> None:
    provider.stop_at = stop
    async with office.desk() as desk:
        made = await office.batch(desk, [chat(n) for n in range(1, 31)])
        await asyncio.wait_for(provider.stopped.wait(), 20)
    provider.stop_at = None
    async with office.desk() as desk:
        batch = await nudged_until_ended(desk, made)
        assert said(desk, batch) == expected(range(1, 31))
    assert batch.counts.completed == 30
    assert set(provider.paid.values()) == {1}
    assert provider.alone == []
    assert office.ledger.usd == pytest.approx(30 * LINE_USD)


async def test_a_crash_while_results_are_read_answers_no_line_twice(
    office: PostOffice, provider: BatchesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = 0
    async with office.desk() as desk:
        commit = desk.store.commit_lines

        async def cut(*args: Any) -> None:
            nonlocal commits
            commits += 1
            if commits == 2:
                raise RuntimeError("the power is gone")
            await commit(*args)

        monkeypatch.setattr(desk.store, "commit_lines", cut)
        made = await office.batch(desk, [chat(n) for n in range(1, 201)])
        await until(lambda: commits == 2 and made.id not in desk.running)
        monkeypatch.undo()
    async with office.desk() as desk:
        batch = await nudged_until_ended(desk, made)
        assert said(desk, batch) == expected(range(1, 201))
    assert (len(provider.jobs), set(provider.paid.values())) == (1, {1})


async def test_a_provider_that_took_the_batch_and_did_not_say_so_is_asked_for_it(
    office: PostOffice, provider: BatchesApi
) -> None:
    create = provider._create

    def dumb(body: dict[str, Any]) -> Any:
        create(body)
        return provider._failed(Fail(504, "timeout"))

    provider._create = dumb  # type: ignore[method-assign]
    async with office.desk() as desk:
        batch = await nudged_until_ended(desk, await office.batch(desk, [chat(n) for n in range(1, 6)]))
        assert said(desk, batch) == expected(range(1, 6))
    assert (len(provider.jobs), set(provider.paid.values()), provider.alone) == (1, {1}, [])


async def test_mistral_has_jobs_and_other_words_for_the_same(tmp_path: Path) -> None:
    async with BatchesApi(mistral=True) as provider:
        office = PostOffice(tmp_path, provider.address, kind="mistral")
        provider.stop_at = ("POST", "/batch/jobs", "after")
        async with office.desk() as desk:
            made = await office.batch(desk, [chat(n) for n in range(1, 6)])
            await asyncio.wait_for(provider.stopped.wait(), 20)
        provider.stop_at = None
        async with office.desk() as desk:
            batch = await nudged_until_ended(desk, made)
            assert said(desk, batch) == expected(range(1, 6))
        assert provider.wrongs == []
        assert set(provider.paid.values()) == {1}
        (job,) = provider.jobs.values()
        assert (job.asked["model"], job.asked["timeout_hours"]) == ("big", 24)
