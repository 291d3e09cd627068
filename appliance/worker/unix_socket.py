"""The unix socket that a worker listens on."""

import os
import socket
import stat
from pathlib import Path
from typing import Final

from appliance.errors import ConfigError

_BACKLOG: Final = 2_048
_PROBE_SECONDS: Final = 2.0


def bind_unix_socket(path: Path) -> socket.socket:
    """A listening unix socket for its owner alone. A stale file is replaced, a socket that is in use is refused.

    Raises ConfigError when the path cannot be used.
    """
    _remove_stale_socket(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)  # from its first moment nobody else can connect
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--uds {str(path)!r} cannot be used ({error}); choose a short path in a folder of yours"
        ) from error
    finally:
        os.umask(mask)
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def _remove_stale_socket(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"--uds {str(path)!r} is there already and is no socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"--uds {str(path)!r} cannot be tried ({error}); choose another path") from error
        else:
            raise ConfigError(f"--uds {str(path)!r} is served by another process; stop that one or choose another path")
