"""Finding and ending what engines leave behind: processes that outlived the one that was started.

Every engine is started with a variable in its environment that names its node's data directory. All of its processes
inherit that, whatever group or parent they come to have; whoever carries it while no engine runs is an orphan.
"""

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

MARK: Final = "APPLIANCE_ENGINE_OF"
_LOOK_SECONDS: Final = 0.05
_SHARED: Final = re.compile(r"/dev/shm/psm_\w+")
"""As Python's multiprocessing names what it makes."""


def mark(home: Path, name: str = "") -> str:
    """The variable's value for the engine `name` of the node with this data directory; `name` empty: for all of it."""
    return f"{home.resolve()}//{name};" if name else f"{home.resolve()}//"


def marked(value: str) -> Sequence[int]:
    """Processes whose mark begins with `value`, this one excluded. None where there is no /proc."""
    wanted = f"{MARK}={value}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (folder / "environ").read_bytes().split(b"\0")
            if any(one.startswith(wanted) for one in variables) and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


def shared_memory(value: str) -> frozenset[Path]:
    """Files of shared memory that these processes hold: killed, they leave hundreds of megabytes of it behind."""
    found = set()
    for pid in marked(value):
        with contextlib.suppress(OSError):
            found |= {Path(path) for path in _SHARED.findall(Path(f"/proc/{pid}/maps").read_text())}
    return frozenset(found)


def release(files: Iterable[Path]) -> None:
    """Give shared memory back whose processes have ended."""
    for path in files:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def wait_gone(value: str, seconds: float) -> None:
    """Wait until no process has the mark any more, at most so long. Blocks: call it in a thread."""
    until = time.monotonic() + seconds
    while marked(value) and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)


def end(value: str) -> Sequence[int]:
    """Kill every process whose mark begins with `value`, and give their shared memory back; says which."""
    ended = []
    release(shared_memory(value))
    for pid in marked(value):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
            ended.append(pid)
    return ended
