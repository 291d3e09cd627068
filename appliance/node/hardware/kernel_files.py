"""Reading the small text files in which the kernel describes the machine."""

from pathlib import Path


def read_kernel_file(path: Path) -> str:
    """The file's text without white space around it; empty if it cannot be read."""
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
