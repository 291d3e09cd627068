"""How commands speak: results on stdout, everything else on stderr, errors as one sentence and exit code 1."""

import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import typer
from rich.console import Console

from appliance.errors import ApplianceError

Result = TypeVar("Result")

_PIPE_WIDTH = 240
"""Columns where no terminal says how many there are: a table in a file or a pipe is not to be cut."""

stdout = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
stderr = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    print(text, flush=True)


def say_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str, ensure_ascii=False), flush=True)


def fail(message: str, code: int = 1) -> NoReturn:
    print(f"appliance: {message}", file=sys.stderr, flush=True)
    raise typer.Exit(code)


def exit_on_error(work: Callable[[], Result]) -> Result:
    """Do `work`; one of our own errors ends the program with its sentence instead of a traceback."""
    try:
        return work()
    except ApplianceError as error:
        fail(str(error))


def format_bytes(count: float) -> str:
    """1234567 -> '1.2 MB' (decimal units, as disks and downloads are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
