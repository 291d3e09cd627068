"""The stage that the loop over attempts is tried on, and the check that it holds nothing afterwards."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.router.stage import Stage
from tests.standin import StandIn


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with StandIn(uds=str(tmp_path / "engine.sock")) as engine, StandIn() as provider:
        made = Stage(engine, provider)
        yield made
        await made.aclose()
        made.check_nothing_is_held()
