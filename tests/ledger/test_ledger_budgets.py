"""Spending caps: kept in the transaction that reserves, so that calls under way together cannot overshoot them."""

import asyncio
import sqlite3
from pathlib import Path

import pytest

from appliance.errors import BudgetExceeded
from appliance.ledger.budgets import SpendCap
from appliance.ledger.commands import FlushCommand, Reservation, Settlement, WriteResult, WriterState
from appliance.ledger.database import open_writer
from appliance.ledger.store import Ledger
from appliance.ledger.writer import LedgerWriter
from tests.ledger.samples import HOSTED, NOW_AT, url_in

pytestmark = pytest.mark.anyio

DAY = 86_400.0


class Clock:
    def __init__(self) -> None:
        self.at = NOW_AT - NOW_AT % DAY + 3_600.0

    def __call__(self) -> float:
        return self.at


async def reserve(ledger: Ledger, usd: float, *caps: SpendCap) -> str:
    return await ledger.reserve(decision_id="dec_1", target=HOSTED, usd=usd, caps=caps)


async def test_200_calls_at_once_against_a_cap_overshoot_it_by_nothing(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path), clock=Clock())
    cap = SpendCap("all", 0.50)
    results = await asyncio.gather(*(reserve(ledger, 0.01, cap) for _ in range(200)), return_exceptions=True)
    assert sum(isinstance(result, str) for result in results) == 50
    assert sum(isinstance(result, BudgetExceeded) for result in results) == 150
    assert ledger.spent_today == {"all": pytest.approx(0.50)}
    await ledger.close()


async def test_what_a_call_did_not_cost_is_given_back_once(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path), clock=Clock())
    cap = SpendCap("provider:acme", 1.0)
    first = await reserve(ledger, 0.9, cap)
    with pytest.raises(BudgetExceeded, match=r"provider:acme is 1 USD, 0\.900000 of it"):
        await reserve(ledger, 0.2, cap)
    ledger.settle(first, usd=0.1)
    ledger.settle(first, usd=0.0)
    await ledger.flush()
    await reserve(ledger, 0.9, cap)
    with pytest.raises(BudgetExceeded):
        await reserve(ledger, 0.01, cap)
    await ledger.close()


async def test_one_cap_of_several_refuses_and_then_none_is_charged(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path), clock=Clock())
    everything, key = SpendCap("all", 10.0), SpendCap("key:batch", 0.05)
    with pytest.raises(BudgetExceeded, match="key:batch"):
        await reserve(ledger, 0.06, everything, key)
    await reserve(ledger, 0.05, everything, key)
    assert ledger.spent_today == {"all": pytest.approx(0.05), "key:batch": pytest.approx(0.05)}
    await ledger.close()


async def test_a_refusal_says_when_the_budget_is_new_and_the_next_day_is_free_again(tmp_path: Path) -> None:
    clock = Clock()
    ledger = await Ledger.open(url_in(tmp_path), clock=clock)
    cap = SpendCap("all", 0.01)
    await reserve(ledger, 0.01, cap)
    with pytest.raises(BudgetExceeded) as caught:
        await reserve(ledger, 0.01, cap)
    assert caught.value.retry_after_seconds == pytest.approx(DAY - 3_600.0)
    clock.at += DAY
    await reserve(ledger, 0.01, cap)
    await ledger.close()


async def test_a_call_settled_after_midnight_is_given_back_to_the_day_it_was_reserved_on(tmp_path: Path) -> None:
    clock = Clock()
    ledger = await Ledger.open(url_in(tmp_path), clock=clock)
    cap = SpendCap("all", 1.0)
    late = await reserve(ledger, 0.8, cap)
    clock.at += DAY
    await reserve(ledger, 0.9, cap)
    ledger.settle(late, usd=0.1)
    await ledger.close()
    with sqlite3.connect(tmp_path / "ledger.db") as database:
        sums = [nano for (nano,) in database.execute("SELECT nano_usd FROM spend ORDER BY day")]
    assert sums == [100_000_000, 900_000_000]


async def test_a_cap_outlives_a_restart_and_an_open_reservation_counts_as_spent(tmp_path: Path) -> None:
    clock = Clock()
    ledger = await Ledger.open(url_in(tmp_path), clock=clock)
    cap = SpendCap("all", 1.0)
    await reserve(ledger, 0.7, cap)
    await ledger.close()
    again = await Ledger.open(url_in(tmp_path), clock=clock)
    with pytest.raises(BudgetExceeded):
        await reserve(again, 0.4, cap)
    await reserve(again, 0.3, cap)
    await again.close()


async def test_a_scope_without_a_limit_is_counted_all_the_same(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path), clock=Clock())
    await reserve(ledger, 100.0, SpendCap("route:general"))
    assert ledger.spent_today == {"route:general": 100.0}
    await ledger.close()


async def test_a_call_that_could_cost_more_than_can_be_written_is_refused_and_troubles_no_other(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path), clock=Clock())
    cap = SpendCap("all")
    results = await asyncio.gather(*(reserve(ledger, usd, cap) for usd in (0.5, 1e14, 0.5)), return_exceptions=True)
    assert [isinstance(result, str) for result in results] == [True, False, True]
    assert isinstance(results[1], BudgetExceeded)
    assert ledger.health().ok
    assert ledger.spent_today == {"all": pytest.approx(1.0)}
    await ledger.close()


async def test_a_reservation_cancelled_while_the_writer_is_at_its_entries_is_given_back(tmp_path: Path) -> None:
    shared = WriterState()
    writer = LedgerWriter(open_writer(url_in(tmp_path)), shared, retention_days=90, clock=Clock())
    row: dict[str, object] = {
        "reservation_id": "res_1",
        "decision_id": "dec_1",
        "target": HOSTED.name,
        "location": "hosted",
        "reserved_at": NOW_AT,
        "reserved_nano_usd": 5,
        "day": int(NOW_AT // DAY),
        "scopes": '["all"]',
    }
    loop = asyncio.get_running_loop()
    # What the writer finds when both come in after it has looked for reservations and before it takes entries.
    shared.urgent.put(Reservation(row, (SpendCap("all"),), WriteResult(loop, loop.create_future())))
    shared.entries.append(Settlement("res_1", 0, NOW_AT))
    shared.urgent.put(FlushCommand(1, WriteResult(loop, ended := loop.create_future()), is_last=True))
    writer._gather_until = 0.0
    writer._write_entries()
    await asyncio.to_thread(writer.run)
    await ended
    with sqlite3.connect(tmp_path / "ledger.db") as database:
        assert database.execute("SELECT settled_nano_usd FROM reservations").fetchall() == [(0,)]
        assert database.execute("SELECT nano_usd FROM spend").fetchall() == [(0,)]
