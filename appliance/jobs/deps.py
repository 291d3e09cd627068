"""What runs share, how they report progress, why they stop, and which lines go into one call."""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from appliance.config import JobsSettings
from appliance.core import HealthAlerts
from appliance.jobs.fair_share import FairShareSlots
from appliance.jobs.models import BatchLine, Ending, LineHandler
from appliance.jobs.provider.lines import ProviderLines
from appliance.jobs.storage.files import JobFolder
from appliance.jobs.storage.store import JobStore
from appliance.state import State

LINES_AT_ONCE: Final = 32
"""Asked in one call, where they may be."""

_VALIDATED_AT_ONCE: Final = 2
"""To find lines that ask the same takes some 50 MB for a file as long as may be: a key may make any number of
batches of it."""

RunState = Literal["validating", "running", "paused", "waiting", "ending"]


@dataclass(frozen=True, slots=True)
class JobDeps:
    """What all runs share."""

    config: JobsSettings
    store: JobStore
    folder: JobFolder
    line_handler: LineHandler
    slots: FairShareSlots
    state: State
    alerts: HealthAlerts
    clock: Callable[[], float]
    wall_clock: Callable[[], float]
    provider_lines: ProviderLines | None = None
    """How lines leave in providers' own batches; None: they do not."""
    validation_slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_VALIDATED_AT_ONCE))


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How a run goes, beyond what its batch says."""

    state: RunState
    reason: str
    lines_per_second: float | None
    seconds_left: float | None
    late_lines: int
    """Lines that would be late on-site."""
    lines_in_flight: int
    lines_at_providers: int
    """Lines that lie in providers' own batches."""


class JobStopped(Exception):
    """Nothing more is to be asked."""

    def __init__(self, ending: Ending, code: str, message: str) -> None:
        super().__init__(message)
        self.ending: Ending = ending
        self.code, self.message = code, message


def group_lines(lines: Sequence[BatchLine], group_key: Callable[[BatchLine], Hashable | None]) -> list[list[BatchLine]]:
    """Lines that may be asked together, in the order of the first of each."""
    groups: list[list[BatchLine]] = []
    open_groups: dict[Hashable, list[BatchLine]] = {}
    for line in lines:
        key = group_key(line)
        group = None if key is None else open_groups.get(key)
        if group is None or len(group) >= LINES_AT_ONCE:
            group = []
            groups.append(group)
            if key is not None:
                open_groups[key] = group
        group.append(line)
    return groups
