"""What the supervisors of all engines share."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from appliance.config import EngineSettings as EngineConfig
from appliance.node.supervise.launcher import Launcher
from appliance.node.supervise.status import StatusPublisher


@dataclass(frozen=True, slots=True)
class SupervisorDeps:
    """What all engine supervisors of a node share."""

    launcher: Launcher
    status: StatusPublisher
    config: EngineConfig
    drain_seconds: float
    """From SIGTERM to SIGKILL."""
    runtime_folder: Path
    """Where the sockets are to lie. The processes of this node's engines are recognised by it."""
    watts_per_busy_core: float | None = None
    clock: Callable[[], float] = time.monotonic
