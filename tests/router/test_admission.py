"""Slots and queues: order, time limits, and that nobody who leaves keeps a place."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from appliance.core import Snapshot
from appliance.errors import Busy, Unavailable
from appliance.router.capacity.admission import Admission
from appliance.router.capacity.predictor import batch_sequences_beside
from appliance.router.capacity.request_load import RequestLoad
from appliance.router.capacity.target_queue import Slot
from appliance.state import State
from tests.router.scene import engine_target, hosted_target, make_request_load, view_of

pytestmark = pytest.mark.anyio

LOCAL, HOSTED = engine_target(), hosted_target()
SMALL = RequestLoad(10, 20)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Gate:
    """An admission over one engine with `capacity` sequences (and two more in its queue)."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.state = State(self.clock)
        self.admission = Admission(self.state, self.clock)
        self.publish()

    def publish(self, capacity: int = 1, **fields: object) -> None:
        load = make_request_load(sequences_capacity=capacity)
        view = view_of(**{"seen": self.clock(), "load": load, **fields})  # type: ignore[arg-type]
        self.state.publish(Snapshot(self.clock(), (LOCAL, HOSTED), {LOCAL.name: view}))

    async def enter(self, *, is_residency_bound: bool = False, wait: float = 30.0, budget: float | None = None) -> Slot:
        return await self.admission.enter(
            LOCAL, SMALL, is_residency_bound=is_residency_bound, wait_seconds=wait, budget_seconds=budget
        )

    async def fill(self) -> list[Slot]:
        return [await self.enter() for _ in range(3)]


@pytest.fixture
async def gate() -> AsyncIterator[Gate]:
    made = Gate()
    yield made
    assert made.admission.total == 0, "a slot or a waiter was left behind"
    await made.admission.aclose()


async def settled() -> None:
    """Let every task run as far as it can."""
    for _ in range(100):
        await asyncio.sleep(0)


async def test_a_slot_counts_until_it_is_left_and_leaving_twice_counts_once(gate: Gate) -> None:
    slot = await gate.enter()
    inside = gate.admission.inflight(LOCAL.name)
    assert (inside.sequences, inside.prompt_tokens, inside.output_tokens, inside.kv_tokens) == (1, 10, 20, 30)
    slot.mark_first_token()
    slot.mark_first_token()
    assert gate.admission.inflight(LOCAL.name).prompt_tokens == 0
    slot.release()
    slot.release()
    slot.mark_first_token()
    assert gate.admission.inflight(LOCAL.name).kv_tokens == 0


async def test_hosted_targets_are_counted_and_never_wait(gate: Gate) -> None:
    slots = [await gate.admission.enter(HOSTED, SMALL, is_residency_bound=False, wait_seconds=0) for _ in range(50)]
    assert gate.admission.inflight(HOSTED.name).sequences == 50
    for slot in slots:
        slot.release()


async def test_who_has_another_target_does_not_wait_for_a_full_one(gate: Gate) -> None:
    slots = await gate.fill()
    with pytest.raises(Busy, match=r"budget 0\.1 s") as caught:
        await gate.enter(budget=0.1, wait=0.1)
    assert caught.value.retry_after_seconds is not None and caught.value.retry_after_seconds >= 1
    for slot in slots:
        slot.release()


async def test_who_would_be_in_time_waits_a_little_even_with_another_target_left(gate: Gate) -> None:
    slots = await gate.fill()
    waiting = asyncio.create_task(gate.enter(budget=10.0, wait=10.0))
    await settled()
    assert not waiting.done()
    slots[0].release()
    (await waiting).release()
    for slot in slots:
        slot.release()


async def test_bound_requests_come_first_and_each_kind_in_its_order(gate: Gate) -> None:
    slots = await gate.fill()
    entered: list[str] = []

    async def come(name: str, is_residency_bound: bool) -> None:
        slot = await gate.enter(is_residency_bound=is_residency_bound)
        entered.append(name)
        await asyncio.sleep(0)
        slot.release()

    async with asyncio.TaskGroup() as group:
        for name in ("u1", "u2", "b1", "b2"):
            group.create_task(come(name, is_residency_bound=name.startswith("b")))
            await settled()
        assert gate.admission.inflight(LOCAL.name).waiting == 4
        slots.pop().release()
        await settled()
        assert entered == ["b1", "b2", "u1", "u2"]
        for slot in slots:
            slot.release()


async def test_who_comes_late_does_not_pass_those_who_wait(gate: Gate) -> None:
    slots = await gate.fill()
    waiting = asyncio.create_task(gate.enter())
    await settled()
    slots.pop().release()
    late = asyncio.create_task(gate.enter())
    await settled()
    assert waiting.done() and not late.done()
    for slot in [*slots, waiting.result()]:
        slot.release()
    (await late).release()


async def test_waiting_ends_with_a_clear_refusal_and_a_hint(gate: Gate) -> None:
    slots = await gate.fill()
    with pytest.raises(Busy) as caught:
        await gate.enter(is_residency_bound=True, wait=0.01)
    assert caught.value.status == 429 and caught.value.retry_after_seconds
    for slot in slots:
        slot.release()


