"""Replacing a file: it has its old content or the whole new one, whenever the program or the machine stops.

The new content goes into a draft in the same folder, is synced to disk, and takes the file's place by one rename.
Blocking: called from threads.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from appliance.errors import StorageFull

OWNER_ONLY: Final = 0o600
"""The mode of files that hold texts of people, keys or tokens."""
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)
_RETRY_SECONDS: Final = 30.0
"""When a caller may try again after the disk was full: space has to be freed first."""


def replace_file(path: Path, content: str | bytes, *, mode: int | None = None) -> None:
    """Write `content` (a string as UTF-8) to `path`. Its folder must be there.

    `mode` are the permissions of the new file. Without it they stay what they were, or follow the umask for a new one.
    Raises OSError, and then `path` is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacing_file(path, mode=mode) as draft:
        # The kept mode first: private content must not be readable by others for a moment.
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _first_mode(path, mode))
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)


@contextlib.contextmanager
def replacing_file(path: Path, *, mode: int | None = None) -> Iterator[Path]:
    """A draft for code that writes a file by its path; when the block ends well, the draft becomes `path`.

    The draft does not exist yet. When the block raises, the draft is removed and `path` is as it was.
    """
    # One draft a thread: two writers of the same file must not share one. The name never matches a glob for `path`'s
    # suffix, and what a crash leaves behind is overwritten by the next run with the same ids.
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.part")
    draft.unlink(missing_ok=True)
    try:
        yield draft
        _keep_mode(draft, path, mode)
        sync_to_disk(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync_to_disk(path.parent)


def sync_to_disk(path: Path) -> None:
    """Wait until the file's content, or the folder's list of names, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Whether an OSError says that no space, or no quota, is left."""
    return isinstance(error, OSError) and error.errno in _NO_SPACE


@contextlib.contextmanager
def raising_storage_full(message: str) -> Iterator[None]:
    """Turn an OSError for want of space into StorageFull with `message`; others pass."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise StorageFull(message, retry_after_seconds=_RETRY_SECONDS) from error


def _first_mode(path: Path, mode: int | None) -> int:
    return mode if mode is not None else _mode_of(path) or 0o666


def _keep_mode(draft: Path, path: Path, mode: int | None) -> None:
    wanted = mode if mode is not None else _mode_of(path)
    if wanted is not None:
        draft.chmod(wanted)


def _mode_of(path: Path) -> int | None:
    try:
        return path.stat().st_mode & 0o777
    except FileNotFoundError:
        return None
