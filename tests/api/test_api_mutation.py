"""Spoiled bodies in every chat dialect: never a defect, never a hang, and nothing refused is ever sent to a target."""

import asyncio
from typing import Any

import httpx
import pytest

from appliance.core import UpstreamCall
from tests.api.mutation import GOOD, Sent, is_in_shape, mutations
from tests.api.stand_ins import StandInPipeline, make_app
from tests.api.test_api_sdk import PIECES, completion

pytestmark = pytest.mark.anyio

COUNT = 600
SECONDS = 10.0


def reply(outgoing: UpstreamCall) -> Any:
    return completion('{"a": ""}' if "response_format" in outgoing.body else "x")


async def send(http: httpx.AsyncClient, sent: Sent) -> httpx.Response:
    async with asyncio.timeout(SECONDS):
        return await http.post(sent.path, json=sent.body)


@pytest.mark.parametrize("sent", GOOD)
async def test_the_bodies_that_are_spoiled_are_good(sent: Sent) -> None:
    app = make_app(StandInPipeline(reply=reply, pieces=PIECES))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://node") as http:
        response = await send(http, sent)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "count",
    [COUNT, pytest.param(52_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)], id="at least 10,000 a dialect")],
)
async def test_a_spoiled_body_never_makes_a_defect_and_is_never_sent_when_it_was_refused(count: int) -> None:
    pipeline = StandInPipeline(reply=reply, pieces=PIECES)
    app = make_app(pipeline)
    refused = 0
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://node") as http:
        for sent in mutations(seed=5, count=count):
            before = len(pipeline.sent)
            response = await send(http, sent)
            assert response.status_code in (200, 400, 502), (sent, response.text)
            if response.status_code == 200:
                continue
            refused += 1
            assert is_in_shape(sent, response.status_code, response.json()), (sent, response.text)
            # 502: the stand-in's reply did not pass verification.
            assert response.status_code == 502 or len(pipeline.sent) == before, sent
    assert count / 4 < refused < count
