"""Background tasks that outlive their own failures: each failure is logged, shown on the health page, and retried."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

import structlog

from appliance.core import HealthAlerts
from appliance.telemetry.redaction import scrub_text

TASK_FAILED: Final = "control_task_failed"
"""The health page's code for a background task that failed and has not yet run steadily again."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RestartBackoff:
    """How long a failed task waits before it starts again. The wait doubles with each failure in a row."""

    first_seconds: float = 1.0
    most_seconds: float = 30.0
    """A task that follows API keys must not pause longer: until it runs again, revoked keys stay valid."""
    steady_seconds: float = 10.0
    """A restarted task that runs this long has recovered: its warning ends and the next wait is short again."""

    def delay_seconds(self, failures: int) -> float:
        """The wait after so many failures in a row, 1 being the first."""
        return min(self.most_seconds, self.first_seconds * 2.0 ** min(failures - 1, 16))


class GuardedTask:
    """Runs a long-lived coroutine function and starts it again whenever it raises. Used on the event loop."""

    def __init__(
        self,
        name: str,
        work: Callable[[], Awaitable[None]],
        alerts: HealthAlerts,
        backoff: RestartBackoff = RestartBackoff(),
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`work` is called once per start and must be able to start again. `sleep` is replaced in tests."""
        self._name, self._work, self._alerts = name, work, alerts
        self._backoff, self._sleep = backoff, sleep
        self._failures = 0

    async def run(self) -> None:
        """Return when `work` returns. Cancellation passes through and ends `work`."""
        while True:
            recovery = asyncio.create_task(self._recover()) if self._failures else None
            try:
                await self._work()
            except Exception as error:
                delay = self._note_failure(error)
            else:
                self._clear()
                return
            finally:
                if recovery is not None:
                    recovery.cancel()
            await self._sleep(delay)

    def _note_failure(self, error: Exception) -> float:
        self._failures += 1
        delay = self._backoff.delay_seconds(self._failures)
        _log.exception("background task failed", task=self._name, failures=self._failures, restart_seconds=delay)
        text = f"the background task {self._name!r} failed and is started again: {scrub_text(repr(error))}"
        self._alerts.warn(TASK_FAILED, text, about=self._name)
        return delay

    async def _recover(self) -> None:
        await self._sleep(self._backoff.steady_seconds)
        _log.info("background task recovered", task=self._name, failures=self._failures)
        self._clear()

    def _clear(self) -> None:
        self._failures = 0
        self._alerts.clear(TASK_FAILED, about=self._name)


def start_background_task(
    stack: AsyncExitStack, name: str, work: Callable[[], Awaitable[None]], alerts: HealthAlerts
) -> None:
    """Run `work` guarded until `stack` is closed, which cancels it and waits for its end."""
    stack.push_async_callback(_cancel, asyncio.create_task(GuardedTask(name, work, alerts).run(), name=name))


async def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait({task})
