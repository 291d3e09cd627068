"""A worker ends with its parent: by a pipe that the parent holds open, and on Linux by a signal of the kernel."""

import ctypes
import os
import signal
import sys
import threading
from typing import Final

from appliance.errors import ConfigError
from appliance.worker import EXIT_CLEAN
from appliance.worker.json_log import log

_PR_SET_PDEATHSIG: Final = 1


def tie_to_parent(parent_guard_fd: int) -> None:
    """End this process the moment its parent is gone: the parent holds the other end of this pipe open.

    The kernel is asked for SIGKILL as well, in case another process inherited that other end.
    Raises ConfigError when the descriptor is not open.
    """
    try:
        os.fstat(parent_guard_fd)
    except OSError as error:
        raise ConfigError(
            f"--parent-guard-fd {parent_guard_fd} is not open ({error.strerror}); pass the read end of a pipe"
        ) from error
    end_with_parent()
    threading.Thread(target=_wait_for_end_of_pipe, args=(parent_guard_fd,), name="parent-guard", daemon=True).start()


def end_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends. Linux alone can do that.

    The signal follows the parent's *thread*: a parent must start workers from a thread that lives as long as itself.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_for_end_of_pipe(parent_guard_fd: int) -> None:
    try:
        while os.read(parent_guard_fd, 4096):
            pass
    except OSError as error:
        log("parent_pipe_broken", reason=str(error))
    # Nobody is left to read an exit code or to wait for a clean end; the worker's threads must stop now.
    os._exit(EXIT_CLEAN)
