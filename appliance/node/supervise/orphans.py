"""Finding and ending what engines leave behind: processes that outlived the one that was started.

Every engine is started with a variable in its environment that names its node's data directory, and in a session of its
own. Its processes inherit both, whatever group or parent they come to have. A process that carries one of them while no
engine runs is an orphan. One mark is not enough: vLLM's core and workers write their title over their environment.
"""

import contextlib
import os
import re
import signal
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Final

ENGINE_MARK_VARIABLE: Final = "APPLIANCE_ENGINE_OF"
_TITLE: Final = b"VLLM::"
_LOOK_SECONDS: Final = 0.05
_SHARED: Final = re.compile(r"/dev/shm/psm_\w+")
"""As Python's multiprocessing names what it makes."""


def format_engine_mark(home: Path, name: str = "") -> str:
    """The variable's value for the engine `name` of the node with this data directory; `name` empty: for all of it."""
    return f"{home.resolve()}//{name};" if name else f"{home.resolve()}//"


def find_marked_processes(value: str, session: int | None = None) -> Sequence[int]:
    """Processes whose mark begins with `value`, those in the session of one of them, and those in `session`.

    This one is never among them; none are where there is no /proc.
    """
    wanted = f"{ENGINE_MARK_VARIABLE}={value}".encode()
    sessions = _sessions()
    found = {pid for pid in sessions if any(one.startswith(wanted) for one in _environment(pid))}
    leaders = {pid for pid in found if sessions[pid] == pid} | ({session} if session is not None else set())
    return sorted(found | {pid for pid, leader in sessions.items() if leader in leaders})


def find_vllm_leftovers(sessions: Collection[int]) -> Sequence[int]:
    """vLLM's processes in sessions of engines whose node has died. The title is asked for because a number that was a
    session's may meanwhile belong to another program."""
    return [pid for pid, leader in _sessions().items() if leader in sessions and _title(pid).startswith(_TITLE)]


def _sessions() -> dict[int, int]:
    """Every other process with its session."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with contextlib.suppress(OSError):
            if pid != os.getpid() and "Z" not in (folder / "stat").read_text().rpartition(")")[2].split()[0]:
                found[pid] = os.getsid(pid)
    return found


def _environment(pid: int) -> Sequence[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ()


def _title(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def find_shared_memory(pids: Iterable[int]) -> frozenset[Path]:
    """Files of shared memory that these processes hold: killed, they leave hundreds of megabytes of it behind."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            found |= {Path(path) for path in _SHARED.findall(Path(f"/proc/{pid}/maps").read_text())}
    return frozenset(found)


def remove_shared_memory(files: Iterable[Path]) -> None:
    """Give shared memory back whose processes have ended."""
    for path in files:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def kill_processes(pids: Sequence[int], seconds: float = 10.0) -> Sequence[int]:
    """Kill them, give their shared memory back, and wait until they are gone, at most so long; says whom.

    Blocks: call it in a thread.
    """
    ended = []
    remove_shared_memory(find_shared_memory(pids))
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
            ended.append(pid)
    until = time.monotonic() + seconds
    while any(pid in _sessions() for pid in ended) and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)
    return ended
