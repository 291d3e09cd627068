"""What ties this program and its training children to the machine: socket file, parent, exit codes."""

import ctypes
import os
import signal
import socket
import stat
import sys
import threading
from pathlib import Path

from appliance.errors import ConfigError

EXIT_CLEAN = 0
EXIT_ARGUMENTS = 2
EXIT_MODEL_FILE = 3

_PR_SET_PDEATHSIG = 1
_BACKLOG = 512


def bind_socket(path: Path) -> socket.socket:
    """A listening unix socket for its owner alone, in the place of a stale one. Raises ConfigError."""
    try:
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
    except OSError:
        pass  # nothing lies there, or binding says what is the matter
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise ConfigError(f"--uds {str(path)!r} cannot be used ({error}); choose a short path of your own") from error
    finally:
        os.umask(mask)
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def tie_to_parent(parent_guard_fd: int) -> None:
    """End with the parent, which holds the other end of this pipe. Raises ConfigError where it is not open."""
    try:
        os.fstat(parent_guard_fd)
    except OSError as error:
        raise ConfigError(
            f"--parent-guard-fd {parent_guard_fd} is not open ({error.strerror}); pass a pipe's read end"
        ) from error
    end_with_parent()
    threading.Thread(target=_watch, args=(parent_guard_fd,), name="parent guard", daemon=True).start()


def end_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _watch(parent_guard_fd: int) -> None:
    try:
        while os.read(parent_guard_fd, 4096):
            pass
    finally:
        os._exit(EXIT_CLEAN)
