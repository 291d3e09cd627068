"""The report's figures, exact to the nano-dollar, and the same whether the node runs or not."""

import asyncio
import json
import random
from pathlib import Path

import pytest

from appliance.core import Usage
from appliance.ledger.report import offline_report
from appliance.ledger.store import Ledger
from tests.ledger.samples import HOSTED, NOW_AT, hosted_attempt, onsite_attempt, outcome, url_in

pytestmark = pytest.mark.anyio


async def test_a_period_is_summed_by_target(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path), clock=lambda: NOW_AT)
    settled = await ledger.reserve(decision_id="dec_2", target=HOSTED, usd=0.5)
    ledger.settle(settled, usd=0.25)
    unsettled = await ledger.reserve(decision_id="dec_3", target=HOSTED, usd=0.125)
    overflowed = onsite_attempt(result="overflowed", usage=Usage(), cost_usd=None, first_byte_seconds=None)
    failed = onsite_attempt(result="failed", usage=Usage(12, 3), cost_usd=None)
    rejected = onsite_attempt(result="rejected")
    ledger.record(outcome("dec_1"))
    ledger.record(outcome("dec_2", overflowed, hosted_attempt(index=1, cost_usd=0.25, reservation=settled)))
    ledger.record(outcome("dec_3", failed, hosted_attempt(index=1, cost_usd=None, reservation=unsettled)))
    ledger.record(outcome("dec_4", rejected, onsite_attempt(index=1, target="onsite/large"), residency="onsite"))
    ledger.record(outcome("dec_5", overflowed, residency="region:EU", status=429, error_code="capacity_exceeded"))
    ledger.record(outcome("later", received_at=NOW_AT + 60))

    report = await ledger.read_report(since_at=NOW_AT, until_at=NOW_AT + 60)

    assert (report.requests, report.answered) == (5, 4)
    assert report.errors == {"capacity_exceeded": 1}
    assert (report.overflowed, report.fell_back, report.escalated) == (2, 1, 1)
    assert report.bound == {"onsite": 1, "region:EU": 1}
    assert (report.left_site, report.onsite_bound_left) == (2, 0)
    by_name = {row.target: row for row in report.targets}
    assert set(by_name) == {"acme/large", "onsite/large", "onsite/small"}
    hosted, small = by_name["acme/large"], by_name["onsite/small"]
    assert (hosted.requests, hosted.share, hosted.cost_usd) == (2, 0.5, 0.375)
    assert (hosted.unsettled, hosted.unsettled_usd, hosted.unpriced_attempts) == (1, 0.125, 0)
    assert (small.requests, small.attempts, small.failed_attempts, small.overflowed_attempts) == (1, 5, 2, 2)
    assert (small.prompt_tokens, small.completion_tokens, small.cached_tokens) == (36, 63, 8)
    assert (small.cost_usd, small.unpriced_attempts) == (0.000_004, 1)
    assert report.cost_usd == 0.375_006
    assert report.prompt_tokens == sum(row.prompt_tokens for row in report.targets)
    assert json.loads(json.dumps(report.to_dict()))["targets"][0]["target"] == "acme/large"
    await ledger.close()

    assert offline_report(url_in(tmp_path), since_at=NOW_AT, until_at=NOW_AT + 60) == report


async def test_a_bound_request_that_left_is_never_overlooked(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path))
    ledger.record(outcome("dec_1", hosted_attempt(), residency="onsite"))

    report = await ledger.read_report(since_at=0, until_at=NOW_AT + 1)

    assert report.onsite_bound_left == 1
    await ledger.close()


async def test_a_hosted_attempt_that_was_never_allowed_out_has_not_left(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path))
    ledger.record(outcome("dec_1", hosted_attempt(result="failed", reservation=None, cost_usd=0.0), status=503))

    assert (await ledger.read_report(since_at=0, until_at=NOW_AT + 1)).left_site == 0
    await ledger.close()


async def test_sums_agree_to_the_nano_dollar_with_a_count_kept_elsewhere(tmp_path: Path) -> None:
    chance = random.Random(7)
    ledger = await Ledger.open(url_in(tmp_path), clock=lambda: NOW_AT)
    usages = [Usage(chance.randrange(1, 5000), chance.randrange(1, 900)) for _ in range(400)]

    async def ask(number: int, usage: Usage) -> None:
        assert HOSTED.price is not None
        cost = HOSTED.price.cost_usd(usage)
        reservation = await ledger.reserve(decision_id=f"dec_{number}", target=HOSTED, usd=2 * cost)
        ledger.settle(reservation, usd=cost)
        ledger.record(outcome(f"dec_{number}", hosted_attempt(usage=usage, cost_usd=cost, reservation=reservation)))

    await asyncio.gather(*(ask(number, usage) for number, usage in enumerate(usages)))
    spent_nano = sum(usage.prompt_tokens * 3_000 + usage.completion_tokens * 15_000 for usage in usages)

    report = await ledger.read_report(since_at=0, until_at=NOW_AT + 1)

    assert round(report.cost_usd * 1e9) == spent_nano
    assert report.targets[0].cost_usd == report.cost_usd
    await ledger.close()


async def test_an_empty_period_is_all_zero(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path))

    report = await ledger.read_report(since_at=0, until_at=1)

    assert (report.requests, report.cost_usd, report.targets, report.bound) == (0, 0, (), {})
    await ledger.close()


async def test_an_offline_report_reads_while_the_node_writes(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path))
    ledger.record(outcome("dec_1"))
    await ledger.flush()

    assert offline_report(url_in(tmp_path), since_at=0, until_at=NOW_AT + 1).requests == 1
    await ledger.close()


async def test_a_path_with_signs_that_mean_something_in_a_url_works(tmp_path: Path) -> None:
    folder = tmp_path / "50% off? #1 über"
    ledger = await Ledger.open(url_in(folder))
    ledger.record(outcome("dec_1"))
    await ledger.flush()
    assert (await ledger.read_report(since_at=0, until_at=NOW_AT + 1)).requests == 1
    await ledger.close()

    assert offline_report(url_in(folder), since_at=0, until_at=NOW_AT + 1).requests == 1
    assert (folder / "ledger.db").exists()


async def test_an_unpriced_local_answer_has_an_unknown_cost_not_none(tmp_path: Path) -> None:
    ledger = await Ledger.open(url_in(tmp_path))
    ledger.record(outcome("dec_1", onsite_attempt(cost_usd=None)))

    story = await ledger.read_decision("dec_1")
    report = await ledger.read_report(since_at=0, until_at=NOW_AT + 1)

    assert story is not None
    assert story["cost_usd"] is None
    assert report.unpriced_attempts == 1
    await ledger.close()
