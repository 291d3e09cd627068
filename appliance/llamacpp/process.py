"""What ties this program to the machine: its socket file, its parent, its exit codes."""

import ctypes
import os
import signal
import socket
import stat
import sys
import threading
from pathlib import Path

from appliance.errors import ConfigError
from appliance.llamacpp.json_log import log

EXIT_CLEAN = 0
EXIT_ARGUMENTS = 2
EXIT_MODEL_FILE = 3
EXIT_ENGINE = 4

_PR_SET_PDEATHSIG = 1
_BACKLOG = 2_048


def bind_socket(path: Path) -> socket.socket:
    """A bound, listening unix socket that its owner alone may use. A stale file is replaced, a live one refused.

    Raises ConfigError when the path cannot be used.
    """
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)  # from its first moment nobody else can connect
    try:
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"--uds {str(path)!r} cannot be used ({error}); choose a short path in a folder of yours"
        ) from error
    finally:
        os.umask(mask)
    sock.listen(_BACKLOG)
    sock.setblocking(False)
    return sock


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"--uds {str(path)!r} is there already and is no socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"--uds {str(path)!r} cannot be tried ({error}); choose another path") from error
        else:
            raise ConfigError(f"--uds {str(path)!r} is served by another process; stop that one or choose another path")


def tie_to_parent(parent_guard_fd: int) -> None:
    """End this process the moment its parent is gone: the parent holds the other end of a pipe.

    On Linux the kernel is asked for SIGKILL as well, for the case that some other process inherited that other end.
    (That signal follows the parent's *thread*, so a parent must start us from a thread that lives as long as itself.)

    Raises ConfigError when the descriptor is not open.
    """
    try:
        os.fstat(parent_guard_fd)
    except OSError as error:
        raise ConfigError(
            f"--parent-guard-fd {parent_guard_fd} is not open ({error.strerror}); pass the read end of a pipe"
        ) from error
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch_parent, args=(parent_guard_fd,), name="parent guard", daemon=True).start()


def _watch_parent(parent_guard_fd: int) -> None:
    try:
        while os.read(parent_guard_fd, 4096):
            pass
    except OSError as error:
        log("parent_guard_broken", reason=str(error))
    # Nobody is left to read an exit code or to wait for a clean end; the engine's threads must stop now.
    os._exit(EXIT_CLEAN)
