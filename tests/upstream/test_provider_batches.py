"""The door's side of providers' batches: no line without its own permit, and nothing but a batch's affairs besides."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from appliance.core import ONSITE, Residency
from appliance.errors import ResidencyRefused
from appliance.router.residency import EgressPermitIssuer
from appliance.upstream.base import RequestFrame
from appliance.upstream.egress import EgressTransport
from tests.providers.batches_api import BatchesApi
from tests.router.scene import hosted_target, request_of

pytestmark = pytest.mark.anyio

FRAME = RequestFrame("application/json", b'{"requests":[', b",", b"]}")
OFFICE = EgressPermitIssuer()


@pytest.fixture
async def provider() -> AsyncIterator[BatchesApi]:
    async with BatchesApi() as made:
        yield made


@pytest.fixture
async def door(provider: BatchesApi) -> AsyncIterator[EgressTransport]:
    made = EgressTransport({"cloud": provider.address}, {"cloud": "sk-secret"}, OFFICE.key)
    yield made
    await made.aclose()


def line(name: str) -> bytes:
    return b'{"custom_id":"' + name.encode() + b'","params":{}}'


async def test_a_batch_goes_out_only_with_a_good_permit_for_every_line(
    provider: BatchesApi, door: EgressTransport
) -> None:
    target, requests = hosted_target(provider.address), [request_of() for _ in range(3)]
    permits = [OFFICE.permit(one, target, Residency("any")) for one in requests]
    good = [(permit, line(one.id)) for permit, one in zip(permits, requests, strict=True)]
    strange = EgressPermitIssuer().permit(requests[2], target, Residency("any"))
    elsewhere = OFFICE.permit(requests[2], replace(target, name="cloud/other"), Residency("any"))
    for wrong in (
        [*good[:2], (strange, line(requests[2].id))],
        [*good[:2], (elsewhere, line(requests[2].id))],
        [*good[:2], (permits[0], line(requests[2].id))],
        [*good[:2], good[0]],
        [*good[:2], (OFFICE.batch_permit("b", target), line(requests[2].id))],
        [],
    ):
        with pytest.raises(ResidencyRefused):
            await door.open_lines(target, "/files", wrong, FRAME)
    assert provider.paths == []
    with pytest.raises(ResidencyRefused):
        await door.open_lines(target, "/files", good, replace(FRAME, head=b"x" * 3000))
    assert provider.paths == []
    response = await door.open_lines(target, "/nothing", good, FRAME)
    await response.aclose()
    assert provider.paths == ["POST /nothing"]


async def test_a_bound_request_gets_no_permit_for_a_batch_either(provider: BatchesApi) -> None:
    with pytest.raises(ResidencyRefused):
        OFFICE.permit(request_of(residency=ONSITE), hosted_target(provider.address), Residency("any"))


async def test_the_permit_for_a_batchs_affairs_carries_no_request(provider: BatchesApi, door: EgressTransport) -> None:
    target = hosted_target(provider.address)
    affairs = OFFICE.batch_permit("batch_1", target)
    with pytest.raises(ResidencyRefused):
        await door.open(target, "/chat/completions", b"{}", permit=affairs)
    with pytest.raises(ResidencyRefused):
        await door.follow(target, "POST", "/batches", permit=affairs, body=b"x" * 3000)
    with pytest.raises(ResidencyRefused):
        await door.follow(target, "GET", "/batches", permit=OFFICE.permit(request_of(), target, Residency("any")))
    assert provider.paths == []
    response = await door.follow(target, "GET", "/batches", permit=affairs)
    await response.aclose()
    assert provider.paths == ["GET /batches"]
