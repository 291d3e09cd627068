"""Budgets as the pipeline puts them to a real ledger."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.config import KeySettings, NodeConfig, parse_policy
from appliance.core import Outcome
from appliance.errors import BudgetExceeded
from appliance.ledger.store import Ledger
from appliance.router.accounting import SpendAccounting, SpendCaps
from tests.ledger.samples import HOSTED, url_in

pytestmark = pytest.mark.anyio

POLICY = """
[[routes]]
name = "general"
targets = ["hosted"]
daily_usd = 2.0
"""


class Seen:
    def __init__(self) -> None:
        self.warnings: dict[str, str] = {}

    def observe_outcome(self, outcome: Outcome) -> None:
        raise AssertionError("nothing ends here")

    def warn(self, code: str, text: str, about: str = "") -> None:
        self.warnings[about] = text

    def clear(self, code: str, about: str = "") -> None:
        self.warnings.pop(about, None)


@pytest.fixture
def seen() -> Iterator[Seen]:
    yield Seen()


def caps(**budget: Any) -> SpendCaps:
    models = ({"name": "large", "input_usd": 3.0, "output_usd": 15.0},)
    provider = {"name": "acme", "base_url": "https://h/v1", "models": models, "daily_usd": 1.0}
    config = NodeConfig.model_validate({"providers": (provider,), "budget": budget})
    key = KeySettings.model_validate({"name": "batch", "sha256": "0" * 64, "daily_usd": 0.5})
    return SpendCaps(config, parse_policy(POLICY, "p.toml"), {"batch": key})


async def books(folder: Path, seen: Seen, **budget: Any) -> tuple[SpendAccounting, Ledger]:
    ledger = await Ledger.open(url_in(folder))
    return SpendAccounting(ledger, seen, seen, caps(**budget)), ledger


async def spend(on: SpendAccounting, usd: float, key_id: str = "other", route: str = "general") -> str:
    from dataclasses import replace

    target = replace(HOSTED, provider="acme")
    return await on.reserve(decision_id="dec_1", target=target, usd=usd, route=route, key_id=key_id)


async def test_the_smallest_of_day_provider_route_and_key_refuses(tmp_path: Path, seen: Seen) -> None:
    on, ledger = await books(tmp_path, seen, daily_usd=10.0)
    with pytest.raises(BudgetExceeded, match="key:batch"):
        await spend(on, 0.6, key_id="batch")
    await spend(on, 0.6)
    with pytest.raises(BudgetExceeded, match="provider:acme"):
        await spend(on, 0.6)
    assert ledger.spent_today["all"] == pytest.approx(0.6)
    assert ledger.spent_today["route:general"] == pytest.approx(0.6)
    await ledger.close()


async def test_a_cap_that_is_nearly_spent_is_on_the_health_page_until_it_is_raised(tmp_path: Path, seen: Seen) -> None:
    on, ledger = await books(tmp_path, seen, daily_usd=1.5)
    await spend(on, 0.7)
    assert seen.warnings == {}
    await spend(on, 0.15)
    assert set(seen.warnings) == {"provider:acme"}
    assert "0.85 of 1 USD" in seen.warnings["provider:acme"]
    on.caps = caps(daily_usd=1.5, alert_at=0.95)
    await spend(on, 0.01)
    assert seen.warnings == {}
    await ledger.close()


async def test_no_budget_is_no_limit_and_is_counted(tmp_path: Path, seen: Seen) -> None:
    on, ledger = await books(tmp_path, seen)
    await spend(on, 0.9)
    assert ledger.spent_today["all"] == pytest.approx(0.9)
    await ledger.close()
