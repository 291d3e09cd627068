"""Spoiled bodies in every inbound dialect through the real pipeline to every outbound one."""

import pytest

from scripts.conform.spoiled import outcomes

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("count", [40, pytest.param(1_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
async def test_a_spoiled_body_is_answered_or_refused_in_its_apis_shape_and_never_sent_when_refused(count: int) -> None:
    made = await outcomes(count)
    assert [one for one in made if one.result != "passed"] == []
    assert {one.test for one in made} == {
        f"{dialect}: {count} bodies" for dialect in ("chat", "responses", "anthropic", "gemini")
    }
