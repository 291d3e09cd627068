"""Looking at processes, and waiting for what they do."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

_PATIENCE_SECONDS = 30.0


def is_running(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def group_members(leader: int) -> list[int]:
    """Running processes in the group of `leader`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == leader and is_running(int(folder.name)):
                found.append(int(folder.name))
        except ProcessLookupError:
            continue
    return found


async def eventually(is_so: Callable[[], bool], what: str) -> None:
    """Wait until `is_so`; fail, naming `what`, when it does not come."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < end, f"waited in vain for {what}"
        await asyncio.sleep(0.01)
