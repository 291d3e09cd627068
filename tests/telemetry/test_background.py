"""A background task never dies unseen: its failure is logged, warned of, and retried."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from appliance.core import HealthAlerts
from appliance.telemetry.background import (
    TASK_FAILED,
    GuardedTask,
    RestartBackoff,
    start_background_task,
)

pytestmark = pytest.mark.anyio

BACKOFF = RestartBackoff(first_seconds=1.0, most_seconds=4.0, steady_seconds=10.0)


class Alerts(HealthAlerts):
    def __init__(self) -> None:
        self.shown: dict[tuple[str, str], str] = {}

    def warn(self, code: str, text: str, about: str = "") -> None:
        self.shown[code, about] = text

    def clear(self, code: str, about: str = "") -> None:
        self.shown.pop((code, about), None)


class ManualSleep:
    """Sleeps end when the test lets them."""

    def __init__(self) -> None:
        self.waiting: list[tuple[float, asyncio.Future[None]]] = []

    async def __call__(self, seconds: float) -> None:
        until: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((seconds, until))
        await until

    async def end(self, seconds: float) -> None:
        await until(lambda: any(asked == seconds and not one.done() for asked, one in self.waiting))
        next(one for asked, one in self.waiting if asked == seconds and not one.done()).set_result(None)


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not come to hold")


class Work:
    """Fails so many times, then runs on."""

    def __init__(self, failures: int) -> None:
        self.failures, self.starts = failures, 0
        self.is_running, self.is_cancelled = False, False
        self.fail_now = asyncio.Event()

    async def __call__(self) -> None:
        self.starts += 1
        if self.starts <= self.failures:
            raise ValueError(f"fault {self.starts} with api_key=verysecret")
        self.is_running = True
        try:
            await self.fail_now.wait()
        except asyncio.CancelledError:
            self.is_cancelled = True
            raise
        self.is_running = False
        self.fail_now.clear()
        raise ValueError("fault while running")


async def test_a_task_that_raises_once_is_started_again_and_warned_of_until_it_runs_steadily() -> None:
    alerts, sleep, work = Alerts(), ManualSleep(), Work(failures=1)
    task = asyncio.create_task(GuardedTask("keys", work, alerts, BACKOFF, sleep).run())
    await until(lambda: bool(alerts.shown))
    text = alerts.shown[TASK_FAILED, "keys"]
    assert "'keys'" in text and "fault 1" in text
    assert "verysecret" not in text
    await sleep.end(1.0)
    await until(lambda: work.is_running)
    assert alerts.shown, "it has not run long enough to be trusted"
    await sleep.end(10.0)
    await until(lambda: not alerts.shown)
    assert work.is_running and work.starts == 2
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.is_cancelled


async def test_the_wait_before_a_restart_doubles_up_to_a_bound_and_is_short_again_after_a_recovery() -> None:
    alerts, sleep, work = Alerts(), ManualSleep(), Work(failures=4)
    task = asyncio.create_task(GuardedTask("keys", work, alerts, BACKOFF, sleep).run())
    for seconds in (1.0, 2.0, 4.0, 4.0):
        await sleep.end(seconds)
    await until(lambda: work.is_running)
    await sleep.end(10.0)
    await until(lambda: not alerts.shown)
    work.fail_now.set()
    await sleep.end(1.0)
    await until(lambda: work.starts == 6)
    task.cancel()


async def test_a_task_that_fails_again_before_it_is_steady_keeps_its_warning() -> None:
    alerts, sleep, work = Alerts(), ManualSleep(), Work(failures=1)
    task = asyncio.create_task(GuardedTask("keys", work, alerts, BACKOFF, sleep).run())
    await sleep.end(1.0)
    await until(lambda: work.is_running)
    work.fail_now.set()
    await sleep.end(2.0)
    assert "fault while running" in alerts.shown[TASK_FAILED, "keys"]
    await until(lambda: work.is_running)
    task.cancel()


async def test_a_task_that_ends_by_itself_is_not_started_again() -> None:
    alerts, starts = Alerts(), []

    async def work() -> None:
        starts.append(1)

    await GuardedTask("once", work, alerts, BACKOFF, ManualSleep()).run()
    assert len(starts) == 1 and not alerts.shown


async def test_closing_the_stack_ends_its_background_tasks() -> None:
    work = Work(failures=0)
    async with AsyncExitStack() as stack:
        start_background_task(stack, "keys", work, Alerts())
        await until(lambda: work.is_running)
    assert work.is_cancelled
