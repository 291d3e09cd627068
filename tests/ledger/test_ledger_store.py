"""The ledger on a real SQLite file: what goes in comes out, and the event loop never waits for the disk."""

import asyncio
import signal
import stat
import sys
import textwrap
import time
from dataclasses import fields
from pathlib import Path

import pytest
from blockbuster import blockbuster_ctx
from sqlalchemy import Engine, event

from appliance.core import Caller, Outcome, Request
from appliance.errors import LedgerUnavailable
from appliance.ledger.report import offline_report
from appliance.ledger.store import Ledger, LedgerHealth
from tests.ledger.samples import HOSTED, NOW_AT, hosted_attempt, onsite_attempt, outcome, until, url_in

pytestmark = pytest.mark.anyio


async def test_a_decision_can_be_read_back_whole_right_after_it_was_recorded(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path), clock=lambda: NOW_AT)
    reservation = await ledger.reserve(decision_id="dec_1", target=HOSTED, usd=0.02)
    overflowed = onsite_attempt(result="overflowed", detail="3.1 s to the first byte", cost_usd=None)
    ledger.settle(reservation, usd=0.0123)
    ledger.record(outcome("dec_1", overflowed, hosted_attempt(index=1, cost_usd=0.0123, reservation=reservation)))

    story = await ledger.read_decision("dec_1")

    assert story is not None
    assert story["profile"]["task"] == "chat"
    assert story["profile"]["reasons"] == ["chat: no other task fits"]
    assert [attempt["result"] for attempt in story["attempts"]] == ["overflowed", "answered"]
    assert story["attempts"][0]["detail"] == "3.1 s to the first byte"
    assert story["target"] == HOSTED.name
    assert story["location"] == "hosted"
    assert story["excluded"] == [{"target": "acme/tiny", "reason": "context of 2,048 tokens is too short"}]
    assert story["reservations"][0]["reserved_usd"] == 0.02
    assert story["reservations"][0]["settled_usd"] == 0.0123
    assert story["cost_is_final"] is True
    assert await ledger.read_decision("dec_2") is None
    await ledger.close()


async def test_what_was_queued_is_written_when_the_ledger_closes(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path))
    for number in range(1200):
        ledger.record(outcome(f"dec_{number}"))
    await ledger.close()
    await ledger.close()

    assert offline_report(url_in(tmp_path), since_at=0, until_at=NOW_AT + 1).requests == 1200


async def test_the_writer_wakes_up_and_writes_without_being_asked(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path))
    await until(lambda: ledger._shared.is_asleep)
    ledger.record(outcome())
    assert ledger.health().pending == 1

    await until(lambda: ledger.health().pending == 0)

    assert offline_report(url_in(tmp_path), since_at=0, until_at=NOW_AT + 1).requests == 1
    await ledger.close()


async def test_nothing_blocks_the_event_loop(tmp_path: Path) -> None:
    with blockbuster_ctx():
        ledger = await Ledger.open(url_in(tmp_path))
        reservation = await ledger.reserve(decision_id="dec_1", target=HOSTED, usd=0.02)
        ledger.settle(reservation, usd=0.01)
        ledger.record(outcome())
        await ledger.flush()
        assert await ledger.read_decision("dec_1") is not None
        assert (await ledger.read_report(since_at=0, until_at=NOW_AT + 1)).requests == 1
        await ledger.close()


async def test_recording_costs_a_request_less_than_20_microseconds(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path))
    outcomes = [outcome(f"dec_{number}") for number in range(3000)]
    took = []
    for one in outcomes:
        start = time.perf_counter()
        ledger.record(one)
        took.append(time.perf_counter() - start)

    assert sorted(took)[len(took) // 2] < 20e-6
    await ledger.close()


async def test_a_reservation_of_many_requests_at_once_is_one_of_each(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path), clock=lambda: NOW_AT)
    ids = await asyncio.gather(
        *(ledger.reserve(decision_id=f"dec_{number}", target=HOSTED, usd=0.001) for number in range(100))
    )

    report = await ledger.read_report(since_at=NOW_AT, until_at=NOW_AT + 1)

    assert len(set(ids)) == 100
    assert report.unsettled == 100
    assert report.cost_usd == 0.1
    await ledger.close()


