"""Where the engines' sockets lie: a private folder with a path short enough for them."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from appliance.errors import EngineFailed

_SOCKET_PATH_BYTES: Final = 104
"""Unix sockets take 104 (macOS) to 108 bytes, the closing NUL included."""
_NAME_BYTES: Final = 60
"""For what mkdtemp adds, for an engine's own folder `/NN`, and for the sockets that vLLM makes there: a UUID each."""


SESSION_FILE: Final = "session"
"""In an engine's own folder: the number of the session that its processes are in."""
_ELSEWHERE: Final = "appliance-"
"""Begins the name of a folder that lies among those of other programs."""


class SocketFolder:
    """A folder that only this user can enter, with a path short enough for sockets in it."""

    def __init__(self, preferred: Path) -> None:
        """`preferred`/PID-xxxx, or one below XDG_RUNTIME_DIR or the system's temporary folder where that is too long.

        Folders that earlier processes left in `preferred` are removed.
        """
        self.orphaned_sessions: set[int] = set()
        """Those of engines whose node has died."""
        # Where the folder cannot be made, another one will do.
        with contextlib.suppress(OSError):
            preferred.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.orphaned_sessions |= _sweep(preferred)
        folder = _short_enough(preferred)
        prefix = "" if folder == preferred.absolute() else _ELSEWHERE
        if prefix:
            with contextlib.suppress(OSError):
                self.orphaned_sessions |= _sweep(folder, prefix)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=folder))
        except OSError as error:
            raise EngineFailed(
                f"cannot make a folder for sockets in {folder}: {error.strerror}; free or mend it"
            ) from error

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _short_enough(preferred: Path) -> Path:
    fallbacks = [Path(name) for name in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp") if name]
    for folder in (preferred.absolute(), *fallbacks):
        needed = len(os.fsencode(folder)) + len(f"/{os.getpid()}-") + _NAME_BYTES
        if needed <= _SOCKET_PATH_BYTES and folder.is_dir() and os.access(folder, os.W_OK):
            return folder
    raise EngineFailed(
        f"no folder with a path short enough for unix sockets: set a data directory shorter than {preferred}"
    )


def _sweep(folder: Path, prefix: str = "") -> set[int]:
    """Remove the folders of processes that are gone; the sessions that their engines were in."""
    sessions = set()
    for entry in folder.glob(f"{prefix}*"):
        owner = entry.name.removeprefix(prefix).partition("-")[0]
        if owner.isdigit() and not _is_alive(int(owner)):
            for file in entry.glob(f"*/{SESSION_FILE}"):
                with contextlib.suppress(OSError, ValueError):
                    sessions.add(int(file.read_text()))
            shutil.rmtree(entry, ignore_errors=True)
    return sessions


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
