"""Resident memory that nobody reads, given back to the system. On Linux alone; elsewhere nothing happens."""

import ctypes
import mmap
import sys
from pathlib import Path
from typing import Final

_MAPPED_COLUMNS: Final = 6
"""Of a line of /proc/self/maps, where the last one is a path."""


def release_pages(address: int, size_bytes: int) -> None:
    """Give the whole pages among `size_bytes` from `address` on back. They stay mapped.

    What is read there next is the file's content again, or zeros where no file backs them.
    """
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (address + size_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and stop > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def release_file_pages(path: Path, maps: Path = Path("/proc/self/maps")) -> None:
    """Take what this process has mapped of a file out of its memory; it stays in the system's page cache.

    What is read again comes back page by page.
    """
    try:
        lines = maps.read_text("utf-8", "replace").splitlines()
    except OSError:
        return
    name = str(path.resolve())
    for line in lines:
        columns = line.split(maxsplit=_MAPPED_COLUMNS - 1)
        if len(columns) == _MAPPED_COLUMNS and columns[-1] == name:
            start, stop = (int(bound, 16) for bound in columns[0].split("-"))
            release_pages(start, stop - start)
