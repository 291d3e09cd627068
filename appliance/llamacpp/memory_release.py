"""Gives resident memory that is not read any more back to the system. On Linux alone; elsewhere nothing happens."""

import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_MAPS: Final = Path("/proc/self/maps")
_MAPPED_COLUMNS: Final = 6
"""Of a line of /proc/self/maps: bounds, permissions and so on; the last one is a path."""
_CODE: Final = "r-xp"
"""Code is never written, so no page of it differs from its file."""


def release_pages(address: int, size_bytes: int) -> None:
    """Give the whole pages among `size_bytes` from `address` on back. They stay mapped.

    What is read there next is the file's content again, or zeros where no file backs them.
    """
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (address + size_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and stop > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def release_file_pages(path: Path, maps: Path = _MAPS) -> None:
    """Take what this process has mapped of a file out of its memory; it stays in the system's page cache.

    What is read again comes back page by page.
    """
    name = str(path.resolve())
    for start, stop, _, mapped in _mappings(maps):
        if mapped == name:
            release_pages(start, stop - start)


def release_code_pages(maps: Path = _MAPS) -> None:
    """The same for the code of the program and its libraries: a third of it runs at the start alone."""
    for start, stop, permissions, mapped in _mappings(maps):
        if permissions == _CODE and mapped.startswith("/"):
            release_pages(start, stop - start)


def release_freed() -> None:
    """Give back what was allocated with malloc and freed since; a GNU C library alone can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _mappings(maps: Path) -> Iterator[tuple[int, int, str, str]]:
    """Start, end, permissions and path of everything this process has mapped from files."""
    try:
        lines = maps.read_text("utf-8", "replace").splitlines()
    except OSError:
        return
    for line in lines:
        columns = line.split(maxsplit=_MAPPED_COLUMNS - 1)
        if len(columns) == _MAPPED_COLUMNS:
            start, stop = (int(bound, 16) for bound in columns[0].split("-"))
            yield start, stop, columns[1], columns[-1]
