"""What was predicted against what was found, and whether that is good enough. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

KV_TOLERANCE: Final = 0.05
LEAST_THROUGHPUT_SHARE: Final = 0.98


@dataclass(frozen=True, slots=True)
class Goal:
    """One promise: `found` against `wanted`. `held` is None where it could not be measured."""

    name: str
    found: float | None
    wanted: float
    held: bool | None
    unit: str = ""


def compared(name: str, predicted: float | None, actual: float | None) -> Mapping[str, Any]:
    """Both figures, and by how much the prediction was off; positive: more was predicted than there was."""
    known = predicted is not None and actual is not None and actual > 0
    off = (predicted - actual) / actual if known and predicted is not None and actual is not None else None
    return {"what": name, "predicted": predicted, "actual": actual, "off": off}


def goals(memory: Sequence[Mapping[str, Any]], throughput: Mapping[str, Any]) -> list[Goal]:
    """The promises that a check is about."""
    rows = {row["what"]: row for row in memory}
    made = []
    for what in ("kv_tokens", "held_bytes"):
        off = rows.get(what, {}).get("off")
        if off is not None or what == "kv_tokens":
            made.append(Goal(f"{what} predicted within", off, KV_TOLERANCE, None if off is None else abs(off) <= 0.05))
    for way, row in throughput.items():
        share = row.get("share")
        good = None if share is None or math.isnan(share) else share >= LEAST_THROUGHPUT_SHARE
        made.append(Goal(f"throughput through the node, {way}", share, LEAST_THROUGHPUT_SHARE, good))
    return made


def verdict(made: Sequence[Goal], failures: Sequence[str]) -> str:
    """passed, missed (a goal), or failed (a step)."""
    if failures:
        return "failed"
    return "missed" if any(goal.held is not True for goal in made) else "passed"