async def test_a_reservation_waits_for_the_disk_and_an_outcome_does_not(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path))
    said: list[str] = []

    def listen(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        said.append(statement.split("(")[0].strip())

    event.listen(Engine, "before_cursor_execute", listen)
    try:
        await ledger.reserve(decision_id="dec_1", target=HOSTED, usd=0.02)
        ledger.record(outcome())
        await ledger.flush()
    finally:
        event.remove(Engine, "before_cursor_execute", listen)

    reserving, recording = said.index("INSERT INTO reservations"), said.index("INSERT INTO decisions")
    assert said[reserving - 2 : reserving] == ["PRAGMA synchronous=FULL", "BEGIN IMMEDIATE"]
    assert said[recording - 2 : recording] == ["PRAGMA synchronous=NORMAL", "BEGIN IMMEDIATE"]
    await ledger.close()


async def test_a_caller_who_leaves_while_money_is_reserved_costs_nothing(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path), clock=lambda: NOW_AT)
    waiting = asyncio.create_task(ledger.reserve(decision_id="dec_1", target=HOSTED, usd=5.0))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    report = await ledger.read_report(since_at=0, until_at=NOW_AT + 1)

    assert report.cost_usd == 0
    assert report.unsettled == 0
    assert report.left_site == 0
    await ledger.close()


async def test_only_the_first_settlement_counts(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path), clock=lambda: NOW_AT)
    reservation = await ledger.reserve(decision_id="dec_1", target=HOSTED, usd=0.02)
    ledger.settle(reservation, usd=0.01)
    ledger.settle(reservation, usd=0.5)

    assert (await ledger.read_report(since_at=0, until_at=NOW_AT + 1)).cost_usd == 0.01
    await ledger.close()


@pytest.mark.parametrize("usd", [-0.01, float("nan"), float("inf")])
async def test_what_is_no_amount_of_money_is_refused(tmp_path: Path, usd: float) -> None:
    ledger = await Ledger.open(url_in(tmp_path))
    with pytest.raises(ValueError, match="no amount of US dollars"):
        await ledger.reserve(decision_id="dec_1", target=HOSTED, usd=usd)
    with pytest.raises(ValueError, match="no amount of US dollars"):
        ledger.settle("res_1", usd=usd)
    await ledger.close()


async def test_a_closed_ledger_reserves_nothing_and_counts_what_it_did_not_take(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path))
    await ledger.close()
    ledger.record(outcome())

    with pytest.raises(LedgerUnavailable, match="closed"):
        await ledger.reserve(decision_id="dec_1", target=HOSTED, usd=0.02)
    assert ledger.health().dropped == 1


async def test_an_entry_no_database_takes_is_dropped_and_those_behind_it_are_written(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path))
    ledger.record(outcome("dec_1"))
    ledger.record(outcome("dec_1"))
    ledger.record(outcome("dec_2", total_seconds=float("nan")))
    ledger.record(outcome("dec_3", model="a\ud800b\0c" + "d" * 1000))
    await ledger.flush()

    story = await ledger.read_decision("dec_3")

    assert story is not None
    assert story["model"].startswith("a?b\N{REPLACEMENT CHARACTER}cd")
    assert len(story["model"]) == 200
    assert ledger.health() == LedgerHealth(ok=True, reason="", pending=0, dropped=2)
    await ledger.close()


async def test_absurd_token_counts_of_a_hosted_target_are_cut_to_what_the_column_holds(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path))
    usage = hosted_attempt().usage
    absurd = type(usage)(prompt_tokens=10**30, completion_tokens=-5)
    ledger.record(outcome("dec_1", hosted_attempt(usage=absurd)))

    story = await ledger.read_decision("dec_1")

    assert story is not None
    assert story["attempts"][0]["prompt_tokens"] == 2**63 - 1
    assert story["attempts"][0]["completion_tokens"] == 0
    assert (await ledger.read_report(since_at=0, until_at=NOW_AT + 1)).targets[0].completion_tokens == 0
    await ledger.close()


