"""What a check finds: how bad it is, in words, and what to do about it."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`remedy` is empty only where there is nothing to do."""

    check: str
    level: Level
    text: str
    remedy: str = ""