async def test_an_engine_that_is_not_up_is_waited_for_and_wanted(gate: Gate) -> None:
    gate.publish(state="starting")
    waiting = asyncio.create_task(gate.enter())
    await settled()
    assert not waiting.done() and LOCAL.name in gate.state.demand
    gate.publish()
    (await asyncio.wait_for(waiting, 5)).release()


async def test_an_engine_that_does_not_come_up_in_time_is_unavailable(gate: Gate) -> None:
    gate.publish(state="failed", reason="exit code 2")
    with pytest.raises(Unavailable, match="exit code 2") as caught:
        await gate.enter(wait=0.01)
    assert caught.value.retry_after_seconds


async def test_doubt_holds_until_a_newer_view_comes(gate: Gate) -> None:
    gate.admission.mark_suspect(LOCAL.name)
    assert not gate.admission.predict(LOCAL, SMALL).ready
    gate.clock.now += 1.0
    gate.publish()
    assert gate.admission.predict(LOCAL, SMALL).ready


async def test_a_waiter_that_is_cancelled_leaves_nothing_and_blocks_nobody(gate: Gate) -> None:
    slots = await gate.fill()
    cancelled = asyncio.create_task(gate.enter(is_residency_bound=True))
    behind = asyncio.create_task(gate.enter())
    await settled()
    cancelled.cancel()
    await settled()
    slots.pop().release()
    (await asyncio.wait_for(behind, 5)).release()
    for slot in slots:
        slot.release()


async def test_a_slot_that_is_given_in_the_moment_of_cancelling_is_given_back(gate: Gate) -> None:
    slots = await gate.fill()
    waiting = asyncio.create_task(gate.enter())
    await settled()
    slots.pop().release()  # the slot is handed over, the task has not run yet
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    for slot in slots:
        slot.release()
    assert gate.admission.total == 0


async def test_many_come_and_go_and_the_engine_is_never_overfull(gate: Gate) -> None:
    gate.publish(capacity=4)
    most = 0

    async def come(index: int) -> None:
        nonlocal most
        slot = await gate.enter(is_residency_bound=index % 10 == 0)
        most = max(most, gate.admission.inflight(LOCAL.name).sequences)
        await asyncio.sleep(0)
        if index % 3:
            slot.mark_first_token()
        slot.release()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(come(index)) for index in range(300)]
        await settled()
        for task in tasks[::7]:
            task.cancel()
    assert most == 6


PATIENT = RequestLoad(10, 20, is_batch=True)


async def test_work_that_can_wait_fills_an_idle_engine_and_others_do_not_see_it(gate: Gate) -> None:
    patient = [await gate.admission.enter(LOCAL, PATIENT, is_residency_bound=False, wait_seconds=0) for _ in range(3)]
    with pytest.raises(Busy):
        await gate.admission.enter(LOCAL, PATIENT, is_residency_bound=False, wait_seconds=0)
    alone = gate.admission.predict(LOCAL, SMALL)
    assert alone.can_enter
    slot = await gate.enter(wait=0, budget=5.0)
    for one in (*patient, slot):
        one.release()
    assert gate.admission.predict(LOCAL, SMALL) == alone


async def test_work_that_can_wait_is_let_in_last_and_only_when_it_harms_nobody(gate: Gate) -> None:
    first = await gate.enter()
    order: list[str] = []

    async def come(name: str, load: RequestLoad) -> None:
        slot = await gate.admission.enter(LOCAL, load, is_residency_bound=False, wait_seconds=30.0)
        order.append(name)
        await settled()
        slot.release()

    waiting = [asyncio.create_task(come("patient", PATIENT))]
    await settled()
    assert order == []  # there is room for three, but a CPU that serves one has nothing to spare
    waiting.append(asyncio.create_task(come("hurried", SMALL)))
    await settled()
    assert order == ["hurried"]
    first.release()
    await asyncio.gather(*waiting)
    assert order == ["hurried", "patient"]


async def test_an_engine_that_slows_nobody_takes_patient_work_beside_others(gate: Gate) -> None:
    """As a GPU: eight together are nearly as fast as one alone, sixteen are not."""
    rates = {1: 100.0, 8: 780.0, 16: 800.0}
    load = make_request_load(sequences_capacity=16, decode_tokens_per_second=rates)
    gate.publish(load=load)
    assert batch_sequences_beside(load, 1) == 8
    assert batch_sequences_beside(load, 0) == 18
    assert batch_sequences_beside(load, 16) == 16
    slots = [await gate.enter()]
    slots += [await gate.admission.enter(LOCAL, PATIENT, is_residency_bound=False, wait_seconds=0) for _ in range(7)]
    with pytest.raises(Busy):
        await gate.admission.enter(LOCAL, PATIENT, is_residency_bound=False, wait_seconds=0)
    for slot in slots:
        slot.release()
