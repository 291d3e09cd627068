"""Work that can wait, as the policy and the attempts treat it."""

from dataclasses import replace
from typing import Any

import pytest

from appliance.core import ANYWHERE, ONSITE, Residency
from appliance.router.capacity.predictor import Prediction
from appliance.router.profile import profile_request
from tests.router.scene import call_of, request_of
from tests.router.stage import Stage
from tests.router.test_ranking import order, outlook, ranked

LATE = Prediction(3000.0, 3100.0, fits_kv=True, ready=True, reason="busy for an hour")


def test_with_patience_it_stays_where_it_would_have_overflowed() -> None:
    assert order(ranked(request_of(), local=outlook(LATE))) == ["cloud/big", "onsite/tiny"]
    patient = ranked(request_of(latency_class="batch", patience_seconds=86_400.0), local=outlook(LATE))
    assert order(patient) == ["onsite/tiny", "cloud/big"]
    assert patient.route.max_wait_seconds == 86_400.0


def test_without_any_patience_left_it_overflows_though_the_site_is_idle() -> None:
    assert order(ranked(request_of(latency_class="batch", patience_seconds=0.0))) == ["cloud/big", "onsite/tiny"]


@pytest.mark.parametrize("bound", [ONSITE, Residency("region", "XX")])
@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_a_bound_line_never_leaves_however_late_it_is(bound: Residency, patience: float) -> None:
    request = request_of(latency_class="batch", patience_seconds=patience, residency=bound)
    assert order(ranked(request, local=outlook(LATE))) == ["onsite/tiny"]


def test_the_class_that_was_given_is_that_of_the_profile() -> None:
    request = request_of(residency=ANYWHERE)
    assert profile_request(request, prompt_tokens=1, output_tokens=1).latency_class == "interactive"
    given = replace(request, latency_class="batch")
    assert profile_request(given, prompt_tokens=1, output_tokens=1).latency_class == "batch"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("asked", "latency_class", "sent"),
    [
        (None, None, None),
        (5, None, 5),
        (-5, None, 0),
        ("x", None, 0),
        (None, "batch", 1),
        (-5, "batch", 1),
        (7, "batch", 7),
    ],
)
async def test_nobody_asks_to_go_before_others(stage: Stage, asked: Any, latency_class: Any, sent: int | None) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], **({} if asked is None else {"priority": asked})}
    request = request_of(body=body, latency_class=latency_class, patience_seconds=None)
    answer = await stage.pipeline.answer(request, call_of(request))
    await answer.aclose()
    assert stage.engine.bodies[-1].get("priority") == sent