def contents(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


async def test_prompts_never_reach_the_disk(tmp_path: Path) -> None:
    marker = "xylophone-4711"
    request = Request(
        id="req_1",
        decision_id="dec_1",
        endpoint="chat",
        model="auto",
        body={"messages": [{"role": "user", "content": marker}]},
        text=marker,
        stream=False,
        caller=Caller(key_id="key_1", name="anna"),
        received=1.0,
        received_at=NOW_AT,
    )
    shared_names = {field.name for field in fields(Outcome)} & set(Request.__slots__)
    ledger = await Ledger.open(url_in(tmp_path))
    ledger.record(outcome(**{name: getattr(request, name) for name in shared_names - {"decision_id", "residency"}}))
    await ledger.reserve(decision_id=request.decision_id, target=HOSTED, usd=0.02)
    await ledger.flush()

    written = contents(tmp_path)

    assert b"req_dec_1" in written
    assert marker.encode() not in written
    await ledger.close()


async def test_only_the_owner_can_read_the_files(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path / "new" / "folder"))
    ledger.record(outcome())
    await ledger.flush()

    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new" / "folder").iterdir()}

    assert modes == {0o600}
    await ledger.close()


async def test_old_rows_are_forgotten_and_new_ones_kept(tmp_path: Path) -> None:
    day = 86_400.0
    ledger = await Ledger.open(url_in(tmp_path), clock=lambda: NOW_AT)
    for number in range(1300):
        ledger.record(outcome(f"old_{number}"))
    ledger.record(outcome("new", received_at=NOW_AT + 8 * day))
    await ledger.reserve(decision_id="old_1", target=HOSTED, usd=0.02)
    await ledger.close()

    ledger = await Ledger.open(url_in(tmp_path), retention_days=7, clock=lambda: NOW_AT + 9 * day)
    last = await ledger.read_report(since_at=0, until_at=NOW_AT + 10 * day)
    deadline = time.monotonic() + 20
    while last.requests > 1 or last.cost_usd > 0.01:
        assert time.monotonic() < deadline, f"{last.requests} requests are still there"
        last = await ledger.read_report(since_at=0, until_at=NOW_AT + 10 * day)

    assert await ledger.read_decision("new") is not None
    assert await ledger.read_decision("old_1") is None
    assert [row.attempts for row in last.targets] == [1]
    await ledger.close()


_RESERVES_AND_HANGS = """
    import asyncio, sys
    from tests.ledger.samples import HOSTED, NOW_AT
    from appliance.ledger.store import Ledger

    async def main():
        ledger = await Ledger.open(sys.argv[1], clock=lambda: NOW_AT)
        print(await ledger.reserve(decision_id="dec_1", target=HOSTED, usd=0.25), flush=True)
        await asyncio.Event().wait()

    asyncio.run(main())
"""


async def test_money_reserved_before_a_kill_is_still_counted_after_it(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        textwrap.dedent(_RESERVES_AND_HANGS),
        url_in(tmp_path),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    reservation = (await process.stdout.readline()).decode().strip()
    process.kill()
    assert await process.wait() == -signal.SIGKILL

    offline = offline_report(url_in(tmp_path), since_at=0, until_at=NOW_AT + 1)
    ledger = await Ledger.open(url_in(tmp_path))
    story = await ledger.read_decision("dec_1")
    report = await ledger.read_report(since_at=0, until_at=NOW_AT + 1)

    assert story is not None
    assert story["status"] is None
    assert [item["id"] for item in story["reservations"]] == [reservation]
    assert story["cost_is_final"] is False
    assert (report.cost_usd, report.unsettled_usd, report.unsettled, report.left_site) == (0.25, 0.25, 1, 1)
    assert offline == report
    ledger.settle(reservation, usd=0.1)
    assert (await ledger.read_report(since_at=0, until_at=NOW_AT + 1)).cost_usd == 0.1
    await ledger.close()
